"""An offline set of graphs whose classes no short-sighted network can tell apart.

The rule that makes it. A graph is two paths of `length` nodes each. The first node of one path carries the letter A, that
of the other the letter B; the last node of one of the two carries a flag. The class is the letter of the flagged path.
Every graph has one A, one B and one flag, so counting tells nothing, and the neighbourhoods of radius r of all nodes are
the same in both classes as long as 2 r + 1 < length: a network that looks r hops far and sums over nodes answers at random.
Lengths are drawn uniformly from a range, node numbers are shuffled, and classes alternate.
"""

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, augmented, check_graph
from deqjax.data.tu import GraphSet


def letters(n_graphs: int = 400, shortest: int = 6, longest: int = 9, seed: int = 0) -> GraphSet:
    """Generates the set; adjacencies are D^-1/2 (A + I) D^-1/2 of the undirected paths.

    Features are one-hot: A, B, flag, plain.

    Raises:
      DataError: sizes that make no such graphs.
    """
    if n_graphs < 2 or not 2 <= shortest <= longest:
        raise DataError(f"{n_graphs} graphs of paths of {shortest} to {longest} nodes: need 2 graphs, and 2 nodes or more.")
    random, graphs = np.random.default_rng(seed), []
    for k in range(n_graphs):
        length, label = int(random.integers(shortest, longest + 1)), k % 2
        N = 2 * length
        kind = np.full(N, 3)
        kind[0], kind[length] = 0, 1
        kind[(label + 1) * length - 1] = 2
        step = np.concatenate([np.arange(length - 1), length + np.arange(length - 1)])
        shuffled = random.permutation(N)
        nodes = np.zeros((N, 4), np.float32)
        nodes[shuffled, kind] = 1
        senders, receivers = shuffled[np.concatenate([step, step + 1])], shuffled[np.concatenate([step + 1, step])]
        graph = Graph(nodes, senders, receivers, np.ones(len(senders), np.float32), N, label)
        graphs.append(augmented(check_graph(graph, f"graph {k}", 2)))
    return GraphSet(graphs, 4, 2)
