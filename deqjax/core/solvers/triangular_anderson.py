"""Anderson acceleration for trajectories: states of which every slot depends on earlier slots alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Int, State
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import require


class _State(NamedTuple):
    count: jax.Array  # evaluations so far
    images: Any  # [B, M, T, ...] past f(x)
    residuals: Any  # [B, M, T, ...] past f(x) - x
    gram: jax.Array  # [M, M, B, T] inner products of the residuals of each slot
    kept: jax.Array  # [M, B, T] entries in use
    exact: jax.Array  # [B] leading slots that are exact whatever the tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriangularAnderson(Anderson):
    """Anderson acceleration that respects the order of time.

    The state's leaves are `[B, T, ...]`, and slot k of f(z) depends on slots before k only. Weights shared by all slots would
    let what is still far from its place at the end of the trajectory disturb its beginning. Here every slot has weights of its
    own, which minimise the residuals of itself and the slots before it (after Tang et al. 2024, arXiv 2402.09970, section 4).
    After i evaluations the first i slots are exact, as they are in the plain iteration, and are left as they are: so T
    evaluations always suffice, whatever f is.

    Attributes:
      weights: "prefix", as above, or "slot": those that minimise the slot's own residual, without that guarantee, as in the
        code of Pokle et al. (2022).
      reverse: slot k depends on later slots only, as in the adjoint of such a system.
    """

    memory: int = 4
    weights: str = "prefix"
    reverse: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self.weights in ("prefix", "slot"), "weights", self.weights, '"prefix" or "slot"')
        require(self.kind == "II", "kind", self.kind, '"II" for trajectories')
        require(self.safeguard is None, "safeguard", self.safeguard, "None for trajectories")

    def init(self, z):
        M, zeros = self.memory, jnp.zeros_like(_per_slot(z, z))
        images, residuals = batched.new_history(z, M), batched.new_history(z, M)
        per_entry = jnp.repeat(zeros[None], M, axis=0)
        gram = jnp.repeat(per_entry[None], M, axis=0)
        return _State(jnp.zeros((), jnp.int32), images, residuals, gram, per_entry != 0, zeros[:, 0].astype(jnp.int32))

    def step(self, f, z, f_z, state):
        M, entry = self.memory, state.count % self.memory
        residual = batched.subtract(f_z, z)
        row = jax.vmap(_per_slot, in_axes=(1, None))(state.residuals, residual).at[entry].set(_per_slot(residual, residual))
        gram = state.gram.at[entry].set(row).at[:, entry].set(row)
        kept = state.kept.at[entry].set(True)

        over_slots = jax.lax.cumsum(gram, axis=3, reverse=self.reverse) if self.weights == "prefix" else gram
        B, T = row.shape[1:]
        alpha = self._least_squares(over_slots.reshape(M, M, B * T), kept.reshape(M, B * T), entry).reshape(M, B, T)
        exact = jnp.minimum(state.exact + 1, T)
        if self.weights == "prefix":
            position = jnp.arange(T, dtype=exact.dtype)[::-1] if self.reverse else jnp.arange(T, dtype=exact.dtype)
            newest = (jnp.arange(M) == entry).astype(alpha.dtype)[:, None, None]
            is_exact = (position[None] < exact[:, None])[None]
            alpha = jnp.where(is_exact, newest, alpha)

        images, residuals = batched.write(state.images, entry, f_z), batched.write(state.residuals, entry, residual)
        combined = _combine(images, alpha)
        if not (isinstance(self.damping, (int, float)) and self.damping == 1):
            pull = jnp.where(state.count > 0, 1 - jnp.asarray(self.damping, alpha.dtype), 0)
            combined = jax.tree.map(lambda x, r: x - pull.astype(x.dtype) * r, combined, _combine(residuals, alpha))
        return combined, _State(state.count + 1, images, residuals, gram, kept, exact)

    def shift(self, state: _State, slots_B: Int[Array, " B"]) -> _State:
        """What the method remembers after a window over a longer trajectory has moved on by so many slots.

        The slots that enter at the window's end have no history, and make none for the others.
        """

        def moved(x, axis_B, axis_T):
            index = jnp.arange(x.shape[axis_T])[None] + slots_B[:, None]
            index = jnp.clip(index, 0, x.shape[axis_T] - 1)
            pick = lambda x, i: jnp.take(x, i, axis=axis_T - (axis_T > axis_B))  # noqa: E731
            return jax.vmap(pick, in_axes=(axis_B, 0), out_axes=axis_B)(x, index)

        T = state.kept.shape[2]
        stays = jnp.arange(T)[None] + slots_B[:, None] < T
        return _State(
            state.count,
            jax.tree.map(lambda x: moved(x, 0, 2), state.images),
            jax.tree.map(lambda x: moved(x, 0, 2), state.residuals),
            moved(state.gram, 2, 3),
            moved(state.kept, 1, 2) & stays[None],
            jnp.maximum(state.exact - slots_B, 0),
        )


def _per_slot(a: State, b: State) -> jax.Array:
    """Inner products of every slot over all leaves: `[B, T]`."""
    dtype = batched.accumulation_dtype(a)
    products = lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype), axis=tuple(range(2, x.ndim)))  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(products, a, b)))


def _combine(history, weights_MBT) -> State:
    """The sum over the history of its entries, each slot with its own weights."""

    def weighted(h):
        per_slot = jnp.moveaxis(weights_MBT, 0, 1)
        per_slot = per_slot.reshape(per_slot.shape + (1,) * (h.ndim - 3))
        return jnp.sum(per_slot * h.astype(weights_MBT.dtype), axis=1).astype(h.dtype)

    return jax.tree.map(weighted, history)
