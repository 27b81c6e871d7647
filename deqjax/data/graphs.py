"""Graphs as NumPy arrays: their form, their faults, their normalised adjacency and its spectral radius.

A weight on an edge from i to j is the entry A[i, j] of the adjacency matrix: information moves from i to j.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from deqjax.data.errors import DataError

# What the originals add to a measured radius, so that rounding does not leave the ball of well-posed weights.
RADIUS_MARGIN = 1e-5
# Up to here eigenvalues are computed densely.
_DENSE = 400


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph of N nodes and E directed edges.

    Attributes:
      nodes: features `[N, F]`; None stands for the identity matrix (each node its own feature).
      senders, receivers: `[E]` ends of the edges.
      weights: `[E]`.
      n_nodes: N.
      labels: `[N]` classes or `[N, C]` zeros and ones of the nodes, or the class of the whole graph.
      radius: spectral radius of |A|, where it is known.
    """

    nodes: np.ndarray | None
    senders: np.ndarray
    receivers: np.ndarray
    weights: np.ndarray
    n_nodes: int
    labels: np.ndarray | int | None = None
    radius: float | None = None

    @property
    def n_edges(self) -> int:
        return len(self.senders)

    def adjacency(self) -> scipy.sparse.csr_array:
        """A `[N, N]`; parallel edges add up."""
        entries = (self.weights, (self.senders, self.receivers))
        return scipy.sparse.csr_array(entries, shape=(self.n_nodes, self.n_nodes), dtype=np.float64)

    def with_adjacency(self, matrix: scipy.sparse.sparray) -> "Graph":
        """The same nodes with the edges of another matrix, sorted by receiver."""
        by_receiver = scipy.sparse.csr_array(matrix.T)
        by_receiver.sort_indices()
        receivers = np.repeat(np.arange(self.n_nodes, dtype=np.int32), np.diff(by_receiver.indptr))
        senders, weights = by_receiver.indices.astype(np.int32), by_receiver.data
        return dataclasses.replace(self, senders=senders, receivers=receivers, weights=weights, radius=None)


def check_graph(graph: Graph, name: str, n_classes: int | None = None) -> Graph:
    """The graph itself, if nothing is wrong with it.

    Args:
      graph: to be checked.
      name: how messages call it.
      n_classes: labels are classes 0 to n_classes - 1 (those of a matrix are 0 or 1 in any case).

    Raises:
      DataError: it has no node, an edge to a node that does not exist, numbers that are not finite, arrays that do not
        belong together, or a label outside the range.
    """
    N = graph.n_nodes
    if N < 1:
        raise DataError(f"{name} has no node: leave such a graph out, there is nothing to compute on it.")
    if not len(graph.senders) == len(graph.receivers) == len(graph.weights):
        sizes = len(graph.senders), len(graph.receivers), len(graph.weights)
        raise DataError(f"{name}: senders, receivers and weights must be equally many, they are {sizes}.")
    for end in ("senders", "receivers"):
        index = np.asarray(getattr(graph, end))
        wrong = np.flatnonzero((index < 0) | (index >= N))
        if len(wrong):
            raise DataError(
                f"{name}: edge {wrong[0]} has {end[:-1]} {index[wrong[0]]}, but the nodes are 0 to {N - 1} "
                f"({len(wrong)} such edges). Files that count from 1 need 1 subtracted."
            )
    for what in ("nodes", "weights"):
        values = getattr(graph, what)
        if values is not None and not np.all(np.isfinite(values)):
            row = np.argwhere(~np.isfinite(values))[0]
            kind = "feature" if what == "nodes" else "edge weight"
            raise DataError(f"{name}: {kind} {tuple(map(int, row))} is {values[tuple(row)]}; replace what is missing first.")
    if graph.nodes is not None and np.ndim(graph.nodes) != 2:
        raise DataError(f"{name}: features of the shape {np.shape(graph.nodes)}, must be [{N}, F].")
    if graph.nodes is not None and len(graph.nodes) != N:
        raise DataError(f"{name}: features of {len(graph.nodes)} nodes for a graph of {N}.")
    _check_labels(graph, name, n_classes)
    return graph


def _check_labels(graph, name, n_classes):
    if graph.labels is None:
        return
    labels = np.asarray(graph.labels)
    if labels.ndim and len(labels) != graph.n_nodes:
        raise DataError(f"{name}: labels of {len(labels)} nodes for a graph of {graph.n_nodes}.")
    if labels.ndim == 2:
        n_classes = 2
    if n_classes is not None and (wrong := labels[~np.isin(labels, np.arange(n_classes))].tolist()):
        raise DataError(f"{name}: label {wrong[0]} is outside 0 to {n_classes - 1}.")


# Normalisations ------------------------------------------------------------------------------------------------------


def augmented(graph: Graph) -> Graph:
    """With the adjacency D^-1/2 (A + I) D^-1/2, D the row sums of A + I ("AugNormAdj").

    Of weights that are not negative its spectral radius is 1, directed or not: that of D^-1 (A + I), whose rows sum to 1.
    """
    found = graph.with_adjacency(_symmetric(graph.adjacency() + scipy.sparse.eye_array(graph.n_nodes)))
    return dataclasses.replace(found, radius=1.0 if np.all(graph.weights >= 0) else None)


