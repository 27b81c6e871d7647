"""Batches of graphs with static shapes: each graph padded to its bucket, and the graphs stacked along a leading axis G.

The batch of G graphs is block-diagonal, with blocks of one size: graph g owns the rows g N to (g + 1) N - 1 of the flat
view. Axis 0 counts graphs, so the solvers of `deqjax.core` measure and stop every graph on its own, and a mesh splits a
batch by graph, as it does every other batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from deqjax.core.annotations import Array, Bool

try:
    import jraph
    from jraph import GraphsTuple
except ImportError as error:
    raise ImportError('graph networks need jraph: pip install "deqjax[graph]"') from error


class Bucket(NamedTuple):
    """A shape to pad to: nodes and edges per graph, at least one node of them padding."""

    n_node: int
    n_edge: int


def single(nodes, senders, receivers, weights, n_nodes: int, radius: float | None = None) -> GraphsTuple:
    """One graph in jraph's form, of NumPy arrays.

    Args:
      nodes: features `[N, F]`; None stands for the identity matrix.
      senders, receivers: `[E]`; information moves from sender to receiver.
      weights: `[E]`, the entries of the adjacency matrix.
      n_nodes: N.
      radius: spectral radius of the matrix of absolute weights, margin included; kept in `globals`.

    Raises:
      ValueError: arrays that do not belong together, numbers that are not finite, or an edge to a node that does not exist.
    """
    _check_single(nodes, senders, receivers, weights, n_nodes)
    weights = 1.0 * np.asarray(weights)  # all that is computed takes its dtype from them
    return GraphsTuple(
        nodes=nodes,
        edges=weights,
        senders=np.asarray(senders, np.int32),
        receivers=np.asarray(receivers, np.int32),
        n_node=np.array([n_nodes], np.int32),
        n_edge=np.array([len(senders)], np.int32),
        globals=None if radius is None else np.array([radius], weights.dtype),
    )


def _check_single(nodes, senders, receivers, weights, n_nodes):
    # No later step can: the kernels that sum over neighbours read whatever an index points to.
    if n_nodes < 1:
        raise ValueError("a graph without nodes: leave it out, there is nothing to compute on it.")
    if nodes is not None and (np.ndim(nodes) != 2 or len(nodes) != n_nodes):
        raise ValueError(f"nodes of the shape {np.shape(nodes)}: must be [{n_nodes}, features].")
    sizes = len(senders), len(receivers), len(weights)
    if len(set(sizes)) > 1:
        raise ValueError(f"senders, receivers and weights must be equally many, they are {sizes}.")
    for name, ends in (("senders", np.asarray(senders)), ("receivers", np.asarray(receivers))):
        if wrong := ends[(ends < 0) | (ends >= n_nodes)].tolist():
            raise ValueError(f"{name} name node {wrong[0]}, but the nodes are 0 to {n_nodes - 1}.")
    for name, values in (("nodes", nodes), ("weights", weights)):
        if values is not None and not np.all(np.isfinite(values)):
            raise ValueError(f"{name} hold NaN or infinity; replace what is missing first.")


def fit_buckets(graphs: Sequence[GraphsTuple], count: int = 4) -> list[Bucket]:
    """At most `count` nested shapes that hold all the graphs, their sizes growing by about the same factor.

    Any graph of one bucket fits in all that follow, so every batch has a shape among these and there are no more
    compilations than buckets.
    """
    sizes = sorted((int(g.n_node.sum()) + int(g.n_edge.sum()), int(g.n_node.sum()), int(g.n_edge.sum())) for g in graphs)
    totals = np.array([size[0] for size in sizes], float)
    bounds = np.geomspace(totals[0], totals[-1], count + 1)[1:]
    bounds[-1] = totals[-1]
    buckets = []
    for bound in bounds:
        inside = [size for size in sizes if size[0] <= bound]
        if inside:
            # One node more, for the padding.
            shape = Bucket(_rounded(max(s[1] for s in inside) + 1), _rounded(max(s[2] for s in inside)))
            if shape not in buckets:
                buckets.append(shape)
    return buckets


def _rounded(size: int, multiple: int = 8) -> int:
    return -(-size // multiple) * multiple


def choose_bucket(graphs: Sequence[GraphsTuple], buckets: Sequence[Bucket]) -> Bucket:
    """The first bucket that holds every one of the graphs.

    Raises:
      ValueError: none does.
    """
    n_node, n_edge = max(int(g.n_node.sum()) for g in graphs), max(int(g.n_edge.sum()) for g in graphs)
    for bucket in buckets:
        if n_node < bucket.n_node and n_edge <= bucket.n_edge:
            return bucket
    raise ValueError(f"a graph of {n_node} nodes and {n_edge} edges fits in none of the buckets {list(buckets)}.")


def stack(graphs: Sequence[GraphsTuple], bucket: Bucket, n_graphs: int | None = None) -> GraphsTuple:
    """The graphs padded to the bucket (`jraph.pad_with_graphs`) and stacked: every array gains the leading axis G.

    Args:
      graphs: single graphs.
      bucket: what to pad to.
      n_graphs: G; what is missing to it are empty graphs.

    Returns:
      nodes `[G, N, F]` or None, edges, senders, receivers `[G, E]`, n_node, n_edge and globals `[G, 2]`: each graph and its
      padding.
    """
    missing = 0 if n_graphs is None else n_graphs - len(graphs)
    if missing < 0:
        raise ValueError(f"{len(graphs)} graphs do not fit in a batch of {n_graphs}.")
    padded = [jraph.pad_with_graphs(graph, bucket.n_node, bucket.n_edge, 2) for graph in graphs]
    if missing:
        empty = GraphsTuple(*(None if x is None else np.zeros_like(x) for x in padded[0]))
        # All of an empty graph is padding. It has the radius of a real one, so that it asks nothing more of the weights.
        empty = empty._replace(
            n_node=np.array([0, bucket.n_node], np.int32),
            n_edge=np.array([0, bucket.n_edge], np.int32),
            globals=padded[0].globals,
        )
        padded += [empty] * missing
    return GraphsTuple(*(None if x[0] is None else np.stack(x) for x in zip(*padded, strict=True)))


def alone(graph: GraphsTuple) -> GraphsTuple:
    """A batch of one graph without padding, for a graph that is all there is, as one without features has to be."""
    batch = GraphsTuple(*(None if x is None else np.asarray(x)[None] for x in graph))
    padding = lambda sizes: np.concatenate([sizes, np.zeros_like(sizes)], axis=1)  # noqa: E731
    return batch._replace(n_node=padding(batch.n_node), n_edge=padding(batch.n_edge))


def node_mask(graphs: GraphsTuple, n_nodes: int) -> Bool[Array, "G N"]:
    """Which nodes are no padding."""
    return jnp.arange(n_nodes, dtype=jnp.int32)[None] < jnp.asarray(graphs.n_node)[:, :1]


def pad_rows(rows: Sequence[np.ndarray], n_rows: int, n_graphs: int | None = None) -> np.ndarray:
    """Arrays `[n, ...]`, one per graph, zero-padded and stacked to `[G, n_rows, ...]`: labels, or masks of nodes."""
    first = np.asarray(rows[0])
    out = np.zeros((n_graphs or len(rows), n_rows, *first.shape[1:]), first.dtype)
    for k, row in enumerate(rows):
        out[k, : len(row)] = row
    return out
