"""Graphs, their normalisation and radii, and the readers of graph data: what they accept and how they refuse."""

import dataclasses
import hashlib
import io
import json
import zipfile

import numpy as np
import pytest

from deqjax.data import tu as tu_module
from deqjax.data.amazon import amazon
from deqjax.data.chains import chains
from deqjax.data.download import fetch
from deqjax.data.errors import DataError
from deqjax.data.graphs import (
    Graph,
    augmented,
    check_graph,
    check_well_posed,
    components,
    spectral_radius,
    symmetric,
    with_radius,
)
from deqjax.data.letters import letters
from deqjax.data.ppi import ppi, read_split, synthetic_ppi
from deqjax.data.tu import folds, read_tu, tu


def random_graph(seed=0, n=30, density=0.1, symmetric=False):
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((n, n)) * (random.random((n, n)) < density)
    matrix = matrix + matrix.T if symmetric else matrix
    senders, receivers = np.nonzero(matrix)
    return Graph(random.standard_normal((n, 2)), senders, receivers, matrix[senders, receivers], n), matrix


# Graphs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [30, 450])
def test_the_spectral_radius_is_that_of_the_absolute_weights(n, symmetric):
    graph, matrix = random_graph(1, n, 3 / n, symmetric)
    expected = np.abs(np.linalg.eigvals(np.abs(matrix))).max()
    np.testing.assert_allclose(spectral_radius(graph), expected, rtol=1e-6)
    assert with_radius(graph).radius > expected


def test_a_nilpotent_matrix_has_no_radius_and_a_normalised_one_that_of_one():
    path = Graph(None, np.arange(9), np.arange(1, 10), np.ones(9), 10)
    assert spectral_radius(path) == 0
    np.testing.assert_allclose(spectral_radius(augmented(path)), augmented(path).radius)
    assert augmented(dataclasses.replace(path, weights=np.full(9, -0.5))).radius is None
    both = dataclasses.replace(path, senders=np.arange(9), receivers=np.arange(1, 10))
    undirected = both.with_adjacency(both.adjacency() + both.adjacency().T)
    np.testing.assert_allclose(spectral_radius(augmented(undirected)), 1, rtol=1e-9)
    faint = dataclasses.replace(undirected, weights=0.01 * undirected.weights)
    np.testing.assert_allclose(symmetric(faint).weights, symmetric(undirected).weights)


def test_where_no_eigenvalue_stands_out_the_radius_is_bounded_from_above():
    """A directed cycle: all eigenvalues have the same modulus, the geometric mean of its weights."""
    n, weights = 401, np.random.default_rng(0).uniform(0.5, 1.5, 401)
    cycle = Graph(None, np.arange(n), np.roll(np.arange(n), 1), weights, n)
    assert 1 <= spectral_radius(cycle) / np.exp(np.mean(np.log(weights))) < 1.1


