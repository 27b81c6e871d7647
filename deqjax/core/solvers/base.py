"""What a solver is: hyper-parameters, `init` and `step`. The loop belongs to `core.solve`."""

import copy
import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from deqjax.core.annotations import Array, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """Hyper-parameters common to all solvers; subclass and add `init` and `step` to make a method.

    Attributes:
      max_steps: budget of evaluations of f.
      tol: a sample is finished once its residual is below this. May be traced: changing it compiles nothing anew.
        Accelerators multiply float32 matrices with fewer bits by default; a tolerance finer than those needs
        `jax.config.update("jax_default_matmul_precision", "highest")`.
      stop_mode: "rel" compares `|f(z) - z| / (|f(z)| + 1e-9)` with `tol`, "abs" compares `|f(z) - z|`. States far smaller
        than 1e-9 are better scaled up.
      stop: "each" freezes a finished sample, so that its result does not depend on its batch mates; "all" moves every
        sample until all are below `tol` at once.
      check_every: evaluations between two tests whether the whole batch is done (a host or cross-device reduction).
      return_final: return the last iterate instead of the best one, and never stop early.
      burn_in: first evaluations that neither end the solve nor count as best; a budget that ends before them hands
        back the start, as in the original.
      monitor: False drops residuals and stopping altogether: `max_steps` plain steps, the last iterate returned.
    """

    max_steps: int = 40
    tol: float | Array = 1e-3
    stop_mode: str = "rel"
    stop: str = "each"
    check_every: int = 1
    return_final: bool = False
    burn_in: int = 0
    monitor: bool = True

    # "image": the state that a residual vouches for is f(z), one application further; "point": z itself.
    candidate: ClassVar[str] = "image"

    def __post_init__(self):
        require(self.stop_mode in ("abs", "rel"), "stop_mode", self.stop_mode, '"abs" or "rel"')
        require(self.stop in ("each", "all"), "stop", self.stop, '"each" or "all"')
        require_count("max_steps", self.max_steps, 0)
        require_count("check_every", self.check_every, 1)
        require_count("burn_in", self.burn_in, 0)
        # An array may be traced, and then has no value to look at.
        sound = self.tol >= 0 if isinstance(self.tol, numbers.Real) else hasattr(self.tol, "dtype")
        require(sound, "tol", self.tol, "a number, 0 or more")

    def init(self, z: State) -> Any:
        """The method's own state before the first evaluation at `z`."""
        raise NotImplementedError

    def step(self, f: Callable[[State], State], z: State, f_z: State, state: Any) -> tuple[State, Any]:
        """From f evaluated at z to the next point: `(z_next, state)`. f itself is there for line searches."""
        raise NotImplementedError


def split_options(rule) -> tuple[list, Callable[[list], Any]]:
    """The arrays among the options of a solver or gradient rule, or of a solver within it, and the map that puts others in
    their places.

    They may be traced, and derivative rules may close over nothing that is.
    """
    names = [field.name for field in dataclasses.fields(rule) if hasattr(rule, field.name)]
    # JAX sorts the keys of dictionaries.
    unsortable = lambda x: isinstance(x, dict) and not all(isinstance(key, str) for key in x)  # noqa: E731
    leaves, structure = jax.tree.flatten([getattr(rule, name) for name in names], is_leaf=unsortable)

    def split(leaf):
        if isinstance(leaf, jax.Array):
            return [leaf], lambda new: new[0]
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return split_options(leaf)
        return [], lambda _: leaf

    parts = [split(leaf) for leaf in leaves]
    arrays = [array for inside, _ in parts for array in inside]

    def with_arrays(new):
        if not new:
            return rule
        # The options have been checked and may have been changed by that: a copy is not made from them anew.
        new, copied = iter(new), copy.copy(rule)
        values = [rebuild([next(new) for _ in inside]) for inside, rebuild in parts]
        for name, value in zip(names, jax.tree.unflatten(structure, values), strict=True):
            object.__setattr__(copied, name, value)
        return copied

    return arrays, with_arrays


def without_gradients(solver: Solver) -> Solver:
    """The same solver, whose options get no gradient."""
    arrays, with_arrays = split_options(solver)
    return with_arrays(jax.lax.stop_gradient(arrays))


def require(condition, name, value, allowed):
    """Raises ValueError naming the option, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}.")


def require_solver(solver):
    """Raises TypeError for what is no solver: a name, or a class without options."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver={solver!r}: must be a solver such as Anderson(max_steps=40); get_solver(name) takes a name.")


def require_count(name, value, least):
    """Raises ValueError unless the option is a whole number of `least` or more.

    A float would fail inside JAX, which takes 5.0 for 5 in its caches: the right number would then fail there as well.
    """
    counts = isinstance(value, numbers.Integral) and value >= least
    require(counts, name, value, f"a whole number, {least} or more, and not traced")
