"""Amazon: products bought together, and the 58 largest categories they are in (Yang and Leskovec 2012; Dai et al. 2018).

As prepared for SSE, text files: `meta.txt` ("nodes classes"), `adj_list.txt` (a line per node: its degree, then its
neighbours), `label.txt` (a row of zeros and ones per node), `train_idx-0.06.txt` and so on, `test_idx.txt` (a node per
line). The whole graph is one, and a node's only feature is itself.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, augmented, check_graph

SOURCE = "the folder `amazon-all` of the SSE code (Hanjun-Dai/steady_state_embedding names where it lies)"


class Amazon(NamedTuple):
    """The graph, normalised, its labels `[N, C]` with it, and the labelled nodes to train and to test on."""

    graph: Graph
    train: np.ndarray
    test: np.ndarray


def amazon(directory: str | os.PathLike, portion: float = 0.06) -> Amazon:
    """Reads the prepared folder.

    Args:
      directory: of the text files.
      portion: of all labelled nodes to train on; names the file of the training nodes.

    Raises:
      DataError: a file is missing or damaged.
    """
    directory = pathlib.Path(directory)
    names = ("meta.txt", "adj_list.txt", "label.txt", f"train_idx-{portion}.txt", "test_idx.txt")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise DataError(
            f"{directory} lacks {', '.join(missing)}. They are of {SOURCE}; there is no address that a program could fetch. "
            "For nodes to classify without a download: --config configs/ignn_chains.py"
        )
    try:
        n_nodes, n_classes = map(int, (directory / "meta.txt").read_text().split()[:2])
        senders, receivers = _edges(directory / "adj_list.txt", n_nodes)
        labels = np.loadtxt(directory / "label.txt", dtype=np.int8, ndmin=2)
        train, test = (np.loadtxt(directory / name, dtype=np.int64, ndmin=1) for name in names[3:])
    except DataError:
        raise
    except (ValueError, OverflowError) as error:
        raise DataError(f"{directory} cannot be read as Amazon: {error}") from error
    if labels.shape != (n_nodes, n_classes):
        raise DataError(f"{directory / 'label.txt'} has the shape {labels.shape}, meta.txt says {(n_nodes, n_classes)}.")
    for name, index in zip(names[3:], (train, test), strict=True):
        if not len(index) or index.min() < 0 or index.max() >= n_nodes:
            raise DataError(f"{directory / name}: its nodes must be some of 0 to {n_nodes - 1}.")
    graph = Graph(None, senders, receivers, np.ones(len(senders), np.float32), n_nodes, labels)
    check_graph(graph, str(directory))
    return Amazon(augmented(graph), train, test)


def _edges(path, n_nodes):
    senders, receivers = [], []
    with open(path) as lines:
        for node, line in enumerate(lines):
            neighbours = np.array(line.split()[1:], np.int32)
            senders.append(np.full(len(neighbours), node, np.int32))
            receivers.append(neighbours)
    if len(senders) != n_nodes:
        raise DataError(f"{path} has {len(senders)} lines for {n_nodes} nodes.")
    return np.concatenate(senders), np.concatenate(receivers)
