"""Adjoint systems u = A u + c by the Krylov methods of `jax.scipy.sparse.linalg`, every sample a system of its own.

A is known only as a map on the whole batch, while `jax.scipy` solves one system. So one sample's solve is written with
a stand-in for A, `vmap` makes a batch of solves of it, and the stand-in's batching rule is the map on the batch. The
samples thus share every application of A and nothing else: each has its own Krylov space and its own stopping.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.scipy.sparse import linalg

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, State
from deqjax.core.hoist import Hoisted
from deqjax.core.solvers.base import require_count
from deqjax.core.stats import SolverStats, Status

_one_sample = Primitive("one_sample_of_a_linear_map")
_one_sample.multiple_results = True


@_one_sample.def_abstract_eval
def _(*arguments, n_constants, function, transposed):
    return list(arguments[n_constants:])


def _batch(arguments, axes, *, n_constants, function, transposed):
    constants, leaves = arguments[:n_constants], arguments[n_constants:]
    leaves = [jnp.moveaxis(x, axis, 0) for x, axis in zip(leaves, axes[n_constants:], strict=True)]
    return function(list(constants), leaves), [0] * len(leaves)


def _transpose(cotangents, *arguments, n_constants, function, transposed):
    constants = arguments[:n_constants]
    swapped = {"function": transposed, "transposed": function}
    return [None] * n_constants + _one_sample.bind(*constants, *cotangents, n_constants=n_constants, **swapped)


batching.primitive_batchers[_one_sample] = _batch
ad.primitive_transposes[_one_sample] = _transpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSolver:
    """Hyper-parameters common to the Krylov methods; they serve as `Implicit(solver=...)`.

    Attributes:
      max_steps: budget of products with the Jacobian, one step of the method at the least. Measuring takes two to
        four more, and in GMRES one for every Krylov space.
      tol: a sample is finished once |c + A u - u| < tol |c|.
    """

    max_steps: int = 40
    tol: float = 1e-6

    # Its loops start from constants, which shard_map refuses where it checks what varies.
    constant_starts: ClassVar[bool] = True

    def __post_init__(self):
        require_count("max_steps", self.max_steps, 1)

    def solve(self, linear: Hoisted, c: State, method=None, tol: Float[Array, " B"] | None = None) -> tuple[State, SolverStats]:
        """Solves u = A u + c.

        Args:
          linear: A on the batch; its samples must not depend on each other.
          c: right-hand side.
          method: state of the forward solver, of no use here.
          tol: one for each sample instead of the solver's. The transposed solve of a derivative keeps to the solver's.

        Returns:
          The solution and its statistics; `jax.scipy` does not count its steps, so the budget stands for them. A sample
          whose method broke down returns c.

        Raises:
          NotImplementedError: GMRES or BiCGSTAB inside a shard_map that checks what varies.
        """
        leaves, structure = jax.tree.flatten(c)
        if self.constant_starts and any(jax.typeof(x).manual_axis_type.varying for x in leaves):
            raise NotImplementedError(
                f"the loops of jax.scipy's {type(self).__name__} do not say what differs between devices, as shard_map wants "
                "to know: give shard_map check_vma=False, or take NormalCG or Anderson, or for the forward solve Broyden."
            )
        # jax.scipy adds up inner products of leaves as they are, so all of them get one dtype there.
        dtype = batched.accumulation_dtype(c)

        def state(columns):
            return jax.tree.unflatten(structure, [x.astype(leaf.dtype) for x, leaf in zip(columns, leaves, strict=True)])

        def residual_map(constants, columns):
            u = state(columns)
            return [x.astype(dtype) for x in jax.tree.leaves(batched.subtract(u, linear.function(constants, u)))]

        def transposed_map(constants, columns):
            return jax.vjp(lambda columns: residual_map(constants, columns), columns)[1](columns)[0]

        n = len(linear.constants)

        def operator(function, transposed):
            settings = {"n_constants": n, "function": function, "transposed": transposed}
            return lambda leaves: _one_sample.bind(*linear.constants, *leaves, **settings)

        matvec, rmatvec = operator(residual_map, transposed_map), operator(transposed_map, residual_map)
        tol = jnp.full_like(batched.norm(c), self.tol) if tol is None else tol

        def solve_one(c, tol):
            solve = lambda _, c: self._solve_one(matvec, rmatvec, c, tol)  # noqa: E731
            transposed = lambda _, c: self._solve_one(rmatvec, matvec, c, self.tol)  # noqa: E731
            return jax.lax.custom_linear_solve(matvec, c, solve, transposed)

        # The system is linear, so its size is free; jax.scipy takes what is below the dtype's resolution for zero.
        size = batched.largest(c)
        size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
        columns = jax.vmap(solve_one)([x.astype(dtype) / batched.per_sample(size, x) for x in leaves], tol)
        u = state([x * batched.per_sample(size, x) for x in columns])
        return _checked(linear, u, c, tol, self.max_steps)

    def _solve_one(self, matvec, rmatvec, c: list, tol) -> list:
        """One sample: matvec(u) = c, given also the transposed map."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals (Saad and Schultz 1986), restarted.

    Attributes:
      restart: largest dimension of a Krylov space, so many states of memory. A larger budget is for as many whole spaces as it
        holds.
    """

    restart: int = 20

    def __post_init__(self):
        super().__post_init__()
        require_count("restart", self.restart, 1)

    def _solve_one(self, matvec, rmatvec, c, tol):
        restart = min(self.restart, self.max_steps)
        settings = {"restart": restart, "maxiter": self.max_steps // restart, "solve_method": "incremental"}
        return linalg.gmres(matvec, c, x0=_zeros(c), tol=tol, **settings)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiCGSTAB(LinearSolver):
    """Stabilised bi-conjugate gradients (van der Vorst 1992): two products a step, a fixed few states of memory."""

    def _solve_one(self, matvec, rmatvec, c, tol):
        return linalg.bicgstab(matvec, c, x0=_zeros(c), tol=tol, maxiter=max(1, self.max_steps // 2))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equations: never breaks down, at the square of the condition number.

    Every step takes a product with the Jacobian and one with its transpose. `tol` is of the normal equations' residual.
    """

    constant_starts: ClassVar[bool] = False

    def _solve_one(self, matvec, rmatvec, c, tol):
        rhs = rmatvec(c)
        return linalg.cg(lambda u: rmatvec(matvec(u)), rhs, x0=_zeros(rhs), tol=tol, maxiter=max(1, self.max_steps // 2))[0]


# Their names in configs.
LINEAR_SOLVERS: dict[str, type[LinearSolver]] = {"gmres": GMRES, "bicgstab": BiCGSTAB, "normal_cg": NormalCG}


def _zeros(like):
    # A product, so that it depends on the sample as the stand-in's batching rule expects.
    return [0 * x for x in like]


def _checked(linear, u, c, tol, max_steps) -> tuple[State, SolverStats]:
    """The solution with its true residual; c in place of what is not finite."""
    image = jax.tree.map(jnp.add, linear(u), c)
    finite = jnp.isfinite(batched.norm(image)) & jnp.isfinite(batched.norm(u))
    absolute = jnp.where(finite, batched.norm(batched.subtract(image, u)), jnp.inf)
    relative = absolute / (batched.norm(image) + 1e-9)
    status = jnp.where(absolute <= tol * batched.norm(c), Status.CONVERGED, Status.STEP_LIMIT)
    status = jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)
    steps = jnp.full_like(status, max_steps)
    stats = SolverStats(absolute, relative, steps, steps, absolute[:, None], relative[:, None], status)
    return batched.select(finite, u, c), stats
