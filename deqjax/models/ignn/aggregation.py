"""Sums over neighbours, A^T Z: the one operation that moves information along edges.

Three ways to the same numbers, chosen here and nowhere else. The measurements behind the choice are made by
`python -m benchmarks.aggregation`.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from deqjax.core.annotations import Array, Float, Inexact, Int

METHODS = ("auto", "csr", "segment_sum", "dense")


@runtime_checkable
class Adjacency(Protocol):
    """A batch of adjacency matrices, ready for products."""

    def aggregate(self, z: Float[Array, "G N D"]) -> Float[Array, "G N D"]:
        """A^T z for every graph: each node gets the weighted sum over its in-neighbours. Linear in z, differentiable in z."""
        ...


def adjacency(
    senders: Int[Array, "G E"],
    receivers: Int[Array, "G E"],
    weights: Float[Array, "G E"],
    n_nodes: int,
    method: str = "auto",
) -> Adjacency:
    """Prepares the products of one forward pass; belongs to the injection. Weights are constants: they get no gradient.

    Args:
      senders, receivers: ends of the edges within each graph, in any order.
      weights: zero for padding.
      n_nodes: N.
      method: "csr" (compressed rows; on a CPU a native kernel), "segment_sum" (gather and scatter, everywhere, and split
        over devices by graph), "dense" (matrices `[G, N, N]`), or "auto".

    Raises:
      ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"aggregation={method!r}: must be one of {', '.join(map(repr, METHODS))}.")
    weights = jax.lax.stop_gradient(weights)
    if method == "auto":
        method = _choose(n_nodes)
    if method == "dense":
        return Dense.of(senders, receivers, weights, n_nodes)
    return (Compressed if method == "csr" else Segments).of(senders, receivers, weights, n_nodes)


def _choose(n_nodes: int) -> str:
    # The native kernel works on one device's whole batch; the scatter is what can be split over several.
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        return "csr"
    return "dense" if n_nodes <= 64 else "segment_sum"


class Segments(NamedTuple):
    """Gather, weigh, scatter."""

    senders: jax.Array  # [G, E]
    receivers: jax.Array
    weights: jax.Array

    @classmethod
    def of(cls, senders, receivers, weights, n_nodes):
        return cls(senders, receivers, weights)

    def aggregate(self, z):
        def of_graph(z, senders, receivers, weights):
            return jax.ops.segment_sum(weights[:, None] * z[senders], receivers, num_segments=z.shape[0])

        return jax.vmap(of_graph)(z, self.senders, self.receivers, self.weights.astype(z.dtype))


class Dense(NamedTuple):
    """Matrix products."""

    matrix: jax.Array  # [G, N, N]

    @classmethod
    def of(cls, senders, receivers, weights, n_nodes):
        empty = jnp.zeros((n_nodes, n_nodes), weights.dtype)
        fill = lambda senders, receivers, weights: empty.at[receivers, senders].add(weights)  # noqa: E731
        return cls(jax.vmap(fill)(senders, receivers, weights))

    def aggregate(self, z):
        return jnp.matmul(self.matrix.astype(z.dtype), z, precision=jax.lax.Precision.HIGHEST)


class Rows(NamedTuple):
    """The block-diagonal matrix of all graphs in compressed rows."""

    values: jax.Array  # [G * E]
    columns: jax.Array
    starts: jax.Array  # [G * N + 1]

    @classmethod
    def sorted(cls, rows, columns, values, n_rows):
        order = jnp.argsort(rows)
        starts = jnp.searchsorted(rows[order], jnp.arange(n_rows + 1, dtype=rows.dtype)).astype(jnp.int32)
        # The native kernel wants columns and starts of one integer type.
        return cls(values[order], columns[order].astype(jnp.int32), starts)

    def times(self, z: Inexact[Array, "M D"]) -> Inexact[Array, "M D"]:
        matrix = sparse.BCSR((self.values.astype(z.dtype), self.columns, self.starts), shape=(z.shape[0], z.shape[0]))
        return matrix @ z


class Compressed(NamedTuple):
    """Compressed rows of A^T, and of A for the gradient: the derivative that JAX would derive is a slow scatter."""

    into: Rows
    out_of: Rows

    @classmethod
    def of(cls, senders, receivers, weights, n_nodes):
        G = senders.shape[0]
        offset = n_nodes * jnp.arange(G, dtype=senders.dtype)[:, None]
        flat = (senders + offset).reshape(-1), (receivers + offset).reshape(-1)
        values = weights.reshape(-1)
        rows = [Rows.sorted(flat[end], flat[1 - end], values, G * n_nodes) for end in (1, 0)]
        return cls(*rows)

    def aggregate(self, z):
        # Of JAX's linear maps with a transpose of one's own, this alone can be mapped and differentiated in every mode. The
        # equation x = b in its name is never looked at.
        into, out_of = (lambda _, x, rows=rows: rows.times(x) for rows in self)
        return jax.lax.custom_linear_solve(lambda x: x, z.reshape(-1, z.shape[-1]), into, out_of).reshape(z.shape)
