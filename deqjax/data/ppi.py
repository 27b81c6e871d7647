"""PPI: protein interactions in 24 human tissues, with 121 overlapping labels (Zitnik and Leskovec 2017; Hamilton et al. 2017).

As published for inductive learning: for each split a node-link graph in JSON and three arrays. The number of a node counts
over its whole split, `graph_id` says which tissue it is of.
"""

import json
import os

import numpy as np

from deqjax.data.download import fetch
from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, check_graph, with_radius

URL = "https://data.dgl.ai/dataset/ppi.zip"
CHECKSUM = "sha256:1f5b2b09ac0f897fa6aa1338c64ab75a5473674cbba89380120bede8cddb2a6a"
SPLITS = ("train", "valid", "test")


def ppi(directory: str | os.PathLike) -> dict[str, list[Graph]]:
    """The graphs of every split, with raw adjacencies of zeros and ones and their spectral radii.

    Downloads what is absent. A `ppi.zip` in the directory is used in place of the download.

    Raises:
      DataError: files are absent and cannot be downloaded, or do not belong together.
    """
    parts = ("graph.json", "feats.npy", "labels.npy", "graph_id.npy")
    files = [f"{split}_{part}" for split in SPLITS for part in parts]
    otherwise = "For graphs that need no download: --config configs/ignn_chains.py, or configs/ignn_ppi.py:synthetic"
    directory = fetch(directory, "ppi.zip", URL, files, CHECKSUM, otherwise)
    found = {split: _split(directory, split) for split in SPLITS}
    sizes = {split: (graphs[0].nodes.shape[1], graphs[0].labels.shape[1]) for split, graphs in found.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{split} {F} and {C}" for split, (F, C) in sizes.items())
        raise DataError(f"{directory}: every split must have as many features, and as many labels, as the others: {told}.")
    return {split: [with_radius(graph) for graph in graphs] for split, graphs in found.items()}


def read_split(directory: str | os.PathLike, split: str) -> list[Graph]:
    """The graphs of one split, without their radii.

    Raises:
      DataError: files that do not belong together.
    """
    return _split(os.fspath(directory), split)


def _split(directory, split):
    path = lambda part: os.path.join(directory, f"{split}_{part}")  # noqa: E731
    try:
        with open(path("graph.json")) as file:
            links = json.load(file)["links"]
        features, labels, graph_id = (np.load(path(f"{part}.npy")) for part in ("feats", "labels", "graph_id"))
        edges = np.array([(link["source"], link["target"]) for link in links], np.int64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError, OverflowError, OSError, EOFError) as error:
        raise DataError(f"{path('*')} cannot be read as PPI: {type(error).__name__}: {error}") from error
    if (features.ndim, labels.ndim, graph_id.ndim) != (2, 2, 1):
        shapes = features.shape, labels.shape, graph_id.shape
        raise DataError(f"{path('*')}: features, labels and graph ids of the shapes {shapes}, must be [N, F], [N, C] and [N].")
    if graph_id.dtype.kind not in "iu":
        raise DataError(f"{path('graph_id.npy')}: the numbers of graphs must be integers, they are of type {graph_id.dtype}.")
    if not len(graph_id):
        raise DataError(f"{path('graph_id.npy')} is empty: there is no node.")
    if not len(features) == len(labels) == len(graph_id):
        raise DataError(f"{path('*')}: {len(features)} rows of features, {len(labels)} of labels, {len(graph_id)} graph ids.")
    if wrong := edges[(edges < 0) | (edges >= len(graph_id))].tolist():
        raise DataError(f"{path('graph.json')} links node {wrong[0]}, but the nodes are 0 to {len(graph_id) - 1}.")
    graphs = []
    for tissue in np.unique(graph_id):
        index = np.flatnonzero(graph_id == tissue)
        if index[-1] - index[0] + 1 != len(index):
            raise DataError(f"{path('graph_id.npy')}: the nodes of graph {tissue} do not stand together.")
        inside = edges[(graph_id[edges[:, 0]] == tissue) & (graph_id[edges[:, 1]] == tissue)] - index[0]
        inside = inside[inside[:, 0] != inside[:, 1]]
        both = np.unique(np.concatenate([inside, inside[:, ::-1]]), axis=0)
        graph = Graph(
            nodes=features[index].astype(np.float32),
            senders=both[:, 0].astype(np.int32),
            receivers=both[:, 1].astype(np.int32),
            weights=np.ones(len(both), np.float32),
            n_nodes=len(index),
            labels=labels[index].astype(np.float32),
        )
        graphs.append(check_graph(graph, f"PPI {split} graph {tissue}"))
    return graphs


def synthetic_ppi(
    sizes: dict[str, int] | None = None,
    n_nodes: int = 2245,
    degree: float = 27.0,
    n_features: int = 50,
    n_classes: int = 121,
    seed: int = 0,
) -> dict[str, list[Graph]]:
    """Random graphs of PPI's sizes, to time a step and to try the recipe without the data. They say nothing about accuracy.

    Nodes have Gaussian features and expected degrees of a power law; labels are thresholds of random linear maps of the
    features averaged over neighbours.
    """
    random, splits = np.random.default_rng(seed), {}
    maps = random.standard_normal((n_features, n_classes))
    for split, count in (sizes or {"train": 20, "valid": 2, "test": 2}).items():
        graphs = []
        for _ in range(count):
            features = random.standard_normal((n_nodes, n_features)).astype(np.float32)
            popularity = (1 + np.arange(n_nodes)) ** -0.5
            n_links = int(n_nodes * degree / 2)
            links = random.choice(n_nodes, size=(n_links, 2), p=popularity / popularity.sum())
            links = links[links[:, 0] != links[:, 1]]
            both = np.unique(np.concatenate([links, links[:, ::-1]]), axis=0)
            graph = Graph(features, *both.T.astype(np.int32), np.ones(len(both), np.float32), n_nodes)
            average = graph.adjacency() @ features / np.maximum(graph.adjacency().sum(axis=1), 1)[:, None]
            labels = ((features + average) @ maps > 0.7 * n_features**0.5).astype(np.float32)
            graphs.append(
                with_radius(check_graph(Graph(features, *both.T.astype(np.int32), graph.weights, n_nodes, labels), split))
            )
        splits[split] = graphs
    return splits
