"""Deep equilibrium and other implicit models in JAX."""

import importlib

__version__ = "0.1.0"

# Public name -> module. Resolved on first use, so that importing the package starts nothing.
_PUBLIC = {
    "fixed_point": "deqjax.core.fixed_point",
    "Solution": "deqjax.core.fixed_point",
    "solve": "deqjax.core.solve",
    "SolverStats": "deqjax.core.stats",
    "Status": "deqjax.core.stats",
    "Solver": "deqjax.core.solvers",
    "Picard": "deqjax.core.solvers",
    "Anderson": "deqjax.core.solvers",
    "TriangularAnderson": "deqjax.core.solvers",
    "Broyden": "deqjax.core.solvers",
    "NewtonKrylov": "deqjax.core.solvers",
    "get_solver": "deqjax.core.solvers",
    "register_solver": "deqjax.core.solvers",
    "Implicit": "deqjax.core.implicit",
    "Phantom": "deqjax.core.gradients",
    "OneStep": "deqjax.core.gradients",
    "Reversible": "deqjax.core.reversible",
    "Neumann": "deqjax.core.implicit",
    "GMRES": "deqjax.core.solvers.krylov",
    "BiCGSTAB": "deqjax.core.solvers.krylov",
    "NormalCG": "deqjax.core.solvers.krylov",
    "SHINE": "deqjax.core.solvers.shine",
    "Unrolled": "deqjax.core.gradients",
    "check_gradients": "deqjax.core.check",
    "adjoint_probe": "deqjax.core.gradients",
    "jacobian_loss": "deqjax.core.stability",
    "spectral_radius": "deqjax.core.stability",
    "fixed_point_correction": "deqjax.core.correction",
    "DEQ": "deqjax.nn.deq",
    "DEQConfig": "deqjax.nn.config",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        # `solve` and `fixed_point` are functions in modules of the same name; ask the module, not the package.
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'deqjax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
