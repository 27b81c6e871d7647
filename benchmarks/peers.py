"""This library and others behind one call: the same f, start and budget, solved by each in its own way.

Peers that are not installed are left out: `pip install torch torchdeq jaxopt optimistix banax` (banax needs Python 3.12).
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

METHODS = ("picard", "anderson", "broyden")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to solve: `steps` evaluations, or until the relative residual is below `tol`.

    Attributes:
      memory: of Anderson and Broyden; None leaves each library its own defaults, damping and regularisation included.
      batch_axis: of this library: 0 solves every sample for itself, None sees one problem.
    """

    steps: int
    tol: float = 0.0
    memory: int | None = 6
    batch_axis: int | None = 0


def jax_solvers(budget: Budget) -> dict[tuple[str, str], Callable]:
    """(library, method) -> `solve(f, start)`, differentiable where the library is this one."""
    made = {}
    for library, make in {"deqjax": _deqjax, "jaxopt": _jaxopt, "optimistix": _optimistix, "banax": _banax}.items():
        try:
            importlib.import_module(library)
        except (ImportError, SyntaxError):
            continue
        made |= {(library, method): solve for method, solve in make(budget).items()}
    return made


def _deqjax(budget):
    import deqjax

    common: dict[str, Any] = {"max_steps": budget.steps, "tol": budget.tol}
    memory = {} if budget.memory is None else {"memory": budget.memory}
    solvers = {
        "picard": deqjax.Picard(**common),
        "picard, absolute": deqjax.Picard(**common, stop_mode="abs"),  # as jaxopt stops
        "picard, unmonitored": deqjax.Picard(**common, monitor=False),
        "anderson": deqjax.Anderson(**common, **memory),
        "broyden": deqjax.Broyden(**common, **memory),
    }

    def with_solver(solver):
        rule = deqjax.Implicit(solver=solver, polish=False)
        options = {"solver": solver, "gradient": rule, "batch_axis": budget.batch_axis}
        return lambda f, start: deqjax.fixed_point(f, start, **options).value

    return {name: with_solver(solver) for name, solver in solvers.items()}


def _jaxopt(budget):
    """It sees the whole batch as one problem, and stops at an absolute residual."""
    import jaxopt

    # A residual of exactly 0 would end a solve to the tolerance 0.
    common = {"tol": budget.tol or -1.0, "jit": True}
    memory = {} if budget.memory is None else {"history_size": budget.memory}
    solvers = {
        "picard": lambda f: jaxopt.FixedPointIteration(f, maxiter=budget.steps, **common),
        # It also evaluates f at the start, but uses nothing of that, so a compiler leaves it out.
        "anderson": lambda f: jaxopt.AndersonAcceleration(f, maxiter=budget.steps, **common, **memory),
    }
    return {name: lambda f, start, make=make: make(f).run(start).params for name, make in solvers.items()}


def _optimistix(budget):
    """The whole batch as one problem."""
    import optimistix

    def picard(f, start):
        solver = optimistix.FixedPointIteration(rtol=budget.tol, atol=0.0)
        return optimistix.fixed_point(lambda z, _: f(z), solver, start, max_steps=budget.steps, throw=False).value

    return {"picard": picard}


def _banax(budget):
    """The whole batch as one problem, flattened."""
    from banax import adjoint, solver

    # Its iterations begin after one evaluation.
    common = {"rtol": budget.tol, "atol": 0.0, "max_steps": budget.steps - 1}
    memory = ({}, {}) if budget.memory is None else ({"depth": budget.memory}, {"history_size": budget.memory})
    solvers = {
        "picard": solver.Picard(**common),
        "anderson": solver.Anderson(**common, **memory[0]),
        "broyden": solver.Broyden(**common, **memory[1]),
    }
    return {name: lambda f, start, s=s: adjoint.Implicit(solver=s, b_solver=s)(f, start).value for name, s in solvers.items()}


def torchdeq_solvers(budget: Budget) -> dict[str, Callable]:
    """method -> `solve(f, start, differentiate)` with TorchDEQ; empty where it is not installed."""
    try:
        import torch
        import torchdeq
    except ImportError:
        return {}
    n, made = budget.steps, {}
    memory = {"anderson": "m", "broyden": "LBFGS_thres"}
    for method in METHODS:
        name = "fixed_point_iter" if method == "picard" else method
        # Broyden's iterations begin after one evaluation.
        iterations = n - 1 if method == "broyden" else n
        options = {f"{side}_{key}": value for side in "fb" for key, value in (("solver", name), ("max_iter", iterations))}
        options |= {"f_tol": budget.tol, "b_tol": budget.tol, "f_stop_mode": "rel", "b_stop_mode": "rel"}
        deq = torchdeq.get_deq(**options, ift=True)
        settings = {} if budget.memory is None or method == "picard" else {memory[method]: budget.memory}

        def solve(f, start, differentiate, deq=deq, settings=settings):
            deq.train(differentiate)
            with torch.set_grad_enabled(differentiate):
                g = (lambda *z: f(list(z))) if len(start) > 1 else (lambda z: f([z])[0])
                z = deq(g, start if len(start) > 1 else start[0], solver_kwargs=dict(settings))[0][-1]
            return list(z) if isinstance(z, (list, tuple)) else [z]

        made[method] = solve
    return made