def test_components_are_the_parts_and_together_the_whole():
    whole = chains(length=5, n_chains=8, n_features=4, protocol="percent").graph
    parts = components(whole)
    assert [part.n_nodes for _, part in parts] == [5] * 16
    matrix = np.zeros((80, 80))
    for index, part in parts:
        matrix[np.ix_(index, index)] = part.adjacency().toarray()
        np.testing.assert_array_equal(part.nodes, whole.nodes[index])
        np.testing.assert_array_equal(part.labels, whole.labels[index])
    np.testing.assert_array_equal(matrix, whole.adjacency().toarray())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_nodes": 0}, "no node"),
        ({"receivers": np.array([0, 3])}, "edge 1 has receiver 3, but the nodes are 0 to 2"),
        ({"senders": np.array([-1, 0])}, "edge 0 has sender -1"),
        ({"senders": np.array([0])}, "equally many"),
        ({"nodes": np.array([[1.0], [np.nan], [0.0]])}, r"feature \(1, 0\) is nan"),
        ({"nodes": np.ones((2, 1))}, "features of 2 nodes for a graph of 3"),
        ({"nodes": np.ones(3)}, r"features of the shape \(3,\), must be \[3, F\]"),
        ({"weights": np.array([1.0, np.inf])}, r"edge weight \(1,\) is inf"),
        ({"labels": np.array([0, 1, 2])}, "label 2 is outside 0 to 1"),
        ({"labels": np.array([0, -1, 1])}, "label -1 is outside"),
        ({"labels": np.array([0, 0.5, 1])}, "label 0.5 is outside"),
        ({"labels": np.array([0, np.nan, 1])}, "label nan is outside"),
        ({"labels": np.array([0, 1])}, "labels of 2 nodes"),
        ({"labels": np.array([[0, 1], [1, 3], [0, 0]])}, "label 3 is outside 0 to 1"),
        ({"labels": 5}, "label 5 is outside"),
    ],
)
def test_a_faulty_graph_is_named_with_its_fault(change, message):
    good = Graph(np.ones((3, 1)), np.array([0, 1]), np.array([1, 2]), np.ones(2), 3, np.array([0, 1, 1]))
    assert check_graph(good, "toy", 2) is good
    with pytest.raises(DataError, match=f"toy.*{message}"):
        check_graph(dataclasses.replace(good, **change), "toy", 2)


def test_kappa_must_lie_below_one_over_the_radius():
    graph = Graph(None, np.array([0, 1]), np.array([1, 0]), np.array([2.0, 2.0]), 2)
    check_well_posed([graph], 0.49, 1.0)
    with pytest.raises(DataError, match=r"not well-posed: kappa=0\.9 is not below 0\.5"):
        check_well_posed([graph], 0.9, 1.0)
    check_well_posed([graph], 0.9, 2.0)


# Generated -----------------------------------------------------------------------------------------------------------


def test_chains_follow_their_rule_at_every_size():
    data = chains(length=7, n_classes=3, n_chains=20, n_features=5, noise=0.0)
    assert data.graph.n_nodes == 3 * 20 * 7 and data.graph.n_edges == 60 * (6 + 7)
    known = data.graph.nodes.any(axis=1)
    assert np.array_equal(np.flatnonzero(known), np.arange(60) * 7)
    np.testing.assert_array_equal(data.graph.nodes[known].argmax(axis=1), data.graph.labels[known])
    assert len({*data.train, *data.valid, *data.test}) == 20 + 100 + 200
    percent = chains(length=10, protocol="percent")
    assert [len(percent.train), len(percent.valid), len(percent.test)] == [20, 40, 340]
    # The authors' rule for short chains: at least 320 nodes.
    assert chains(length=1).graph.n_nodes == 320


@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 0},
        {"n_classes": 1},
        {"noise": -1.0},
        {"noise": np.nan},
        {"n_features": 1},
        {"length": 2, "n_chains": 20},
        {"n_chains": -1},
        {"n_chains": -1, "protocol": "percent"},
        {"protocol": "all"},
    ],
)
def test_impossible_chains_are_refused(sizes):
    with pytest.raises(DataError):
        chains(**sizes)


def neighbourhoods(graph, radius):
    """How often each kind of neighbourhood occurs: features of the nodes within reach, by distance."""
    matrix = graph.adjacency().toarray() > 0
    found, reach = [], np.eye(graph.n_nodes, dtype=bool)
    layers = [reach]
    for _ in range(radius):
        layers.append((layers[-1].astype(int) @ matrix) > 0)
    for node in range(graph.n_nodes):
        found.append(tuple(tuple(graph.nodes[layer[node]].sum(axis=0)) for layer in layers))
    return sorted(found)


def test_letters_cannot_be_told_apart_from_nearby():
    found = letters(8, shortest=6, longest=6, seed=3)
    assert found.labels.tolist() == [0, 1] * 4
    by_radius = [{tuple(neighbourhoods(g, r)) for g in found.graphs} for r in (2, 3)]
    assert len(by_radius[0]) == 1 and len(by_radius[1]) == 2
    with pytest.raises(DataError):
        letters(8, shortest=5, longest=4)


