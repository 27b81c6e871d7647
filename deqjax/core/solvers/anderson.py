"""Anderson acceleration (type II)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.solvers.base import Solver, require


class _State(NamedTuple):
    count: jax.Array  # evaluations so far
    images: Any  # [B, M, ...] f(x_i)
    residuals: Any  # [B, M, ...] g_i = f(x_i) - x_i
    gram: jax.Array  # [B, M, M] <g_i, g_j>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """The next point is the affine combination of the last `memory` images with the smallest linearised residual.

    With G the matrix of the last residuals, minimise |alpha G|^2 + ridge |alpha|^2 subject to sum(alpha) = 1, then
    z <- damping * sum(alpha_i f(x_i)) + (1 - damping) * sum(alpha_i x_i). (Walker and Ni 2011, Anderson 1965;
    the constrained form solved by its KKT system, as in the DEQ literature.)

    Attributes:
      memory: how many past evaluations are combined, m in the literature.
      ridge: regularisation of the Gram matrix.
      ridge_mode: "relative" scales the ridge by the mean of the Gram matrix's diagonal, so that acceleration does not
        die once the residual is small; "absolute" uses it as it is (the original's `lam`).
      damping: 1 moves to the combined images, less mixes in the combined points; TorchDEQ's tau.
    """

    memory: int = 6
    ridge: float = 1e-8
    ridge_mode: str = "relative"
    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.memory >= 1, "memory", self.memory, "1 or more")
        require(self.ridge_mode in ("relative", "absolute"), "ridge_mode", self.ridge_mode, '"relative" or "absolute"')

    def init(self, z):
        B, M = batched.batch_size(z), self.memory
        dtype = batched.accumulation_dtype(z)
        images, residuals = batched.new_history(z, M), batched.new_history(z, M)
        return _State(jnp.zeros((), jnp.int32), images, residuals, jnp.zeros((B, M, M), dtype))

    def step(self, f, z, f_z, state):
        slot = state.count % self.memory
        residual = batched.subtract(f_z, z)
        images = batched.write(state.images, slot, f_z)
        residuals = batched.write(state.residuals, slot, residual)
        row = batched.coefficients(residuals, residual)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        state = _State(state.count + 1, images, residuals, gram)

        alpha = self._weights(gram, filled=jnp.minimum(state.count, self.memory))
        combined = batched.combine(images, alpha)
        if not (isinstance(self.damping, (int, float)) and self.damping == 1):
            # The first step has nothing to combine; it goes to f(z) as it is.
            pull = jnp.where(state.count > 1, 1 - jnp.asarray(self.damping, alpha.dtype), 0)
            combined = batched.add_scaled(combined, -pull * jnp.ones_like(alpha[:, 0]), batched.combine(residuals, alpha))
        return combined, state

    def _weights(self, gram, filled):
        """alpha [B, M], zero in slots that are not filled yet."""
        M, dtype = self.memory, gram.dtype
        valid = jnp.arange(M, dtype=jnp.int32) < filled
        if self.ridge_mode == "relative":
            diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
            scale = jnp.sum(diagonal, axis=1) / filled.astype(dtype)
            gram = gram / jnp.where(scale > 0, scale, 1)[:, None, None]
            # Below the dtype's resolution a ridge does not regularise anything.
            ridge = jnp.maximum(jnp.asarray(self.ridge, dtype), 4 * jnp.finfo(dtype).eps)
        else:
            ridge = jnp.asarray(self.ridge, dtype)
        gram = jnp.where((valid[:, None] & valid[None, :])[None], gram, 0)
        gram = gram + jnp.diag(jnp.where(valid, ridge, 1))[None]
        # An empty slot has a unit diagonal and no share in the constraint, which makes its weight exactly zero.
        border = jnp.broadcast_to(valid.astype(dtype)[None], gram.shape[:-1])
        corner = jnp.zeros_like(gram[:, :1, :1])
        kkt = jnp.concatenate(
            [
                jnp.concatenate([corner, border[:, None, :]], axis=2),
                jnp.concatenate([border[:, :, None], gram], axis=2),
            ],
            axis=1,
        )
        one = jnp.zeros_like(kkt[:, 0]).at[:, 0].set(1)
        return jnp.linalg.solve(kkt, one[..., None])[:, 1:, 0]
