"""Broyden's method as TorchDEQ limits its memory: a sum of rank-one terms, of which the newest replaces the oldest."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.solvers.broyden import Broyden
from deqjax.core.solvers.line_search import merit_along


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
            length = _step_length(f, z, residual, direction, self.line_search)
        z_next = batched.add_scaled(z, length, direction)
        return z_next, _State(state.count + 1, z, residual, us, vs)


def _apply(left, right, x):
    """(-I + sum_j left_j right_j^T) x."""
    return batched.subtract(batched.combine(left, batched.coefficients(right, x)), x)


def _step_length(f, z, residual, direction, scope):
    """TorchDEQ's line search. It takes no step before it has fitted a cubic, and the full one where a parabola asks for less
    than a hundredth."""
    z, residual, direction = jax.lax.stop_gradient((z, residual, direction))
    sufficient, shortest = 1e-4, 1e-2
    merit, phi_0 = merit_along(f, z, residual, direction, scope)
    one = jnp.ones_like(phi_0)
    slope = -phi_0
    phi_1 = merit(one)
    accepted = phi_1 <= phi_0 + sufficient * slope
    # Where f is not finite there is nothing to interpolate; half of the step is tried instead.
    s_0, s_1 = one, jnp.where(jnp.isfinite(phi_1), phi_0 / (2 * phi_1), 0.5)

    def open_(carry):
        _, s_1, _, _, accepted, _ = carry
        return jnp.any(~accepted & (s_1 > shortest))

    def interpolate(carry):
        s_0, s_1, phi_s0, phi_s1, accepted, result = carry
        active = ~accepted & (s_1 > shortest)
        r_0 = phi_s0 - phi_0 - slope * s_0
        r_1 = phi_s1 - phi_0 - slope * s_1
        scale = s_0**2 * s_1**2 * (s_1 - s_0)
        a = (s_0**2 * r_1 - s_1**2 * r_0) / scale
        b = (-(s_0**3) * r_1 + s_1**3 * r_0) / scale
        s_2 = (-b + jnp.sqrt(jnp.abs(b**2 - 3 * a * slope))) / (3 * a)
        s_2 = jnp.where(jnp.isfinite(phi_s0) & jnp.isfinite(phi_s1), s_2, s_1 / 2)
        s_2 = jnp.where(active, s_2, s_1)
        phi_s2 = merit(s_2)
        good = active & (phi_s2 <= phi_0 + sufficient * s_2 * slope)
        result = jnp.where(good, s_2, result)
        timid = ((s_1 - s_2) > s_1 / 2) | ((1 - s_2 / s_1) < 0.96)
        s_2 = jnp.where(timid & ~good, s_1 / 2, s_2)
        keep = lambda new, old: jnp.where(active, new, old)  # noqa: E731
        return keep(s_1, s_0), keep(s_2, s_1), keep(phi_s1, phi_s0), keep(phi_s2, phi_s1), accepted | good, result

    carry = (s_0, s_1, phi_1, merit(s_1), accepted, one)
    return jax.lax.while_loop(open_, interpolate, carry)[-1]