def test_synthetic_ppi_is_in_the_form_of_ppi():
    made = synthetic_ppi({"train": 2, "valid": 1, "test": 1}, n_nodes=60, degree=6)
    assert [len(made[split]) for split in ("train", "valid", "test")] == [2, 1, 1]
    graph = made["train"][0]
    assert graph.nodes.shape == (60, 50) and graph.labels.shape == (60, 121) and 0.05 < graph.labels.mean() < 0.6
    assert (graph.adjacency() != graph.adjacency().T).nnz == 0 and graph.radius > 1


# Read ----------------------------------------------------------------------------------------------------------------


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def tiny_tu(folder, name="TOY"):
    """Two triangles of different classes and an edge."""
    edges = [(1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (3, 1), (4, 5), (5, 4), (6, 7), (7, 6), (7, 8), (8, 7), (6, 8), (8, 6)]
    texts = {
        "A": "\n".join(f"{a}, {b}" for a, b in edges),
        "graph_indicator": "\n".join("11122333"),
        "graph_labels": "1\n-1\n1",
        "node_labels": "\n".join("00121011"),
    }
    for part, text in texts.items():
        (folder / f"{name}_{part}.txt").write_text(text + "\n")


def test_tu_sets_are_read_and_their_faults_named(tmp_path):
    tiny_tu(tmp_path)
    found = read_tu("TOY", tmp_path)
    assert found.labels.tolist() == [1, 0, 1] and found.n_features == 3
    assert [g.n_nodes for g in found.graphs] == [3, 2, 3]
    (tmp_path / "TOY_node_labels.txt").unlink()
    np.testing.assert_array_equal(read_tu("TOY", tmp_path).graphs[1].nodes, [[1], [1]])  # the in-degree instead
    for part, text, message in (
        ("A", "1, 2\n2, 99\n", "line 2: joins 2 and 99, .* must be some of the nodes 1 to 8"),
        ("A", "1\n2\n", "every line must be an edge"),
        ("node_labels", "0\n0\n1\n1000000000\n1\n0\n1\n1\n", "labels from 0 to 1000000000 are too many"),
        ("A", "1, 2\n3, 4\n", "an edge joins two graphs"),
        ("A", "1, x\n", "TOY_A.txt is damaged"),
        ("A", "1, nan\n", "TOY_A.txt is damaged"),
        ("node_labels", "0\n0\n1\nnan\n1\n0\n1\n1\n", "TOY_node_labels.txt is damaged"),
        ("graph_labels", "1\n1.5\n1\n", "TOY_graph_labels.txt is damaged"),
        ("graph_labels", "1\n1\n1\n1\n", "graph 4 has no node"),
        ("graph_indicator", "1\n1\n1\n2\n2\n3\n3\n4\n", "must grow from 1 to 3"),
        ("node_labels", "0\n1\n", "2 lines for 8 nodes"),
    ):
        tiny_tu(tmp_path)
        (tmp_path / f"TOY_{part}.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            read_tu("TOY", tmp_path)
    tiny_tu(tmp_path)
    (tmp_path / "TOY_graph_labels.txt").unlink()
    with pytest.raises(DataError, match=r"lacks TOY_graph_labels\.txt"):
        read_tu("TOY", tmp_path)


def test_an_archive_in_the_folder_serves_in_place_of_a_download(tmp_path, monkeypatch):
    no_network(monkeypatch)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    tiny_tu(source, "COX2")
    files, packed = sorted(source.iterdir()), target / "COX2.zip"

    def pack(files):
        with zipfile.ZipFile(packed, "w") as archive:
            for file in files:
                archive.write(file, f"COX2/{file.name}")

    pack(files)
    monkeypatch.setitem(tu_module.SETS, "COX2", (3, f"sha256:{hashlib.sha256(packed.read_bytes()).hexdigest()}"))
    found = tu("COX2", target)
    assert len(found.graphs) == 3 and all(g.radius == 1.0 for g in found.graphs)
    for file in files:
        (target / file.name).unlink()
    # A damaged file in it, a file that is missing, no archive at all.
    packed.write_bytes(packed.read_bytes().replace(b"1, 2", b"1, 3"))
    with pytest.raises(DataError, match=r"COX2\.zip is damaged or another archive: sha256 .* Remove it"):
        tu("COX2", target)
    pack(files[1:])
    with pytest.raises(DataError, match=r"lacks COX2_A\.txt; it holds COX2_graph_indicator\.txt.* Remove it"):
        tu("COX2", target)
    packed.write_text("not a zip")
    with pytest.raises(DataError, match="no zip archive"):
        tu("COX2", target)
    assert [path.name for path in target.iterdir()] == ["COX2.zip"]


def test_a_download_that_is_cut_short_is_named_by_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: io.BytesIO(b"PK"))
    with pytest.raises(DataError, match=r"What came from https?://.*ppi\.zip is damaged: it is no zip archive\. Try again, or"):
        ppi(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_set_of_another_size_is_refused(tmp_path, monkeypatch):
    no_network(monkeypatch)
    tiny_tu(tmp_path, "MUTAG")
    with pytest.raises(DataError, match="3 graphs, but MUTAG has 188"):
        tu("MUTAG", tmp_path)


@pytest.mark.parametrize("read", [lambda folder: tu("NCI1", folder), ppi], ids=["tu", "ppi"])
def test_absent_data_say_where_they_come_from_and_what_to_do(read, tmp_path, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(DataError, match=r"could not be downloaded.*--config configs/ignn_"):
        read(tmp_path / "nowhere")


def test_a_set_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="PTC_MR"):
        tu("PTC", tmp_path)


def test_a_download_is_checked_and_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "remote.zip", "w") as archive:
        archive.writestr("inner/a.txt", "hello")
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO((tmp_path / "remote.zip").read_bytes()))
    checksum = f"sha256:{hashlib.sha256((tmp_path / 'remote.zip').read_bytes()).hexdigest()}"
    folder = fetch(tmp_path / "new", "remote.zip", "https://example.org/remote.zip", ["a.txt"], checksum, "")
    assert (folder / "a.txt").read_text() == "hello" and [p.name for p in folder.iterdir()] == ["a.txt"]
    with pytest.raises(DataError, match="sha256"):
        fetch(tmp_path / "other", "remote.zip", "https://example.org/remote.zip", ["a.txt"], "sha256:" + "0" * 64, "")


