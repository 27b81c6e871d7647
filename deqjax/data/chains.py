"""The chains task: which class a directed chain is of is known to its first node alone, and asked of all the others.

Gu et al. 2020 (arXiv 2009.06211), section 5.1. The draws are those of the original code, in its order, so that features
and splits are equal to its own at every size.
"""

from typing import NamedTuple

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, augmented, check_graph, row_normalized

PROTOCOLS = ("fixed", "percent")


class Chains(NamedTuple):
    """The graph of all chains, normalised, and the nodes of each split."""

    graph: Graph
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def chains(
    length: int = 10,
    n_classes: int = 2,
    n_chains: int | None = None,
    n_features: int = 100,
    noise: float = 0.0,
    protocol: str = "fixed",
    sizes: tuple[int, int, int] = (20, 100, 200),
    seed: int = 42,
) -> Chains:
    """Generates the task.

    `length` nodes to a chain, in a row: node (class * n_chains + chain) * length + position. Edges go from each node to the
    next with weight 1. Features are uniform in [-noise, noise], and the first node of a chain of class k has 1 added to
    feature k. Then the adjacency is made D^-1/2 (A + I) D^-1/2 and features are divided by their sums.

    Args:
      length: nodes per chain, 1 or more (the authors' figure calls 1 "length 0").
      n_classes: c.
      n_chains: per class; None takes 20, and more for short chains, so that there are 320 nodes.
      n_features: at least n_classes.
      noise: of the features.
      protocol: "fixed" draws `sizes` nodes; "percent" splits all nodes 5, 10 and 85%, as later papers do.
      sizes: nodes to train, to validate and to test on, as in the paper.
      seed: of NumPy's legacy generator; the original's is 42.

    Raises:
      DataError: sizes that make no such task.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"data.split={protocol!r}: must be one of {', '.join(map(repr, PROTOCOLS))}.")
    if length < 1 or n_classes < 2 or not 0 <= noise < np.inf:
        raise DataError(f"chains of length {length}, {n_classes} classes, noise {noise}: need 1, 2 and 0 or more.")
    if n_chains is None:
        # The authors' rule: never fewer than the 320 nodes that the splits take.
        n_chains = max(20, -(-320 // (n_classes * length)))
    if n_features < n_classes:
        raise DataError(f"{n_features} features cannot tell {n_classes} classes apart: there must be one for each.")
    N = n_classes * n_chains * length
    if protocol == "percent":
        sizes = (N // 20, N // 10, N - N // 20 - N // 10)
    if sum(sizes) > N or min(sizes) < 1:
        raise DataError(
            f"{N} nodes are too few for splits of {sizes}: raise data.length or data.chains (chains per class), "
            'or take data.split="percent".'
        )
    random = np.random.RandomState(seed)
    nodes = random.uniform(-noise, noise, size=(n_classes, n_chains, length, n_features))
    for k in range(n_classes):
        nodes[k, :, 0, k] += 1
    index = np.arange(N)
    random.shuffle(index)
    train, valid, test = np.split(index[: sum(sizes)], np.cumsum(sizes)[:-1])

    senders = np.flatnonzero(np.arange(N) % length < length - 1)
    graph = Graph(
        nodes=row_normalized(nodes.reshape(N, n_features)),
        senders=senders,
        receivers=senders + 1,
        weights=np.ones(len(senders)),
        n_nodes=N,
        labels=np.repeat(np.arange(n_classes), n_chains * length),
    )
    return Chains(augmented(check_graph(graph, "chains", n_classes)), train, valid, test)
