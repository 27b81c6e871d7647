"""Broyden's method ("good" update) with limited memory."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.solvers.base import Solver, require


class _State(NamedTuple):
    count: jax.Array  # evaluations so far
    z: Any  # previous point
    residual: Any  # g at the previous point
    us: Any  # [B, M, ...]
    vs: Any  # [B, M, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Quasi-Newton root finding for g(z) = f(z) - z with an estimate H = -I + sum_j u_j v_j^T of the inverse Jacobian.

    After a step dz with change dg of the residual: v = H^T dz, u = (dz - H dg) / (v . dg), and the next direction is
    -H g. (Broyden 1965, in the inverse form by Sherman and Morrison.)

    Attributes:
      memory: rank-one terms kept; None keeps one for every step.
      when_full: "restart" forgets everything and begins anew; "overwrite" replaces the oldest term (the original's
        choice, which loses convergence when the memory is shorter than the solve).
      line_search: None takes full steps. "sample" looks for each sample's step length that lowers its residual,
        "batch" for one common to all (as TorchDEQ). A search costs further evaluations of f.
    """

    memory: int | None = 20
    when_full: str = "restart"
    line_search: str | None = None

    # A root finder moves the point itself; f(z) need not be closer to the solution than z.
    candidate: ClassVar[str] = "point"

    def __post_init__(self):
        super().__post_init__()
        require(self.memory is None or self.memory >= 1, "memory", self.memory, "None, or 1 or more")
        require(self.when_full in ("restart", "overwrite"), "when_full", self.when_full, '"restart" or "overwrite"')
        require(self.line_search in (None, "sample", "batch"), "line_search", self.line_search, 'None, "sample" or "batch"')

    def init(self, z):
        memory = max(1, self.max_steps - 1)
        if self.memory is not None:
            memory = min(memory, self.memory)
        zeros = jax.tree.map(jnp.zeros_like, z)
        return _State(jnp.zeros((), jnp.int32), zeros, zeros, batched.new_history(z, memory), batched.new_history(z, memory))

    def step(self, f, z, f_z, state):
        residual = batched.subtract(f_z, z)
        memory = jax.tree.leaves(state.us)[0].shape[1]
        updates = jnp.maximum(state.count - 1, 0)  # rank-one terms made before this one
        slot = updates % memory
        slots = jnp.arange(memory, dtype=jnp.int32)
        if self.when_full == "restart":
            kept = kept_after = slots < slot
        else:
            kept = slots < jnp.minimum(updates, memory)
            kept_after = kept & (slots != slot)

        dz, dg = batched.subtract(z, state.z), batched.subtract(residual, state.residual)
        vs_g = batched.coefficients(state.vs, residual)
        H_dg = _apply(state.us, jnp.where(kept[None], batched.coefficients(state.vs, dg), 0), dg)
        v = _apply(state.vs, jnp.where(kept[None], batched.coefficients(state.us, dz), 0), dz)
        curvature = batched.inner(v, dg)
        # The first evaluation has no step behind it; a finished sample has an empty one. Both add nothing.
        usable = (state.count > 0) & (curvature != 0) & jnp.isfinite(curvature)
        u = batched.add_scaled(jax.tree.map(jnp.zeros_like, z), _reciprocal(curvature, usable), batched.subtract(dz, H_dg))

        us, vs = batched.write(state.us, slot, u), batched.write(state.vs, slot, v)
        H_g = _apply(state.us, jnp.where(kept_after[None], vs_g, 0), residual)
        H_g = batched.add_scaled(H_g, batched.inner(v, residual), u)
        direction = jax.tree.map(jnp.negative, H_g)

        if self.line_search is None:
            z_next = jax.tree.map(jnp.add, z, direction)
        else:
            length = _step_length(f, *jax.lax.stop_gradient((z, residual, direction)), self.line_search)
            z_next = batched.add_scaled(z, length, direction)
        return z_next, _State(state.count + 1, z, residual, us, vs)


def _apply(left, coefficients_BM, x):
    """(-I + sum_j left_j right_j^T) x, with the products right_j . x given."""
    return batched.subtract(batched.combine(left, coefficients_BM), x)


def _reciprocal(x, usable):
    return jnp.where(usable, 1 / jnp.where(usable, x, 1), 0)


def _step_length(f, z, residual, direction, scope):
    """Backtracking by quadratic, then cubic interpolation of phi(s) = |g(z + s d)|^2 (Nocedal and Wright, section 3.5).

    The slope at 0 is taken as -phi(0), exact for a Newton direction up to a factor of two. Returns one step per sample.
    """
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
    s_0, s_1 = one, phi_0 / (2 * phi_1)

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