def test_folds_need_enough_graphs_of_each_class():
    labels = np.array([0] * 30 + [1] * 12)
    held_out = folds(labels, 10, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(held_out)), np.arange(42))
    with pytest.raises(DataError, match="the rarest has 12"):
        folds(labels, 13)


def tiny_ppi(folder, split="train", n_features=50):
    links = [{"source": 0, "target": 1}, {"source": 1, "target": 1}, {"source": 3, "target": 4}]
    (folder / f"{split}_graph.json").write_text(json.dumps({"links": links, "nodes": [{"id": k} for k in range(5)]}))
    np.save(folder / f"{split}_feats.npy", np.ones((5, n_features)))
    np.save(folder / f"{split}_labels.npy", np.zeros((5, 121)))
    np.save(folder / f"{split}_graph_id.npy", np.array([1, 1, 1, 2, 2]))


def test_the_splits_of_ppi_have_features_alike(tmp_path):
    for split, n_features in (("train", 50), ("valid", 50), ("test", 49)):
        tiny_ppi(tmp_path, split, n_features)
    with pytest.raises(DataError, match="train 50 and 121, valid 50 and 121, test 49 and 121"):
        ppi(tmp_path)
    tiny_ppi(tmp_path, "test")
    assert [len(graphs) for graphs in ppi(tmp_path).values()] == [2, 2, 2]


