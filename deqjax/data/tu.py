"""The TU collection of graph sets (Morris et al. 2020): molecules and proteins to classify, from their text archives."""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from deqjax.data.download import fetch
from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, augmented, check_graph

URL = "https://www.chrsmrrs.com/graphkerneldatasets/{name}.zip"
# Number of graphs of each set, and the checksum of its archive.
SETS = {
    "MUTAG": (188, "sha256:c419bdc853c367d2d83da4973c45100954ae15e10f5ae2cddde6ca431f8207f6"),
    "PTC_MR": (344, "sha256:5699a6d9f1bc5b3d71495f09ef50de53fa3e6bb24ead1150da678500229f5237"),
    "COX2": (467, "sha256:aad0f932851a9ee308b3b65bb23d9eb94d4072de9593e988090ae837fa17c430"),
    "PROTEINS": (1113, "sha256:2da8de15284b88edabca2888ce5444d62f364ed41159260977088c4e53d4d848"),
    "NCI1": (4110, "sha256:10e1458f3bd9224f14e6d7627e74dcfd13e48d376d73935e7bd2900590ef1d82"),
}
# More kinds of nodes than this are a damaged file, or labels that are no kinds.
_MOST_LABELS = 10_000


class GraphSet(NamedTuple):
    """Graphs with a class each."""

    graphs: list[Graph]
    n_features: int
    n_classes: int

    @property
    def labels(self) -> np.ndarray:
        return np.array([graph.labels for graph in self.graphs])


def tu(name: str, directory: str | os.PathLike) -> GraphSet:
    """One of the sets of the paper, its adjacencies D^-1/2 (A + I) D^-1/2 with weights of 1.

    Downloads the archive if its files are absent. Bond types are left out, as the authors advise.

    Raises:
      DataError: no such set, or its files are absent, damaged or too few.
    """
    if name not in SETS:
        hint = ' ("PTC" is PTC_MR)' if name.upper().startswith("PTC") else ""
        raise DataError(f"there is no set {name!r} among {', '.join(SETS)}{hint}.")
    n_graphs, checksum = SETS[name]
    files = [f"{name}_{part}.txt" for part in ("A", "graph_indicator", "graph_labels", "node_labels")]
    otherwise = "For graphs that need no download: --config configs/ignn_demo_graphs.py"
    found = read_tu(name, fetch(directory, f"{name}.zip", URL.format(name=name), files, checksum, otherwise))
    if len(found.graphs) != n_graphs:
        raise DataError(f"{directory} holds {len(found.graphs)} graphs, but {name} has {n_graphs}.")
    return found._replace(graphs=[augmented(graph) for graph in found.graphs])


def read_tu(name: str, directory: str | os.PathLike) -> GraphSet:
    """Reads any set in the collection's format.

    Features are one-hot node labels, counted from the smallest; without node labels, the in-degree. Classes are numbered in
    the order of their labels. Self loops go, parallel edges become one, and edges are sorted by sender.

    Raises:
      DataError: a file is missing, or they do not belong together.
    """
    directory = pathlib.Path(directory)

    def numbers(part, required=True):
        path = directory / f"{name}_{part}.txt"
        if not path.is_file():
            if required:
                raise DataError(f"{directory} lacks {path.name}, without which {name} cannot be read.")
            return None
        try:
            # Whole numbers, all of them: NaN is none, and 1.5 no label.
            return np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error

    edges = numbers("A") - 1
    indicator = numbers("graph_indicator")[:, 0] - 1
    classes, labels = np.unique(numbers("graph_labels")[:, 0], return_inverse=True)
    node_labels = numbers("node_labels", required=False)
    n_nodes = len(indicator)
    if not n_nodes:
        raise DataError(f"{directory / f'{name}_graph_indicator.txt'} is empty: there is no node.")
    if edges.shape[1] != 2:
        raise DataError(f"{directory / f'{name}_A.txt'}: every line must be an edge, the numbers of two nodes.")
    if len(wrong := np.flatnonzero(((edges < 0) | (edges >= n_nodes)).any(axis=1))):
        ends = " and ".join(map(str, edges[wrong[0]] + 1))
        raise DataError(
            f"{directory / f'{name}_A.txt'}, line {wrong[0] + 1}: joins {ends}, but the ends of edges must be some of the "
            f"nodes 1 to {n_nodes}."
        )
    if np.any(np.diff(indicator) < 0) or not 0 <= indicator.min() <= indicator.max() < len(labels):
        raise DataError(
            f"{directory / f'{name}_graph_indicator.txt'}: must grow from 1 to {len(labels)}, the number of graphs."
        )
    if node_labels is not None and len(node_labels) != n_nodes:
        raise DataError(f"{directory / f'{name}_node_labels.txt'} has {len(node_labels)} lines for {n_nodes} nodes.")
    if node_labels is not None and np.ptp(node_labels, axis=0).max() >= _MOST_LABELS:
        raise DataError(
            f"{directory / f'{name}_node_labels.txt'}: labels from {node_labels.min()} to {node_labels.max()} are too many, a "
            f"feature for each; renumber them, to fewer than {_MOST_LABELS}."
        )
    if np.any(indicator[edges[:, 0]] != indicator[edges[:, 1]]):
        raise DataError(f"{directory / f'{name}_A.txt'}: an edge joins two graphs.")

    edges = np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0)
    features = _one_hot(node_labels) if node_labels is not None else np.bincount(edges[:, 1], minlength=n_nodes)[:, None]
    features = features.astype(np.float32)
    starts = np.searchsorted(indicator, np.arange(len(labels) + 1))
    edge_starts = np.searchsorted(indicator[edges[:, 0]], np.arange(len(labels) + 1))
    graphs = []
    for k, label in enumerate(labels):
        start, stop = starts[k : k + 2]
        inside = (edges[edge_starts[k] : edge_starts[k + 1]] - start).astype(np.int32)
        graph = Graph(features[start:stop], *inside.T, np.ones(len(inside), np.float32), int(stop - start), int(label))
        graphs.append(check_graph(graph, f"{name} graph {k + 1}", len(classes)))
    return GraphSet(graphs, features.shape[1], len(classes))


def _one_hot(labels):
    first = labels.min(axis=0)
    width = labels.max(axis=0) - first + 1
    return np.concatenate([np.eye(w)[column - f] for column, f, w in zip(labels.T, first, width, strict=True)], axis=1)


def folds(labels: np.ndarray, n_folds: int = 10, seed: int = 42) -> list[np.ndarray]:
    """Held-out graphs of a stratified cross-validation, in scikit-learn's order.

    Raises:
      DataError: a class has fewer graphs than there are folds.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise DataError('cross-validation needs scikit-learn: pip install "deqjax[graph]"') from error
    if np.bincount(labels).min() < n_folds:
        raise DataError(f"{n_folds} folds need as many graphs of each class; the rarest has {np.bincount(labels).min()}.")
    split = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    return [held_out for _, held_out in split.split(np.zeros(len(labels)), labels)]
