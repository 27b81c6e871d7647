"""Broyden's method ("good" update) with limited memory, in product form."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import State
from deqjax.core.small_systems import solve_lower
from deqjax.core.solvers.base import Solver, require, require_count
from deqjax.core.solvers.line_search import step_length


class BroydenState(NamedTuple):
    """The directions d_0, d_1, ... since the method last began anew; the inverse is made of them and of one more state."""

    used: jax.Array  # how many there are
    directions: Any  # [B, M, ...]
    gram: jax.Array  # [M, M, B] their inner products
    lengths: jax.Array  # [M, B] of the steps along them
    excess: Any  # d_0 - g_0, what d_0 has from before the method began anew
    excess_products: jax.Array  # [M, B] its inner products with the directions
    kept: jax.Array  # [M, B] slots in use
    square: jax.Array  # [B] |g|^2 where the last direction was taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Quasi-Newton root finding for g(z) = f(z) - z (Broyden 1965), with one state of memory per step.

    It steps by l_j d_j along d_j = -H_j g_j. With H_0 = -I, the secant updates of the inverse Jacobian multiply:
    H_k = E_{k-1} ... E_0 H_0, E_j = I + (d_{j+1} - (1 - l_j) d_j) d_j^T / |d_j|^2
    (Kelley 1995, section 7.3, for full steps). So -H_k g is a combination of g and the directions so far, and its weights
    follow from inner products. Once the memory is full, the method begins anew with its last direction as d_0. That one is
    not g_0, and with e = d_0 - g_0 its factor is E_0 = I + (d_1 - (1 - l_0) d_0 + e) d_0^T / (d_0 . g_0).

    Attributes:
      memory: directions kept; None keeps one for every step.
      line_search: None takes full steps. "sample" looks for each sample's step length that lowers its residual,
        "batch" for one common to all (as TorchDEQ). A search costs further evaluations of f.
    """

    memory: int | None = 10
    line_search: str | None = None

    # A root finder moves the point itself; f(z) need not be closer to the solution than z.
    candidate: ClassVar[str] = "point"

    def __post_init__(self):
        super().__post_init__()
        if self.memory is not None:
            require_count("memory", self.memory, 1)
        require(self.line_search in (None, "sample", "batch"), "line_search", self.line_search, 'None, "sample" or "batch"')

    def init(self, z):
        M = max(1, self.max_steps if self.memory is None else min(self.memory, self.max_steps))
        zeros = jnp.zeros_like(batched.norm(z))
        per_slot = jnp.repeat(zeros[None], M, axis=0)
        gram, excess = jnp.repeat(per_slot[None], M, axis=0), jax.tree.map(jnp.zeros_like, z)
        none, history = per_slot != 0, batched.new_history(z, M)
        return BroydenState(jnp.zeros((), jnp.int32), history, gram, per_slot, excess, per_slot, none, zeros)

    def step(self, f, z, f_z, state):
        M = state.lengths.shape[0]
        residual = batched.subtract(f_z, z)
        square = batched.inner(residual, residual)
        newest = jnp.maximum(state.used - 1, 0)
        products = jnp.where(state.kept, batched.coefficients(state.directions, residual).T, 0)
        t = solve_lower(_factors(state), products)

        # A finished sample stands still. A step of length 0 says so, and leaves the inverse as it is.
        still = (square == state.square) & (t[newest] > 0.5)
        lengths = state.lengths.at[newest].set(jnp.where(still, 0, state.lengths[newest]))
        t = t.at[newest].set(jnp.where(still, 0, t[newest]))
        denominator = 1 - t[newest]
        usable = (denominator != 0) & jnp.isfinite(denominator)
        kept = state.kept & usable[None]
        scale = jnp.where(usable, 1 / jnp.where(usable, denominator, 1), 1)
        weights = jnp.where(kept, jnp.roll(t, 1, axis=0).at[0].set(0) - (1 - lengths) * t, 0)
        direction = jax.tree.map(jnp.add, residual, batched.combine(state.directions, weights.T))
        direction = batched.scaled(scale, batched.add_scaled(direction, jnp.where(usable, t[0], 0), state.excess))
        if self.line_search is None:
            length = jnp.ones_like(square)
            z_next = jax.tree.map(jnp.add, z, direction)
        else:
            length = step_length(f, z, residual, direction, self.line_search)
            z_next = batched.add_scaled(z, length, direction)

        anew = state.used == M
        slot = jnp.where(anew, 0, state.used)
        excess = jax.tree.map(lambda e, d, g: jnp.where(anew, d - g, e), state.excess, direction, residual)
        row = batched.coefficients(state.directions, direction).at[:, slot].set(batched.inner(direction, direction)).T
        state = BroydenState(
            used=slot + 1,
            directions=batched.write_after(row.T, state.directions, slot, direction),
            gram=state.gram.at[slot].set(row).at[:, slot].set(row),
            lengths=lengths.at[slot].set(length),
            excess=excess,
            excess_products=state.excess_products.at[slot].set(batched.inner(excess, direction)),
            kept=(kept & ~anew).at[slot].set(True),
            square=square,
        )
        return z_next, state


def inverse_transposed(state: BroydenState, c: State) -> State:
    """H^T c, H being the estimate that gave the last direction; -c where the method has just begun anew."""
    slots = jnp.arange(state.lengths.shape[0], dtype=jnp.int32)[:, None]
    products = jnp.where(state.kept, batched.coefficients(state.directions, c).T, 0)
    ahead = jnp.roll(products, -1, axis=0)
    of_excess = jnp.where(slots == 0, batched.inner(state.excess, c)[None], 0)
    # The last direction has no factor yet.
    rhs = jnp.where(state.kept & (slots < state.used - 1), ahead - (1 - state.lengths) * products + of_excess, 0)
    weights = solve_lower(_factors(state), rhs, transpose=True)
    return jax.tree.map(lambda c, d: -(c + d), c, batched.combine(state.directions, weights.T))


def _factors(state: BroydenState):
    """The triangular matrix T [M, M, B] with T t = (d_j . g)_j, where t_j scales (d_{j+1} - ...) in E_j ... E_0 g."""
    M = state.lengths.shape[0]
    column = jnp.arange(M, dtype=jnp.int32)[None, :, None]
    row = jnp.arange(M, dtype=jnp.int32)[:, None, None]
    used = state.kept[:, None] & state.kept[None]
    # d_i . (d_{j+1} - (1 - l_j) d_j + e), the last for the first factor alone; and |d_j|^2, or d_0 . g_0.
    of_excess = jnp.where(column == 0, state.excess_products[:, None], 0)
    below = (1 - state.lengths)[None] * state.gram - jnp.roll(state.gram, -1, axis=1) - of_excess
    diagonal = state.gram - of_excess
    # A slot not in use, or an empty direction, has a unit row.
    diagonal = jnp.where(used & (diagonal != 0), diagonal, 1)
    return jnp.where(row == column, diagonal, jnp.where(used & (row > column), below, 0))
