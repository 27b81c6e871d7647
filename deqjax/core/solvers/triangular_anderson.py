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
    images: Any  # [B, N, T, ...] past f(x), N = memory - 1 as in `Anderson`
    residuals: Any  # [B, N, T, ...] past f(x) - x
    gram: jax.Array  # [N, N, B, T] inner products of the residuals of each slot
    kept: jax.Array  # [N, B, T] entries in use
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
        require(self.memory >= 2, "memory", self.memory, "2 or more for trajectories")
        require(self.kind == "II", "kind", self.kind, '"II" for trajectories')
        require(self.safeguard is None, "safeguard", self.safeguard, "None for trajectories")

    def init(self, z):
        N, zeros = self.memory - 1, jnp.zeros_like(_per_slot(z, z))
        images, residuals = batched.new_history(z, N), batched.new_history(z, N)
        per_entry = jnp.repeat(zeros[None], N, axis=0)
        gram = jnp.repeat(per_entry[None], N, axis=0)
        return _State(jnp.zeros((), jnp.int32), images, residuals, gram, per_entry != 0, zeros[:, 0].astype(jnp.int32))

    def step(self, f, z, f_z, state):
        N = self.memory - 1
        oldest = state.count % N
        residual = batched.subtract(f_z, z)
        row = jax.vmap(_per_slot, in_axes=(1, None))(state.residuals, residual)
        corner = _per_slot(residual, residual)

        B, T = corner.shape
        along = lambda x: jax.lax.cumsum(x, axis=x.ndim - 1, reverse=self.reverse)  # noqa: E731
        products = [along(x) if self.weights == "prefix" else x for x in (state.gram, row, corner)]
        flat = [x.reshape(*x.shape[:-2], B * T) for x in (*products, state.kept)]
        weights = self._least_squares(*flat, oldest).reshape(N, B, T)
        exact = jnp.minimum(state.exact + 1, T)
        position = jnp.arange(T, dtype=exact.dtype)[::-1] if self.reverse else jnp.arange(T, dtype=exact.dtype)
        settled = (position[None] < exact[:, None])[None]
        if self.weights == "prefix":
            weights = jnp.where(settled, 0, weights)

        newest = 1 - jnp.sum(weights, axis=0, keepdims=True)
        with_newest = lambda history, x: _combine(history, weights, x, newest)  # noqa: E731
        combined = with_newest(state.images, f_z)
        if not (isinstance(self.damping, (int, float)) and self.damping == 1):
            pull = jnp.where(state.count > 0, 1 - jnp.asarray(self.damping, weights.dtype), 0)
            if self.weights == "prefix":
                # Damped, an exact slot would be pulled back to where it was before.
                pull = jnp.where(settled, 0, pull)
            pulled = _combine(state.residuals, weights * pull, residual, newest * pull)
            combined = jax.tree.map(lambda x, r: x - r, combined, pulled)
        return combined, _State(
            state.count + 1,
            batched.write_after(combined, state.images, oldest, f_z),
            batched.write_after(combined, state.residuals, oldest, residual),
            state.gram.at[oldest].set(row).at[:, oldest].set(row).at[oldest, oldest].set(corner),
            state.kept.at[oldest].set(True),
            exact,
        )

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


def _combine(history, weights_NBT, state, weights_1BT) -> State:
    """The sum of a history's entries and a state, each slot with its own weights."""

    def weighted(h, x):
        spread = lambda w: jnp.moveaxis(w, 0, 1).reshape(*h.shape[:1], -1, h.shape[2], *(1,) * (h.ndim - 3))  # noqa: E731
        older = jnp.sum(spread(weights_NBT) * h.astype(weights_NBT.dtype), axis=1)
        return (older + spread(weights_1BT)[:, 0] * x.astype(weights_NBT.dtype)).astype(x.dtype)

    return jax.tree.map(weighted, history, state)
