"""Anderson acceleration, of types I and II."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array
from deqjax.core.small_systems import solve_general, solve_positive
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

    With G the matrix of the last residuals and X that of their points, type II minimises |G alpha|^2 subject to
    sum(alpha) = 1; type I makes G alpha orthogonal to the differences of points (Fang and Saad 2009, where they are the
    multisecant forms of the two Broyden methods). Then
    z <- damping * sum(alpha_i f(x_i)) + (1 - damping) * sum(alpha_i x_i).
    (Anderson 1965; Walker and Ni 2011.)

    Attributes:
      memory: how many past evaluations are combined, m in the literature.
      kind: "II", or "I", which can take bolder steps and is better used with a safeguard.
      ridge: regularisation, added to the diagonal of the Gram matrix G^T G (of type I: subtracted from that of X^T G).
      ridge_mode: "relative" adds to each entry of the diagonal that share of itself, so that acceleration does not die
        once residuals are small, nor while the memory holds old ones that are large; "absolute" adds the ridge as it is
        (the original's `lam`).
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
        unit = jnp.eye(N, dtype=gram.dtype)[:, :, None]
        gram, corner = gram + unit * self._ridge_of(gram), corner + self._ridge_of(corner)
        system = gram - row[None] - row[:, None] + corner[None, None]
        # A slot left out has a unit diagonal and nothing on its right-hand side, which makes its weight exactly zero.
        system = jnp.where(kept[None] & kept[:, None], system, unit)
        gamma = solve_positive(system, jnp.where(kept, corner[None] - row, 0))
        return _sound(gamma, axis=0)[(jnp.arange(N, dtype=oldest.dtype) - oldest) % N]

    def _orthogonal(self, products, with_newest, kept):
        """Type I: the weights of the older evaluations [B, N], zero in slots not in use; the present one has the rest.

        Args:
          products: of the older points, from the newest as the origin, with the older residuals [B, N, N].
          with_newest: with the newest residual [B, N].
          kept: slots in use [B, N].
        """
        unit = jnp.eye(kept.shape[1], dtype=products.dtype)[None]
        # Near a solution of a contraction these products are negative definite, so that is the sign of the ridge.
        system = products - unit * self._ridge_of(jnp.abs(products)) - with_newest[:, :, None]
        system = jnp.where(kept[:, :, None] & kept[:, None, :], system, unit)
        return _sound(solve_general(system, jnp.where(kept, -with_newest, 0)), axis=1)

    def _ridge_of(self, diagonal):
        """What to add to these entries of a diagonal."""
        if self.ridge_mode == "absolute":
            return self.ridge
        # Below the dtype's resolution a ridge does not regularise anything.
        return jnp.maximum(self.ridge, 4 * jnp.finfo(diagonal.dtype).eps).astype(diagonal.dtype) * diagonal


def _sound(weights, axis):
    """The weights, or none at all where rounding has made their system singular: z then goes to f(z)."""
    largest = jnp.max(jnp.abs(weights), axis=axis, keepdims=True)
    return jnp.where(largest < 1 / jnp.finfo(weights.dtype).eps, weights, 0)
