"""Golden kinds of the graph networks' data: generated, read and normalised graphs, folds and metrics."""

import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np

from deqjax.data.chains import chains
from deqjax.data.graphs import RADIUS_MARGIN, Graph, augmented, row_normalized, spectral_radius, symmetric
from deqjax.data.ppi import read_split
from deqjax.data.tu import folds, read_tu
from experiments.graph_metrics import accuracy, f1_scores, label_counts, most_probable
from tests.golden import Case, close


def graph_of(matrix) -> Graph:
    senders, receivers = np.nonzero(matrix)
    return Graph(None, senders, receivers, matrix[senders, receivers], len(matrix))


def check_chains(case: Case, sub=None):
    for number, spec in enumerate(case.meta["specs"]):
        names = {"l": "length", "c": "n_classes", "n": "n_chains", "f": "n_features", "noise": "noise", "seed": "seed"}
        settings = {"n_chains": 20, **{names[key]: value for key, value in spec.items() if key in names}}
        data = chains(**settings, sizes=tuple(spec.get(key, size) for key, size in (("tn", 20), ("vl", 100), ("tt", 200))))
        want = case.group(f"out/{number}")
        matrix = np.zeros((data.graph.n_nodes,) * 2)
        matrix[want["adj_row"], want["adj_col"]] = want["adj_val"]
        close(data.graph.adjacency().toarray(), matrix, rtol=1e-6, what="adjacency")
        features = np.zeros_like(data.graph.nodes)
        features[want["feat_row"], want["feat_col"]] = want["feat_val"]
        close(data.graph.nodes, features, rtol=1e-6, what="features")
        np.testing.assert_array_equal(data.graph.labels, want["labels"])
        for ours, theirs in ((data.train, "train"), (data.valid, "val"), (data.test, "test")):
            np.testing.assert_array_equal(ours, want[f"idx_{theirs}"])


def check_normalisation(case: Case, sub=None):
    kinds = sorted({name.split("/")[1] for name in case.arrays if name.startswith("in/")})
    for kind in kinds:
        graph = graph_of(case[f"in/{kind}/adj"])
        want = case.group(f"out/{kind}")
        close(augmented(graph).adjacency().toarray(), want["aug"], rtol=1e-7, what=f"{kind}, augmented")
        close(symmetric(graph).adjacency().toarray(), want["noself"], rtol=1e-7, what=f"{kind}, symmetric")
        close(row_normalized(case[f"in/{kind}/adj"]), want["row"], rtol=1e-7, what=f"{kind}, rows")
        for name, ours in (("raw", graph), ("aug", augmented(graph))):
            # Stored as NaN where the true value is 0.
            expected = np.nan_to_num(want[f"rho_{name}"], nan=RADIUS_MARGIN)
            close(spectral_radius(ours) + RADIUS_MARGIN, expected, atol=2e-6, what=f"{kind}, radius, {name}")


def check_metrics(case: Case, sub=None):
    logits, labels = jnp.asarray(case["in/ml_logits"]), jnp.asarray(case["in/ml_labels"])
    everyone = np.ones(len(labels))
    top = f1_scores(label_counts(most_probable(logits, labels.sum(axis=1)), labels, everyone))
    close([top["f1"], top["f1_macro"]], [case["out/topk_f1_micro"], case["out/topk_f1_macro"]], what="top k")
    close(f1_scores(label_counts(logits > 0, labels, everyone))["f1"], case["out/ppi_f1_micro"], what="threshold")
    # The reference takes all classes where there is no label at all; apart from that the rule is the same.
    labels = jnp.asarray(case["in/ml_labels_with_empty"])
    k = labels.sum(axis=1)
    predicted = jnp.where((k == 0)[:, None], 1, most_probable(logits, k))
    top = f1_scores(label_counts(predicted, labels, everyone))
    want = [case[f"out/topk_f1_{kind}_with_empty"] for kind in ("micro", "macro")]
    close([top["f1"], top["f1_macro"]], want, what="top k with empty rows")
    right = accuracy(jnp.asarray(case["in/mc_logits"]), jnp.asarray(case["in/mc_labels"]))
    close(jnp.mean(right), case["out/accuracy"], what="accuracy")


def edge_set(graph: Graph):
    return sorted(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True))


def check_ppi_format(case: Case, sub=None):
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid", "test"):
            pathlib.Path(folder, f"{split}_graph.json").write_bytes(case[f"in/{split}_graph.json"].tobytes())
            for part in ("feats", "labels", "graph_id"):
                np.save(pathlib.Path(folder, f"{split}_{part}.npy"), case[f"in/{split}_{part}"])
            graphs, want = read_split(folder, split), case.group(f"out/{split}")
            assert len(graphs) == int(want["num_graphs"])
            for k, graph in enumerate(graphs):
                assert graph.n_nodes == int(want[f"{k}/num_nodes"])
                assert edge_set(graph) == sorted(map(tuple, want[f"{k}/edge_index"].T.tolist()))
                close(graph.nodes.sum(axis=1), want[f"{k}/x_sum"], rtol=1e-5, what="features")
                close(graph.labels.sum(axis=1), want[f"{k}/y_sum"], rtol=1e-6, what="labels")


def check_tu_format(case: Case, sub=None):
    with tempfile.TemporaryDirectory() as folder:
        for name, data in case.group("in").items():
            pathlib.Path(folder, name).write_bytes(data.tobytes())
        (name,) = [name.removesuffix("_A.txt") for name in case.group("in") if name.endswith("_A.txt")]
        found = read_tu(name, folder)
    assert (found.n_features, found.n_classes) == (int(case["out/num_features"]), int(case["out/num_classes"]))
    assert len(found.graphs) == int(case["out/num_graphs"])
    np.testing.assert_array_equal(found.labels, case["out/y"])
    for k, graph in enumerate(found.graphs):
        want = case.group(f"out/{k}")
        assert graph.n_nodes == int(want["num_nodes"])
        np.testing.assert_array_equal(np.stack([graph.senders, graph.receivers]), want["edge_index"])
        np.testing.assert_array_equal(graph.nodes, want["x"])
    for k, held_out in enumerate(folds(found.labels, 10, 42)):
        np.testing.assert_array_equal(held_out, case[f"out/fold{k}/test_idx"])


KINDS = {
    "chains_dataset": check_chains,
    "normalisation": check_normalisation,
    "metrics": check_metrics,
    "ppi_format": check_ppi_format,
    "tu_format": check_tu_format,
}
