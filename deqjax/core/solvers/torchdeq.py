"""Solvers configured to reproduce TorchDEQ 0.1.0 evaluation by evaluation (`preset="torchdeq"`).

The differences from this library's defaults: absolute residuals, one stopping decision for the whole batch, an absolute
ridge in Anderson, a Broyden of its own, which overwrites its oldest term, and first evaluations that do not count. Where
TorchDEQ counts iterations, this library counts evaluations of f, so Broyden's budget is one larger.
"""

from deqjax.core.solvers import get_solver

# TorchDEQ's names for solver options, and ours.
_OPTION_NAMES = {"m": "memory", "lam": "ridge", "tau": "damping", "LBFGS_thres": "memory", "ls": "line_search"}

_METHODS = {
    "picard": {},
    "anderson": {"ridge": 1e-4, "ridge_mode": "absolute", "burn_in": 2},
    "torchdeq_broyden": {"burn_in": 1},
}
_ALIASES = {"fixed_point_iter": "picard", "simple_fixed_point_iter": "picard", "broyden": "torchdeq_broyden"}


def torchdeq_solver(name: str, max_iter: int, tol: float = 1e-3, stop_mode: str = "abs", **options):
    """The solver that TorchDEQ runs as `name` with these arguments; options may carry its names (`m`, `lam`, `ls`)."""
    method = _ALIASES.get(name, name)
    settings = dict(_METHODS.get(method, {}), max_steps=max_iter, tol=tol, stop_mode=stop_mode, stop="all")
    if name == "simple_fixed_point_iter":
        settings["monitor"] = False
    if method == "torchdeq_broyden":
        settings["max_steps"] = max_iter + 1
    for option, value in options.items():
        settings[_OPTION_NAMES.get(option, option)] = value
    if isinstance(settings.get("line_search"), bool):
        settings["line_search"] = "batch" if settings["line_search"] else None
    return get_solver(method, **settings)
