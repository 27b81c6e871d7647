"""Broyden's method ("good" update) with limited memory."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import State
from deqjax.core.solvers.base import Solver, require
from deqjax.core.solvers.line_search import step_length


class BroydenState(NamedTuple):
    """The estimate H = -I + sum_j u_j v_j^T of the inverse Jacobian of g, and the last step, which will improve it."""

    count: jax.Array  # evaluations so far
    z: Any  # previous point
    residual: Any  # g at the previous point
    direction: Any  # -H g at the previous point
    length: jax.Array  # [B] of the step taken along it
    us: Any  # [B, M, ...]
    vs: Any  # [B, M, ...]
    kept: jax.Array  # [M] slots in use


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
        length = jnp.ones_like(batched.norm(z))
        history, none = batched.new_history(z, memory), jnp.zeros((memory,), bool)
        return BroydenState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, length, history, history, none)

    def step(self, f, z, f_z, state):
        memory = state.kept.shape[0]
        slot = jnp.maximum(state.count - 1, 0) % memory
        here = jnp.arange(memory, dtype=jnp.int32) == slot
        forget = (slot == 0) if self.when_full == "restart" else jnp.zeros((), bool)
        kept = state.kept & ~forget

        residual = batched.subtract(f_z, z)
        dz, dg = batched.subtract(z, state.z), batched.subtract(residual, state.residual)
        weights = jnp.where(kept[None], batched.coefficients(state.vs, residual), 0)
        H_g = _apply(state.us, weights, residual)
        v = _apply(state.vs, jnp.where(kept[None], batched.coefficients(state.us, dz), 0), dz)
        curvature = batched.inner(v, dg)
        # The first evaluation has no step behind it; a finished sample has an empty one. Both add nothing.
        usable = (state.count > 0) & (curvature != 0) & jnp.isfinite(curvature)
        # dz - H dg without forming H dg: before the step H g was -direction (or, H being forgotten, is -g).
        numerator = batched.add_scaled(jax.tree.map(jnp.negative, H_g), state.length - 1, state.direction)
        numerator = jax.tree.map(lambda n, a, b: jnp.where(forget, a + b, n), numerator, dz, dg)
        u = batched.add_scaled(jax.tree.map(jnp.zeros_like, z), _reciprocal(curvature, usable), numerator)

        # The next direction is by the improved estimate: one term more, and without the one that it replaces.
        if self.when_full == "overwrite":
            replaced = jnp.sum(jnp.where(here[None], weights, 0), axis=1)
            H_g = batched.add_scaled(H_g, -replaced, batched.read(state.us, slot))
        H_g = batched.add_scaled(H_g, batched.inner(v, residual), u)
        direction = jax.tree.map(jnp.negative, H_g)
        us, vs = (batched.write_after(direction, history, slot, x) for history, x in ((state.us, u), (state.vs, v)))

        if self.line_search is None:
            length = state.length
            z_next = jax.tree.map(jnp.add, z, direction)
        else:
            length = step_length(f, *jax.lax.stop_gradient((z, residual, direction)), self.line_search)
            z_next = batched.add_scaled(z, length, direction)
        return z_next, BroydenState(state.count + 1, z, residual, direction, length, us, vs, kept | here)


def inverse_transposed(state: BroydenState, c: State) -> State:
    """H^T c."""
    return _apply(state.vs, jnp.where(state.kept[None], batched.coefficients(state.us, c), 0), c)


def _apply(left, coefficients_BM, x):
    """(-I + sum_j left_j right_j^T) x, with the products right_j . x given."""
    return batched.subtract(batched.combine(left, coefficients_BM), x)


def _reciprocal(x, usable):
    return jnp.where(usable, 1 / jnp.where(usable, x, 1), 0)
