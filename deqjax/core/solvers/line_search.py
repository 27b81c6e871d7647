"""Backtracking on the squared residual, for root finders that know a direction."""

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, State
from deqjax.core.hoist import hoist


def step_length(f, z: State, residual: State, direction: State, scope: str) -> Float[Array, " B"]:
    """A step s along `direction` that lowers phi(s) = |g(z + s d)|^2: quadratic, then cubic interpolation.

    (Nocedal and Wright, section 3.5.) The slope at 0 is taken as -phi(0), exact for a Newton direction up to a factor of
    two. Every trial is an evaluation of f.

    Args:
      f: the map, g(z) = f(z) - z.
      z: the point, `residual` = g(z) there.
      direction: where to go.
      scope: "sample" chooses a step for each sample, "batch" one for all by the sum of their phi.

    Returns:
      One step per sample, 1 where no shorter one is good enough; to differentiation a constant.
    """
    z, residual, direction = jax.lax.stop_gradient((z, residual, direction))
    f = hoist(f, z).detached()
    sufficient, shortest = 1e-4, 1e-2

    def merit(s):
        point = batched.add_scaled(z, s, direction)
        squares = jnp.square(batched.norm(batched.subtract(f(point), point)))
        if scope == "batch":
            squares = jnp.broadcast_to(jnp.sum(squares), squares.shape)
        return jnp.where(jnp.isfinite(squares), squares, jnp.inf)

    phi_0 = jnp.square(batched.norm(residual))
    one = jnp.ones_like(phi_0)
    if scope == "batch":
        phi_0 = jnp.broadcast_to(jnp.sum(phi_0), phi_0.shape)
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
