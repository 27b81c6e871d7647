"""Per-sample linear algebra on states.

A state is a pytree whose leaves all begin with the batch axis B. The solvers see it as B independent vectors, each the
concatenation of that sample's entries over all leaves, without ever concatenating them: every operation here works
leaf by leaf, keeps each leaf's dtype and sharding, and accumulates in float32 or better.

Histories hold the last M states with the history axis second, `[B, M, ...]`, so that the contractions below are plain
batched matrix-vector products.
"""

import functools
import operator
import string

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Bool, Float, Inexact, Int, PyTree, Shaped, State

_HIGHEST = jax.lax.Precision.HIGHEST


def accumulation_dtype(state: PyTree):
    """The dtype of norms, inner products and small systems: the state's own, but at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(state)))


def batch_size(state: State) -> int:
    """B, the common length of the leading axis of every leaf."""
    return jax.tree.leaves(state)[0].shape[0]


def per_sample(values_B: Shaped[Array, " B"], leaf: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Reshapes one value per sample so that it broadcasts against a leaf `[B, ...]`."""
    return values_B.reshape(values_B.shape + (1,) * (leaf.ndim - 1))


def norm(state: State) -> Float[Array, " B"]:
    """Euclidean norm of every sample over all leaves: `[B]`."""
    dtype = accumulation_dtype(state)

    def squares(x):
        return jnp.sum(jnp.square(x.astype(dtype)), axis=tuple(range(1, x.ndim)))

    return jnp.sqrt(functools.reduce(operator.add, map(squares, jax.tree.leaves(state))))


def largest(state: State) -> Float[Array, " B"]:
    """The largest |entry| of every sample over all leaves: `[B]`."""
    dtype = accumulation_dtype(state)
    # A compiler takes seconds to find the maximum of a large constant, as the gradient of a sum is.
    state = jax.lax.optimization_barrier(state)
    sizes = (jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0).astype(dtype) for x in jax.tree.leaves(state))
    return functools.reduce(jnp.maximum, sizes)


def inner(a: State, b: State) -> Inexact[Array, " B"]:
    """Inner product of every sample over all leaves: `[B]`."""
    dtype = accumulation_dtype(a)

    def products(x, y):
        return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=tuple(range(1, x.ndim)))

    return functools.reduce(operator.add, map(products, jax.tree.leaves(a), jax.tree.leaves(b)))


def subtract(a: State, b: State) -> State:
    """`a - b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scaled(scale_B: Inexact[Array, " B"], a: State) -> State:
    """`scale * a` with one scale per sample."""
    return jax.tree.map(lambda x: (per_sample(scale_B, x) * x.astype(scale_B.dtype)).astype(x.dtype), a)


def add_scaled(a: State, scale_B: Inexact[Array, " B"], b: State) -> State:
    """`a + scale * b` with one scale per sample."""
    return jax.tree.map(lambda x, y: x + (per_sample(scale_B, y) * y.astype(scale_B.dtype)).astype(x.dtype), a, b)


def mix(a: State, b: State, weight: float | Array) -> State:
    """`(1 - weight) * a + weight * b`; `b` itself when the weight is the number 1."""
    if isinstance(weight, (int, float)) and weight == 1:
        return b
    return jax.tree.map(lambda x, y: x + jnp.asarray(weight, x.dtype) * (y - x), a, b)


def select(mask_B: Bool[Array, " B"], a: State, b: State) -> State:
    """`a` where the sample's mask is set, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(per_sample(mask_B, x), x, y), a, b)


def new_history(state: State, memory: int) -> PyTree[Inexact[Array, "B M ..."]]:
    """An empty history `[B, memory, ...]` of states like `state`."""
    # Broadcasting from the state, not from a bare shape, lets the buffer inherit its sharding.
    return jax.tree.map(lambda x: jnp.repeat(jnp.zeros_like(x)[:, None], memory, axis=1), state)


def write(history: PyTree[Inexact[Array, "B M ..."]], slot: Int[Array, ""], state: State) -> PyTree[Inexact[Array, "B M ..."]]:
    """The history with `state` in the given slot."""
    return jax.tree.map(lambda h, x: jax.lax.dynamic_update_index_in_dim(h, x, slot, axis=1), history, state)


def write_after(
    reads: PyTree, history: PyTree[Inexact[Array, "B M ..."]], slot: Int[Array, ""], state: State
) -> PyTree[Inexact[Array, "B M ..."]]:
    """Like `write`, but not before `reads`, a state that depends on the old history, is known.

    A compiler that may do the write first has to copy the whole history beforehand. So what is written is made to depend on
    the reads, by a condition that never holds, which the compiler does not know. It is one per sample, so that samples on
    different devices have nothing to tell each other.
    """
    first = _first_entries(reads)
    if not first:
        return write(history, slot, state)
    never_B = functools.reduce(operator.or_, (jnp.abs(x) > jnp.inf for x in first))
    return write(history, slot, select(never_B, jax.tree.map(jnp.zeros_like, state), state))


def interdependent(state: State) -> State:
    """The state itself; to differentiation, every leaf depends on all of them. Costs nothing once compiled."""
    first = _first_entries(state)
    if not first:
        return state
    total_B = functools.reduce(operator.add, (x.astype(accumulation_dtype(state)) for x in first))
    never = jnp.zeros((), bool)
    return jax.tree.map(lambda x: jnp.where(never, per_sample(total_B, x).astype(x.dtype), x), state)


def _first_entries(state):
    """One entry of every sample `[B]`, for each leaf that has any."""
    return [x[(slice(None), *(0,) * (x.ndim - 1))] for x in jax.tree.leaves(state) if 0 not in x.shape[1:]]


def coefficients(history: PyTree[Inexact[Array, "B M ..."]], state: State) -> Inexact[Array, "B M"]:
    """Inner products of every stored state with `state`: `[B, M]`."""
    dtype = accumulation_dtype(state)

    def products(h, x):
        axes = string.ascii_lowercase[: x.ndim - 1]
        return jnp.einsum(f"BM{axes},B{axes}->BM", h, x, precision=_HIGHEST, preferred_element_type=dtype)

    return functools.reduce(operator.add, map(products, jax.tree.leaves(history), jax.tree.leaves(state)))


def products(a: PyTree[Inexact[Array, "B M ..."]], b: PyTree[Inexact[Array, "B N ..."]]) -> Inexact[Array, "B M N"]:
    """Inner products of every state of one history with every state of another."""
    dtype = accumulation_dtype(a)

    def contracted(x, y):
        axes = string.ascii_lowercase[: x.ndim - 2]
        return jnp.einsum(f"BM{axes},BN{axes}->BMN", x, y, precision=_HIGHEST, preferred_element_type=dtype)

    return functools.reduce(operator.add, map(contracted, jax.tree.leaves(a), jax.tree.leaves(b)))


def combine(history: PyTree[Inexact[Array, "B M ..."]], weights_BM: Inexact[Array, "B M"]) -> State:
    """The weighted sum over the history axis: a state."""

    def weighted(h):
        axes = string.ascii_lowercase[: h.ndim - 2]
        total = jnp.einsum(
            f"BM,BM{axes}->B{axes}",
            weights_BM,
            h.astype(weights_BM.dtype),
            precision=_HIGHEST,
            preferred_element_type=weights_BM.dtype,
        )
        return total.astype(h.dtype)

    return jax.tree.map(weighted, history)
