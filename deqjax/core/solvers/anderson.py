"""Anderson acceleration, of types I and II."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array
from deqjax.core.small_systems import solve_positive
from deqjax.core.solvers.base import Solver, require, require_count


class _State(NamedTuple):
    """The evaluations before the present one, at most N = memory - 1 of them: a step combines them with the present one, which
    then takes the place of the oldest."""

    count: jax.Array  # evaluations so far
    images: Any  # [B, N, ...] past f(x)
    residuals: Any  # [B, N, ...] past f(x) - x
    gram: jax.Array  # [N, N, B] their inner products, updated a row at a time
    kept: jax.Array  # [B, N] slots in use
    lowest: jax.Array  # [B] smallest residual so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Combines past evaluations so that their residuals cancel as well as they can.

    With G the matrix of the last residuals and X that of their points, type II minimises |G alpha|^2 + ridge |alpha|^2
    subject to sum(alpha) = 1; type I makes G alpha orthogonal to the differences of points (Fang and Saad 2009, where they
    are the multisecant forms of the two Broyden methods). Then
    z <- damping * sum(alpha_i f(x_i)) + (1 - damping) * sum(alpha_i x_i).
    (Anderson 1965; Walker and Ni 2011.)

    Attributes:
      memory: how many past evaluations are combined, m in the literature.
      kind: "II", or "I", which can take bolder steps and is better used with a safeguard.
      ridge: regularisation of the Gram matrix.
      ridge_mode: "relative" scales the ridge by the mean of the Gram matrix's diagonal, so that acceleration does not
        die once the residual is small; "absolute" uses it as it is (the original's `lam`).
      damping: 1 moves to the combined images, less mixes in the combined points; TorchDEQ's tau.
      safeguard: a sample whose residual exceeds so many times its lowest forgets its history and takes a plain step; None
        trusts every step.
    """

    memory: int = 6
    kind: str = "II"
    ridge: float = 1e-8
    ridge_mode: str = "relative"
    damping: float | Array = 1.0
    safeguard: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_count("memory", self.memory, 1)
        require(self.kind in ("I", "II"), "kind", self.kind, '"I" or "II"')
        require(self.ridge_mode in ("relative", "absolute"), "ridge_mode", self.ridge_mode, '"relative" or "absolute"')

    def init(self, z):
        N = self.memory - 1
        zeros = jnp.zeros_like(batched.norm(z))
        images, residuals = batched.new_history(z, N), batched.new_history(z, N)
        per_slot = jnp.repeat(zeros[None], N, axis=0)
        gram = jnp.repeat(per_slot[None], N, axis=0)
        return _State(jnp.zeros((), jnp.int32), images, residuals, gram, per_slot.T != 0, zeros + jnp.inf)

    def step(self, f, z, f_z, state):
        if self.memory == 1:
            # Nothing to combine.
            mixed = batched.mix(z, f_z, jnp.where(state.count > 0, self.damping, 1.0))
            return mixed, state._replace(count=state.count + 1)
        oldest = state.count % (self.memory - 1)
        residual = batched.subtract(f_z, z)
        kept, lowest = state.kept, state.lowest
        if self.safeguard is not None:
            size = batched.norm(residual)
            kept = kept & (size <= self.safeguard * lowest)[:, None]
            lowest = jnp.minimum(lowest, size)
        if self.kind == "II":
            row = batched.coefficients(state.residuals, residual).T
            corner = batched.inner(residual, residual)
            weights = self._least_squares(state.gram, row, corner, kept.T, oldest).T
            gram = state.gram.at[oldest].set(row).at[:, oldest].set(row).at[oldest, oldest].set(corner)
        else:
            # Only differences of points matter; taken from the present one they keep their digits.
            offsets = jax.tree.map(lambda i, r, x: i - r - x[:, None], state.images, state.residuals, z)
            products = batched.products(offsets, state.residuals), batched.coefficients(offsets, residual)
            gram, weights = state.gram, self._orthogonal(*products, kept)

        newest = 1 - jnp.sum(weights, axis=1)
        combined = batched.add_scaled(batched.combine(state.images, weights), newest, f_z)
        if not (isinstance(self.damping, (int, float)) and self.damping == 1):
            # The first step has nothing to combine; it goes to f(z) as it is.
            pull = jnp.where(state.count > 0, 1 - jnp.asarray(self.damping, weights.dtype), 0)
            pulled = batched.add_scaled(batched.combine(state.residuals, weights), newest, residual)
            combined = batched.add_scaled(combined, -pull * jnp.ones_like(newest), pulled)
        images = batched.write_after(combined, state.images, oldest, f_z)
        residuals = batched.write_after(combined, state.residuals, oldest, residual)
        return combined, _State(state.count + 1, images, residuals, gram, kept.at[:, oldest].set(True), lowest)

    def _least_squares(self, gram, row, corner, kept, oldest):
        """Type II: the weights of the older evaluations [N, B], zero in slots not in use; the present one has the rest.

        That builds the constraint in and leaves an unconstrained least-squares problem in the differences to the newest
        residual.

        Args:
          gram: of the older residuals [N, N, B].
          row: their inner products with the newest [N, B].
          corner: its own with itself [B].
          kept: slots in use [N, B].
          oldest: the slot of the oldest.
        """
        N = self.memory - 1
        by_age = (oldest + jnp.arange(N, dtype=oldest.dtype)) % N
        gram, row, kept = gram[by_age][:, by_age], row[by_age], kept[by_age]
        diagonal = jnp.stack([*(gram[i, i] for i in range(N)), corner])
        scale, ridge = self._scale(diagonal, jnp.concatenate([kept, jnp.ones_like(kept[:1])]), axis=0)
        unit = jnp.eye(N, dtype=gram.dtype)[:, :, None]
        gram, row, corner = gram / scale[None, None] + ridge * unit, row / scale[None], corner / scale + ridge
        system = gram - row[None] - row[:, None] + corner[None, None]
        # A slot left out has a unit diagonal and nothing on its right-hand side, which makes its weight exactly zero.
        system = jnp.where(kept[None] & kept[:, None], system, unit)
        gamma = solve_positive(system, jnp.where(kept, corner[None] - row, 0))
        return gamma[(jnp.arange(N, dtype=oldest.dtype) - oldest) % N]

    def _orthogonal(self, products, with_newest, kept):
        """Type I: X^T G alpha = constant with sum(alpha) = 1, as a bordered system; the weights of the older ones [B, N].

        Args:
          products: of the older points with the older residuals [B, N, N].
          with_newest: with the newest residual [B, N]. The newest point is the origin, so its own products are zero.
          kept: slots in use [B, N].
        """
        both = jnp.concatenate([products, with_newest[:, :, None]], axis=2)
        products = jnp.concatenate([both, jnp.zeros_like(both[:, :1])], axis=1)
        kept = jnp.concatenate([kept, jnp.ones_like(kept[:, :1])], axis=1)
        products = jnp.where(kept[:, :, None] & kept[:, None, :], products, 0)
        scale, ridge = self._scale(jnp.abs(jnp.diagonal(products, axis1=1, axis2=2)), kept, axis=1)
        # Near a solution of a contraction these products are negative definite, so that is the sign of the ridge.
        system = products / scale[:, None, None] - _diagonal(jnp.where(kept, ridge, -1))
        border = kept.astype(products.dtype)
        corner = jnp.zeros_like(products[:, :1, :1])
        top = jnp.concatenate([corner, border[:, None, :]], axis=2)
        bordered = jnp.concatenate([top, jnp.concatenate([border[:, :, None], system], axis=2)], axis=1)
        one = jnp.zeros_like(bordered[:, 0]).at[:, 0].set(1)
        return jnp.linalg.solve(bordered, one[..., None])[:, 1:-1, 0]

    def _scale(self, diagonal, kept, axis):
        """What to divide a matrix by, per sample [B], and the ridge to add to it then."""
        dtype = diagonal.dtype
        if self.ridge_mode == "absolute":
            return jnp.ones_like(jnp.sum(diagonal, axis=axis)), jnp.asarray(self.ridge, dtype)
        scale = jnp.sum(jnp.where(kept, diagonal, 0), axis=axis) / jnp.sum(kept.astype(dtype), axis=axis)
        # Below the dtype's resolution a ridge does not regularise anything.
        ridge = jnp.maximum(jnp.asarray(self.ridge, dtype), 4 * jnp.finfo(dtype).eps)
        return jnp.where(scale > 0, scale, 1), ridge


def _diagonal(values_BM):
    """`[B, M, M]` matrices with the given diagonals."""
    return jnp.where(jnp.eye(values_BM.shape[1], dtype=bool)[None], values_BM[:, :, None], 0)
