"""The methods, and their names in configs."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from deqjax.core.naming import did_you_mean
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import Solver
from deqjax.core.solvers.broyden import Broyden
from deqjax.core.solvers.newton_krylov import NewtonKrylov
from deqjax.core.solvers.picard import Picard
from deqjax.core.solvers.torchdeq_broyden import TorchDEQBroyden
from deqjax.core.solvers.triangular_anderson import TriangularAnderson

_T = TypeVar("_T")

_SOLVERS: dict[str, type[Solver]] = {
    "picard": Picard,
    "fixed_point_iter": Picard,
    "anderson": Anderson,
    "triangular_anderson": TriangularAnderson,
    "broyden": Broyden,
    "newton_krylov": NewtonKrylov,
    "torchdeq_broyden": TorchDEQBroyden,
}


def register_solver(name: str, solver: type[Solver]) -> None:
    """Makes a solver class known to configs under `name`.

    Raises:
      TypeError: it is no class of solvers.
    """
    if not (isinstance(solver, type) and issubclass(solver, Solver)):
        raise TypeError(f"solver={solver!r}: must be a subclass of Solver, not an instance; options are given with the name.")
    _SOLVERS[name] = solver


def solver_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_SOLVERS)


def solver_class(name: str) -> type[Solver]:
    """The class behind a name.

    Raises:
      ValueError: no solver has this name; the message lists those there are.
    """
    if name not in _SOLVERS:
        raise ValueError(f"no solver is called {name!r}{did_you_mean(name, _SOLVERS)} There are: {', '.join(_SOLVERS)}.")
    return _SOLVERS[name]


def get_solver(name: str, **options) -> Solver:
    """A solver by name with its hyper-parameters, e.g. `get_solver("anderson", max_steps=30, memory=5)`.

    Raises:
      ValueError: unknown name, or an option that the solver does not have.
    """
    return with_options(solver_class(name), name, options)


def with_options(cls: type[_T], name: str, options: Mapping) -> _T:
    """A solver of this class, fixed-point or linear, that configs know as `name`.

    Raises:
      ValueError: it has no such option.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"solver {name!r} has no option {option!r}{did_you_mean(option, known)} It has: {', '.join(known)}."
            )
    return cls(**options)
