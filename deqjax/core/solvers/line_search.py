"""Backtracking on the squared residual, for root finders that know a direction."""

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, State
from deqjax.core.hoist import hoist


def step_length(f, z: State, residual: State, direction: State, scope: str) -> Float[Array, " B"]:
    """A step s along `direction` that lowers phi(s) = |g(z + s d)|^2 enough.

    A step too long is shortened to between a tenth and half of it, to where a parabola has its minimum, later a cubic
    (Dennis and Schnabel 1983, section 6.3.2). The slope at 0 is taken as -phi(0), exact for a Newton direction up to a factor
    of two. Every trial is an evaluation of f.

    Args:
      f: the map, g(z) = f(z) - z.
      z: the point, `residual` = g(z) there.
      direction: where to go.
      scope: "sample" chooses a step for each sample, "batch" one for all by the sum of their phi.

    Returns:
      One step per sample; to differentiation a constant. Where none is good enough before they get shorter than 0.01 it is the
      full one, since a direction may lead out of a local minimum, or the shortest tried if f is not finite there.
    """
    z, residual, direction = jax.lax.stop_gradient((z, residual, direction))
    sufficient, shortest = 1e-4, 1e-2
    merit, phi_0 = merit_along(f, z, residual, direction, scope)
    good = lambda s, phi: phi <= (1 - sufficient * s) * phi_0  # noqa: E731

    def unfinished(carry):
        s, _, _, _, accepted = carry
        return ~accepted & (s > shortest)

    def shorten(carry):
        s, phi, s_before, phi_before, accepted = carry
        # Above its tangent at 0 phi is b s^2 by the parabola through this trial, b s^2 + a s^3 by the cubic through both.
        above, above_before = phi - (1 - s) * phi_0, phi_before - (1 - s_before) * phi_0
        a = (above / s**2 - above_before / s_before**2) / (s - s_before)
        b = above / s**2 - a * s
        cubic = phi_0 / (b + jnp.sqrt(b**2 + 3 * a * phi_0))
        trial = jnp.where(jnp.isfinite(phi_before), cubic, phi_0 * s**2 / (2 * above))
        # Where f is not finite there is nothing to interpolate.
        trial = jnp.where(jnp.isfinite(phi) & jnp.isfinite(trial), jnp.clip(trial, 0.1 * s, 0.5 * s), 0.5 * s)
        active = unfinished(carry)
        trial = jnp.where(active, trial, s)
        phi_trial = merit(trial)
        keep = lambda new, old: jnp.where(active, new, old)  # noqa: E731
        return trial, keep(phi_trial, phi), keep(s, s_before), keep(phi, phi_before), accepted | good(trial, phi_trial)

    one = jnp.ones_like(phi_0)
    phi_1 = merit(one)
    # There is no trial before the first; a value that is not finite says so.
    carry = (one, phi_1, 2 * one, jnp.inf * one, good(one, phi_1) | ~jnp.isfinite(phi_0))
    s, _, _, _, accepted = jax.lax.while_loop(lambda carry: jnp.any(unfinished(carry)), shorten, carry)
    return jnp.where(accepted | ~jnp.isfinite(phi_1), s, 1)


def merit_along(f, z: State, residual: State, direction: State, scope: str):
    """phi as a function of one step per sample, infinite where f is not finite, and phi(0).

    With "batch" it is the sum over those samples that are finite to begin with.
    """
    f = hoist(f, z).detached()
    phi_0 = jnp.square(batched.norm(residual))

    def of_scope(phi):
        return phi if scope == "sample" else jnp.full_like(phi, jnp.sum(phi, where=jnp.isfinite(phi_0)))

    def merit(s):
        point = batched.add_scaled(z, s, direction)
        phi = of_scope(jnp.square(batched.norm(batched.subtract(f(point), point))))
        return jnp.where(jnp.isfinite(phi), phi, jnp.inf)

    return merit, of_scope(phi_0)