def test_ppi_files_that_do_not_belong_together_are_refused(tmp_path):
    tiny_ppi(tmp_path)
    first, second = read_split(tmp_path, "train")
    assert (first.n_nodes, first.n_edges, second.n_nodes, second.n_edges) == (3, 2, 2, 2)
    nan = np.ones((5, 50))
    nan[3, 7] = np.nan
    for part, content, message in (
        ("feats.npy", np.ones((4, 50)), "4 rows of features"),
        ("feats.npy", nan, r"graph 2: feature \(0, 7\) is nan"),
        ("feats.npy", np.ones(5), r"must be \[N, F\]"),
        ("labels.npy", np.zeros(5), r"must be \[N, F\], \[N, C\]"),
        ("graph_id.npy", np.zeros(0, int), "is empty"),
        ("graph_id.npy", np.array([1, 1, np.nan, 2, 2]), "must be integers, they are of type float64"),
        ("labels.npy", np.full((5, 121), 2), "label 2.0 is outside 0 to 1"),
        ("labels.npy", np.full((5, 121), 0.5), "label 0.5 is outside 0 to 1"),
        ("graph_id.npy", np.array([1, 2, 1, 2, 2]), "do not stand together"),
    ):
        tiny_ppi(tmp_path)
        np.save(tmp_path / f"train_{part}", content)
        with pytest.raises(DataError, match=message):
            read_split(tmp_path, "train")
    tiny_ppi(tmp_path)
    (tmp_path / "train_feats.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as PPI"):
        read_split(tmp_path, "train")
    for text, message in (
        ('{"links": [{"source": 0, "target": 9}]}', "links node 9"),
        ('{"links": [{"source": -1, "target": 2}]}', "links node -1"),
        ('{"links": [{"source": 1e30, "target": 2}]}', "cannot be read as PPI"),
        (f'{{"links": [{{"source": {10**30}, "target": 2}}]}}', "cannot be read as PPI"),
        ("{", "cannot be read as PPI"),
    ):
        tiny_ppi(tmp_path)
        (tmp_path / "train_graph.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_split(tmp_path, "train")


def tiny_amazon(folder):
    texts = {
        "meta": "4 2",
        "adj_list": "1 1\n2 0 2\n1 1\n0",
        "label": "1 0\n0 1\n1 1\n0 0",
        "train_idx-0.06": "0\n1",
        "test_idx": "2",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text + "\n")


def test_amazon_is_read_and_its_faults_named(tmp_path):
    tiny_amazon(tmp_path)
    data = amazon(tmp_path)
    assert data.graph.nodes is None and data.graph.n_edges == 4 + 4
    assert (data.train.tolist(), data.test.tolist()) == ([0, 1], [2])
    np.testing.assert_allclose(data.graph.adjacency().toarray()[3], [0, 0, 0, 1])
    for name, text, message in (
        ("adj_list", "1 1\n2 0 9\n1 1\n0", "receiver 9"),
        ("adj_list", "1 1\n2 0 99999999999\n1 1\n0", "cannot be read"),
        ("adj_list", "1 1\n", "2 lines for 4 nodes"),
        ("label", "1 0\n0 1", r"\(2, 2\), meta.txt says \(4, 2\)"),
        ("label", "1 0\n0 7\n1 1\n0 0", "label 7 is outside"),
        ("test_idx", "4", "some of 0 to 3"),
        ("meta", "four 2", "cannot be read"),
    ):
        tiny_amazon(tmp_path)
        (tmp_path / f"{name}.txt").write_text(text + "\n")
        with pytest.raises(DataError, match=message):
            amazon(tmp_path)
    tiny_amazon(tmp_path)
    with pytest.raises(DataError, match=r"lacks train_idx-0.5.txt.*configs/ignn_chains.py"):
        amazon(tmp_path, 0.5)