def symmetric(graph: Graph) -> Graph:
    """With the adjacency D^-1/2 A D^-1/2, D the row sums of A; nodes without edges get none."""
    return graph.with_adjacency(_symmetric(graph.adjacency()))


def row_normalized(matrix: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; rows that sum to zero stay."""
    sums = matrix.sum(axis=1, keepdims=True)
    return matrix / np.where(sums == 0, 1, sums)


def _symmetric(matrix):
    degree = np.asarray(matrix.sum(axis=1)).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(degree > 0, degree**-0.5, 0)
    return scipy.sparse.diags_array(scale) @ matrix @ scipy.sparse.diags_array(scale)


# The spectral radius -------------------------------------------------------------------------------------------------


def spectral_radius(graph: Graph) -> float:
    """The largest modulus of the eigenvalues of |A|.

    That of the strongest connected part: |A| is block-triangular in its strongly connected parts, so that a directed chain
    has the largest weight of a self loop, and no eigenvalue routine is asked about a nilpotent matrix.
    """
    matrix = abs(graph.adjacency())
    _, part = scipy.sparse.csgraph.connected_components(matrix, directed=True, connection="strong")
    radius = float(matrix.diagonal().max(initial=0.0))
    sizes = np.bincount(part)
    order = np.argsort(part, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for k in np.flatnonzero(sizes > 1):
        index = order[starts[k] : starts[k + 1]]
        block = matrix[index][:, index]
        # No eigenvalue exceeds the largest row or column sum, and most parts of a data set need no more than that.
        bound = min(block.sum(axis=0).max(), block.sum(axis=1).max())
        if bound > radius:
            radius = max(radius, _irreducible_radius(block))
    return radius


def _irreducible_radius(block) -> float:
    if block.shape[0] <= _DENSE:
        return float(np.abs(np.linalg.eigvals(block.toarray())).max())
    start = np.ones(block.shape[0])
    difference = abs(block - block.T)
    try:
        if difference.nnz == 0 or difference.max() <= 1e-12 * block.max():
            # By Perron and Frobenius the eigenvalue of largest modulus is positive.
            return float(scipy.sparse.linalg.eigsh(block, k=1, which="LA", v0=start, return_eigenvectors=False)[0])
        return float(np.abs(scipy.sparse.linalg.eigs(block, k=1, which="LM", v0=start, return_eigenvectors=False)[0]))
    except scipy.sparse.linalg.ArpackNoConvergence:
        return _radius_bound(block)


def _radius_bound(block, iterations: int = 1000) -> float:
    """An upper bound: the largest (A x)_i / x_i of any positive x (Collatz and Wielandt), here one of the power method.

    For long directed cycles, whose eigenvalues all have the same modulus or nearly so.
    """
    x, shift = np.ones(block.shape[0]), block.sum(axis=1).mean()
    for _ in range(iterations):
        x = block @ x + shift * x
        x /= x.max()
    return float((block @ x / x).max())


def with_radius(graph: Graph) -> Graph:
    """The graph with its spectral radius measured, and the originals' margin added."""
    return dataclasses.replace(graph, radius=spectral_radius(graph) + RADIUS_MARGIN)


def check_well_posed(graphs: Sequence[Graph], kappa: float, radius: float) -> None:
    """Raises DataError unless every equation X = relu(W X A + B) with |W|_inf <= kappa / radius has just one solution.

    Args:
      graphs: those whose own radius is not known have it measured.
      kappa: the bound.
      radius: what is taken for the spectral radius of all graphs.
    """
    for number, graph in enumerate(graphs):
        measured = spectral_radius(graph) if graph.radius is None else graph.radius
        if kappa * measured > radius * (1 - 1e-9):
            raise DataError(
                f"not well-posed: kappa={kappa} is not below {radius / measured:.6g}, which is {radius:.6g} over "
                f"{measured:.6g}, the spectral radius of graph {number}'s adjacency. W X A may then grow without bound and "
                "the layer has no unique equilibrium. Lower kappa, normalise the adjacency, or leave the radius to be measured "
                "(model.spectral_radius = None in the config file)."
            )


# Parts ---------------------------------------------------------------------------------------------------------------


def components(graph: Graph) -> list[tuple[np.ndarray, Graph]]:
    """The connected components, each with the numbers of its nodes in the whole.

    Nothing passes between them, so that they may be solved, stopped and spread over devices one by one.
    """
    matrix = graph.adjacency()
    n_parts, part = scipy.sparse.csgraph.connected_components(matrix, directed=False)
    position = np.zeros(graph.n_nodes, np.int32)
    found = []
    edge_part = part[graph.receivers]
    for k in range(n_parts):
        index, edges = np.flatnonzero(part == k), np.flatnonzero(edge_part == k)
        position[index] = np.arange(len(index))
        labels = graph.labels[index] if np.ndim(graph.labels) else graph.labels
        found.append(
            (
                index,
                Graph(
                    nodes=None if graph.nodes is None else graph.nodes[index],
                    senders=position[graph.senders[edges]],
                    receivers=position[graph.receivers[edges]],
                    weights=graph.weights[edges],
                    n_nodes=len(index),
                    labels=labels,
                ),
            )
        )
    return found
