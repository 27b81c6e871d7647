"""Broyden's method as TorchDEQ limits its memory: a sum of rank-one terms, of which the newest replaces the oldest."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.solvers.broyden import Broyden
from deqjax.core.solvers.line_search import step_length


class _State(NamedTuple):
    count: jax.Array  # evaluations so far
    z: Any  # previous point
    residual: Any  # g at the previous point
    us: Any  # [B, M, ...]
    vs: Any  # [B, M, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchDEQBroyden(Broyden):
    """Quasi-Newton root finding for g(z) = f(z) - z with H = -I + sum_j u_j v_j^T, for `preset="torchdeq"`.

    After a step dz with change dg of the residual: v = H^T dz, u = (dz - H dg) / (v . dg), and the next direction is
    -H g. With a memory as long as the solve it is `Broyden`, at twice the memory. With a shorter one, a sum that has lost
    its oldest term satisfies no secant condition any more, and convergence is often lost too.

    Attributes:
      memory: rank-one terms kept; None keeps one for every step.
    """

    memory: int | None = None

    def init(self, z):
        longest = max(1, self.max_steps - 1)
        memory = longest if self.memory is None else min(self.memory, longest)
        zeros, history = jax.tree.map(jnp.zeros_like, z), batched.new_history(z, memory)
        return _State(jnp.zeros((), jnp.int32), zeros, zeros, history, history)

    def step(self, f, z, f_z, state):
        residual = batched.subtract(f_z, z)
        dz, dg = batched.subtract(z, state.z), batched.subtract(residual, state.residual)
        v = _apply(state.vs, state.us, dz)
        curvature = batched.inner(v, dg)
        # The first evaluation has no step behind it; a finished sample has an empty one. Both add nothing.
        usable = (state.count > 0) & (curvature != 0) & jnp.isfinite(curvature)
        reciprocal = jnp.where(usable, 1 / jnp.where(usable, curvature, 1), 0)
        u = batched.scaled(reciprocal, batched.subtract(dz, _apply(state.us, state.vs, dg)))

        memory = jax.tree.leaves(state.us)[0].shape[1]
        slot = jnp.maximum(state.count - 1, 0) % memory
        us, vs = (batched.write_after(u, history, slot, x) for history, x in ((state.us, u), (state.vs, v)))
        direction = jax.tree.map(jnp.negative, _apply(us, vs, residual))
        length = jnp.ones_like(curvature)
        if self.line_search is not None:
            length = step_length(f, z, residual, direction, self.line_search)
        z_next = batched.add_scaled(z, length, direction)
        return z_next, _State(state.count + 1, z, residual, us, vs)


def _apply(left, right, x):
    """(-I + sum_j left_j right_j^T) x."""
    return batched.subtract(batched.combine(left, batched.coefficients(right, x)), x)
