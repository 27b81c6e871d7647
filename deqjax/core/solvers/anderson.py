"""Anderson acceleration, of types I and II."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array
from deqjax.core.small_systems import solve_positive
from deqjax.core.solvers.base import Solver, require


class _State(NamedTuple):
    count: jax.Array  # evaluations so far
    images: Any  # [B, M, ...] past f(x)
    residuals: Any  # [B, M, ...] past f(x) - x
    gram: jax.Array  # [M, M, B] their inner products, updated a row at a time
    kept: jax.Array  # [B, M] slots in use
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
        require(self.memory >= 1, "memory", self.memory, "1 or more")
        require(self.kind in ("I", "II"), "kind", self.kind, '"I" or "II"')
        require(self.ridge_mode in ("relative", "absolute"), "ridge_mode", self.ridge_mode, '"relative" or "absolute"')

    def init(self, z):
        M = self.memory
        zeros = jnp.zeros_like(batched.norm(z))
        images, residuals = batched.new_history(z, M), batched.new_history(z, M)
        per_slot = jnp.repeat(zeros[None], M, axis=0)
        gram = jnp.repeat(per_slot[None], M, axis=0)
        return _State(jnp.zeros((), jnp.int32), images, residuals, gram, per_slot.T != 0, zeros + jnp.inf)

    def step(self, f, z, f_z, state):
        slot = state.count % self.memory
        residual = batched.subtract(f_z, z)
        kept, lowest = state.kept, state.lowest
        if self.safeguard is not None:
            size = batched.norm(residual)
            kept = kept & (size <= self.safeguard * lowest)[:, None]
            lowest = jnp.minimum(lowest, size)
        kept = kept.at[:, slot].set(True)
        if self.kind == "II":
            row = batched.coefficients(state.residuals, residual).at[:, slot].set(batched.inner(residual, residual))
            gram = state.gram.at[slot].set(row.T).at[:, slot].set(row.T)
            alpha = self._least_squares(gram, kept.T, slot).T
        else:
            images, residuals = batched.write(state.images, slot, f_z), batched.write(state.residuals, slot, residual)
            # Only differences of points matter; taken from the present one they keep their digits.
            offsets = jax.tree.map(lambda i, r, x: i - r - x[:, None], images, residuals, z)
            gram, alpha = state.gram, self._orthogonal(batched.products(offsets, residuals), kept)

        # The newest evaluation is combined from where it is, and written last: see `batched.write_after`.
        newest, older = alpha[:, slot], alpha.at[:, slot].set(0)
        combined = batched.add_scaled(batched.combine(state.images, older), newest, f_z)
        if not (isinstance(self.damping, (int, float)) and self.damping == 1):
            # The first step has nothing to combine; it goes to f(z) as it is.
            pull = jnp.where(state.count > 0, 1 - jnp.asarray(self.damping, alpha.dtype), 0)
            pulled = batched.add_scaled(batched.combine(state.residuals, older), newest, residual)
            combined = batched.add_scaled(combined, -pull * jnp.ones_like(newest), pulled)
        images = batched.write_after(combined, state.images, slot, f_z)
        residuals = batched.write_after(combined, state.residuals, slot, residual)
        return combined, _State(state.count + 1, images, residuals, gram, kept, lowest)

    def _least_squares(self, gram, kept, slot):
        """Type II: alpha [M, B], zero in slots not in use, from gram [M, M, B] and kept [M, B].

        The constraint is built in: alpha = (1 - sum(gamma)) in the newest slot and gamma in the older ones, which leaves an
        unconstrained least-squares problem in the differences to the newest residual.
        """
        M = self.memory
        by_age = (slot + 1 + jnp.arange(M, dtype=slot.dtype)) % M
        gram, kept = gram[by_age][:, by_age], kept[by_age]
        scale, ridge = self._scale(jnp.stack([gram[i, i] for i in range(M)]), kept, axis=0)
        unit = jnp.eye(M, dtype=gram.dtype)[:, :, None]
        gram = gram / scale[None, None] + ridge * unit
        older, newest, corner = gram[:-1, :-1], gram[-1, :-1], gram[-1, -1]
        system = older - newest[None] - newest[:, None] + corner[None, None]
        # A slot left out has a unit diagonal and nothing on its right-hand side, which makes its weight exactly zero.
        in_use = kept[:-1]
        system = jnp.where(in_use[None] & in_use[:, None], system, unit[:-1, :-1])
        gamma = solve_positive(system, jnp.where(in_use, corner[None] - newest, 0))
        alpha = jnp.concatenate([gamma, 1 - jnp.sum(gamma, axis=0, keepdims=True)])
        return alpha[(jnp.arange(M, dtype=slot.dtype) - slot - 1) % M]

    def _orthogonal(self, products, kept):
        """Type I: X^T G alpha = constant with sum(alpha) = 1, as a bordered system; alpha [B, M]."""
        products = jnp.where(kept[:, :, None] & kept[:, None, :], products, 0)
        scale, ridge = self._scale(jnp.abs(jnp.diagonal(products, axis1=1, axis2=2)), kept, axis=1)
        # Near a solution of a contraction these products are negative definite, so that is the sign of the ridge.
        system = products / scale[:, None, None] - _diagonal(jnp.where(kept, ridge, -1))
        border = kept.astype(products.dtype)
        corner = jnp.zeros_like(products[:, :1, :1])
        top = jnp.concatenate([corner, border[:, None, :]], axis=2)
        bordered = jnp.concatenate([top, jnp.concatenate([border[:, :, None], system], axis=2)], axis=1)
        one = jnp.zeros_like(bordered[:, 0]).at[:, 0].set(1)
        return jnp.linalg.solve(bordered, one[..., None])[:, 1:, 0]

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
