"""The experiments on graphs, through their command lines."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from configs import ignn_chains, ignn_demo_graphs, ignn_ppi
from deqjax.cli import parse
from deqjax.data.errors import DataError
from deqjax.data.ppi import synthetic_ppi
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.step import prepare, step_function
from experiments import ignn_chain_lengths, ignn_graphs, ignn_nodes
from experiments.graph_metrics import accuracy, label_counts
from experiments.ignn_graphs import GraphTask
from experiments.ignn_nodes import SPLITS, Example, NodeTask, as_single, graphs_of
from experiments.many_runs import final_value, finish, without
from tests.training.meshes import loss_and_gradient, mesh_of
from tests.training.runs import lines

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CHAINS = {"data.length": 4, "model.n_hidden": 4, "steps": 4, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}
GRAPHS = {"data.graphs": 40, "data.shortest": 2, "data.longest": 3, "data.folds": 4, "data.batch_size": 16, "model.n_hidden": 4}
GRAPHS |= {"steps": 4, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}


def command(config, workdir, settings, *extra):
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["ignn", f"--config={CONFIGS / config}", *flags, f"--workdir={workdir}", *extra]


def small_ppi(variant="zoo", **settings):
    """A tiny task of PPI's form."""
    config = ignn_ppi.get_config(variant)
    config.model.n_hidden = 2
    for key, value in settings.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    splits = {}
    for split in SPLITS:
        graphs = [synthetic_ppi({"t": 1}, n, 4.0, 6, 5, seed=n)["t"][0] for n in (12, 15, 20)]
        splits[split] = [Example(as_single(g), g.labels, np.ones(g.n_nodes, bool)) for g in graphs]
    return NodeTask(config, splits)


# Nodes ---------------------------------------------------------------------------------------------------------------


def test_chains_train_resume_evaluate_and_export(tmp_path, capsys):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert ignn_nodes.main(command("ignn_chains.py", unbroken, CHAINS)) == 0
    assert ignn_nodes.main(command("ignn_chains.py", resumed, {**CHAINS, "steps": 2})) == 0
    moved = {"data.dir": "elsewhere", "export_path": "other.safetensors"}
    assert ignn_nodes.main(command("ignn_chains.py", resumed, {**CHAINS, **moved})) == 0
    keep = lambda entries: [e for e in entries if not any(k.startswith("test/") for k in e)]
    assert keep(lines(unbroken)) == keep(lines(resumed))
    trained = [e for e in lines(unbroken) if "train/loss" in e][-1]
    assert {"train/forward/rel", "train/forward/steps", "train/backward/steps", "train/backward/converged"} <= trained.keys()
    capsys.readouterr()
    assert ignn_nodes.main(command("ignn_chains.py", unbroken, CHAINS, "--mode=eval")) == 0
    expected = capsys.readouterr().out
    file = tmp_path / "chains.safetensors"
    assert ignn_nodes.main(command("ignn_chains.py", unbroken, {**CHAINS, "export_path": file}, "--mode=export")) == 0
    capsys.readouterr()
    other = command("ignn_chains.py", tmp_path / "other", {**CHAINS, "init_from": file}, "--mode=eval")
    assert ignn_nodes.main(other) == 0
    results = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    # The weights are those in use: the file holds the projected ones.
    assert results and results == [line for line in expected.splitlines() if "accuracy" in line]


def test_short_chains_are_learned_and_an_explicit_network_sees_no_further_than_its_layers(tmp_path):
    settings = {**CHAINS, "data.length": 8, "model.n_hidden": 16, "steps": 60, "eval_every": 60}
    for layers, right in ((0, lambda a: a > 0.95), (2, lambda a: a < 0.8)):
        workdir = tmp_path / str(layers)
        assert ignn_nodes.main(command("ignn_chains.py", workdir, {**settings, "explicit_layers": layers})) == 0
        assert right(next(e["test/accuracy"] for e in lines(workdir) if "test/accuracy" in e))


@pytest.mark.slow
def test_a_class_is_remembered_over_a_hundred_nodes(tmp_path, optimized):
    settings = {"data.length": 100, "steps": 100, "eval_every": 100, "log_every": 100}
    assert ignn_nodes.main(command("ignn_chains.py", tmp_path, settings)) == 0
    assert next(e["test/accuracy"] for e in lines(tmp_path) if "test/accuracy" in e) > 0.95


def test_the_picture_of_accuracy_against_length_is_drawn_and_finished_runs_are_left_alone(tmp_path, capsys):
    settings = {**CHAINS, "steps": 2, "sweep.lengths": (2, 3), "sweep.seeds": (0,), "sweep.explicit_layers": (1,)}
    argv = command("ignn_chains.py", tmp_path, settings)
    assert ignn_chain_lengths.main(argv) == 0
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert {layers: {length: len(v) for length, v in by.items()} for layers, by in found.items()} == {
        "0": {"2": 1, "3": 1},
        "1": {"2": 1, "3": 1},
    }
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    capsys.readouterr()
    assert ignn_chain_lengths.main(argv) == 0
    assert "Starting from scratch" not in capsys.readouterr().out
    assert json.loads((tmp_path / "accuracy.json").read_text()) == found


@pytest.mark.parametrize("variant", ["zoo", "ift", "original"])
def test_the_ppi_recipes_train(variant):
    task = small_ppi(variant)
    model = task.model(nnx.Rngs(0))
    split, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, batch):
        loss = lambda p: task.loss(nnx.merge(split, p, rest, copy=True), batch, jax.random.key(0), 0)
        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, metrics), grads = gradient(params, task.batch(0))
    # Five solves of the one graph; those that fill up the devices are not counted.
    assert np.isfinite(value) and metrics["forward/steps"][1] == 5
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    result = task.evaluate(model, "valid")
    assert 0 <= result["f1"] <= 1 and {"loss", "f1_macro", "forward/rel", "forward/converged"} <= result.keys()


def test_an_epoch_compiles_no_more_often_than_there_are_buckets():
    task = small_ppi(data__buckets=2, explicit_layers=1)
    mesh = make_mesh(task.config.mesh)
    batches = [place_batch(mesh, task.batch(k)) for k in range(6)]
    program = prepare(task, task.config, mesh, batches[0])
    update = jax.jit(step_function(task, task.config, program, 1), out_shardings=(program.shardings, None, None))
    state = program.init()
    for batch in batches:
        state, _, _ = update(state, batch)
    assert len({b["nodes"].shape for b in batches}) == 2 == update._cache_size()


def test_an_evaluation_whose_last_batch_is_short_compiles_no_more_often():
    task = small_ppi(data__buckets=1, data__batch_size=2, explicit_layers=1, mesh={"data": 1, "fsdp": 1, "model": -1})
    model = task.model(nnx.Rngs(0))
    found = task.evaluate(model, "valid")
    assert task._evaluate_batch._cache_size() == 1
    whole = small_ppi(data__buckets=1, data__batch_size=3, explicit_layers=1).evaluate(model, "valid")
    np.testing.assert_allclose([found["loss"], found["f1"]], [whole["loss"], whole["f1"]], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ("ignn_chains.py", ["--mode=eval"], "should be one of <train>"),
        ("ignn_ppi.py:synthetic", [], "takes a config of chains"),
        ("ignn_mutag.py", [], "takes a config of chains"),
        ("ignn_chains.py", ["--config.model.kappa=1.0"], "well-posed"),
    ],
)
def test_a_sweep_trains_chains_and_nothing_else(config, extra, message, tmp_path, capsys):
    assert ignn_chain_lengths.main(command(config, tmp_path, {}, *extra)) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err and not list(tmp_path.glob("**/metrics.jsonl"))


def test_a_sweep_without_matplotlib_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    settings = {**CHAINS, "steps": 2, "sweep.lengths": (2,), "sweep.seeds": (0,), "sweep.explicit_layers": ()}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ignn_chain_lengths.main(command("ignn_chains.py", tmp_path, {**settings, "explicit_layers": 1})) == 2
    assert "deqjax[viz]" in capsys.readouterr().err and (tmp_path / "accuracy.json").is_file()


@pytest.mark.parametrize("length", [1, 100, 1000])
def test_a_solve_is_long_enough_for_any_chain(length):
    config = ignn_chains.get_config()
    config.data.length = length
    assert config.deq.f_options.burn_in == 2 * length + 20 < config.deq.f_max_iter == config.deq.b_max_iter
    assert ignn_chains.get_config("zoo").deq.f_max_iter == 40


def test_radii_are_measured_where_the_config_gives_none():
    config = ignn_chains.get_config()
    config.update_from_flattened_dict({"data.length": 4, "model.spectral_radius": None})
    radii = [example.graph.globals[0] for example in NodeTask(config).splits["train"]]
    np.testing.assert_allclose(radii, 1.00001, rtol=1e-6)


def test_every_graph_of_an_epoch_is_seen_once():
    task = small_ppi()
    seen = [int(task.batch(k)["n_edge"][0, 0]) for k in range(3)]
    assert sorted(seen) == sorted(int(e.graph.n_edge.sum()) for e in task.splits["train"])


def test_a_batch_of_some_graphs_has_nodes_that_count():
    config = ignn_chains.get_config()
    config.update_from_flattened_dict({"data.length": 4, "data.batch_size": 1})
    task = NodeTask(config)
    assert all(task.batch(step)["counted"].any() for step in range(80))


def test_slices_with_few_or_no_nodes_that_count_give_the_gradient_of_the_whole():
    def gradient(slices):
        config = ignn_chains.get_config()
        settings = {"data.length": 4, "model.n_hidden": 4, "model.dropout": 0.0, "clip_each": 0.0}
        settings |= {"deq.f_options": {}, "deq.b_options": {}, "optimizer.weight_decay": 0.0}
        config.update_from_flattened_dict(settings | {"optimizer.name": "sgd"})
        config.optimizer.momentum, config.accumulate = 0.9, slices
        return loss_and_gradient(NodeTask(config), mesh_of((1, 1, 1)))

    # Of the 80 graphs some have no node to train on.
    whole, sliced = gradient(1), gradient(40)
    for path in [path for path in whole if path[0] == "gradient" or path[:2] == ("sums", "loss")]:
        np.testing.assert_allclose(sliced[path], whole[path], rtol=1e-4, atol=1e-6, err_msg="/".join(path))


def test_a_tie_earns_what_a_guess_would():
    logits, labels = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), np.array([0, 1, 0])
    np.testing.assert_allclose(accuracy(jax.numpy.asarray(logits), jax.numpy.asarray(labels)), [1, 0.5, 0])


def test_labels_of_padding_are_neither_right_nor_wrong():
    predicted, labels = np.array([[1, 0], [0, 1], [1, 1], [0, 1]]), np.array([[1, 0], [1, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(label_counts(predicted, labels, np.array([1, 1, 0, 0])), [[1, 0], [0, 1], [1, 0]])


def test_amazon_trains_from_its_prepared_folder(tmp_path, capsys):
    """On a made-up graph in its form: nodes without features, sets of labels, as many predicted as there are."""
    random, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    links = np.triu(random.random((30, 30)) < 0.1, 1)
    links = links | links.T
    rows = [" ".join(map(str, [row.sum(), *np.flatnonzero(row)])) for row in links]
    texts = {"meta": ["30 4"], "adj_list": rows, "train_idx-0.06": range(20), "test_idx": range(20, 30)}
    texts["label"] = [" ".join(map(str, row)) for row in (random.random((30, 4)) < 0.4).astype(int)]
    for name, text in texts.items():
        (data / f"{name}.txt").write_text("\n".join(map(str, text)) + "\n")
    settings = {"data.dir": data, "model.n_hidden": 4, "steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
    assert ignn_nodes.main(command("ignn_amazon.py", tmp_path / "run", settings)) == 0
    tested = next(e for e in lines(tmp_path / "run") if "test/f1" in e)
    assert 0 <= tested["test/f1"] <= 1 and tested["test/forward/converged"] == 1
    (data / "train_idx-0.06.txt").write_text("3\n")
    assert ignn_nodes.main(command("ignn_amazon.py", tmp_path / "other", settings)) == 2
    assert "one node to train on" in capsys.readouterr().err


# Graphs --------------------------------------------------------------------------------------------------------------


def test_folds_are_trained_in_turn_and_resumed(tmp_path, capsys):
    settings = {**GRAPHS, "data.folds": 3, "explicit_layers": 1}
    settings |= {"optimizer.schedule": "step", "optimizer.decay_at": "(2,)"}
    argv = command("ignn_demo_graphs.py", tmp_path, settings, "--mode=folds")
    assert ignn_graphs.main(argv) == 0
    out = capsys.readouterr().out
    assert "3 folds: test accuracy" in out and out.count("Starting from scratch") == 3
    rates = {e["step"]: e["train/lr"] for e in lines(tmp_path / "fold-0") if "train/lr" in e}
    assert rates[4] == pytest.approx(rates[2] / 2)
    with (tmp_path / "fold-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "te')  # as a machine that goes down leaves it
    assert ignn_graphs.main(argv) == 0
    again = capsys.readouterr().out
    assert "Starting" not in again and again.splitlines()[-1] == out.splitlines()[-1]


def test_weights_of_graph_networks_are_exported_and_read_back(tmp_path):
    config = ignn_demo_graphs.get_config()
    config.update_from_flattened_dict({**GRAPHS, "export_path": str(tmp_path / "graphs.safetensors")})
    task = GraphTask(config)
    model, other = task.model(nnx.Rngs(0)), task.model(nnx.Rngs(1))
    task.export(model)
    task.import_checkpoint(config.export_path, other)
    logits = [nnx.jit(lambda m: m(graphs_of(task.batch(0))).logits)(m) for m in (model, other)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)
    config.explicit_layers = 1
    with pytest.raises(DataError, match="explicit_layers=0"):
        task.import_checkpoint(config.export_path, task.model(nnx.Rngs(0)))


@pytest.mark.slow
def test_the_demo_needs_and_finds_what_is_far_away(tmp_path, optimized):
    for layers, right in ((0, lambda a: a > 0.95), (2, lambda a: a < 0.7)):
        settings = {"steps": 300, "eval_every": 100, "explicit_layers": layers}
        assert ignn_graphs.main(command("ignn_demo_graphs.py", tmp_path / str(layers), settings)) == 0
        assert right(next(e["test/accuracy"] for e in lines(tmp_path / str(layers)) if "test/accuracy" in e))


def test_splits_share_no_graph_and_the_original_protocol_selects_by_the_test_set():
    config = ignn_demo_graphs.get_config()
    config.update_from_flattened_dict(GRAPHS)
    task = GraphTask(config)
    together = np.concatenate([task.splits[s] for s in SPLITS])
    np.testing.assert_array_equal(np.sort(together), np.arange(40))
    config.data.select = "test"
    task = GraphTask(config)
    np.testing.assert_array_equal(task.splits["valid"], task.splits["test"])
    assert len(task.splits["train"]) == 30 and not set(task.splits["train"]) & set(task.splits["test"])


@pytest.mark.parametrize("name", ["mutag", "ptc", "cox2", "proteins", "nci1", "ppi", "amazon"])
def test_published_configs_say_what_data_they_need(name, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    main = ignn_nodes.main if name in ("ppi", "amazon") else ignn_graphs.main
    assert main(command(f"ignn_{name}.py", tmp_path, {"data.dir": tmp_path / "none"})) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "lacks" in err and "--config configs/ignn_" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("ignn_chains.py", {"model.kappa": 1.0}, "well-posed"),
        ("ignn_chains.py", {"model.spectral_radius": 0.5}, "not well-posed: kappa=0.9 is not below 0.5"),
        ("ignn_chains.py", {"data.name": "cora"}, "data.name='cora'"),
        ("ignn_chains.py", {"model.network": "graphs"}, "experiments.ignn_graphs"),
        ("ignn_amazon.py", {"model.network": "ppi"}, "have no features"),
        ("ignn_amazon.py", {"data.batch_size": 2}, "are one graph"),
        ("ignn_amazon.py", {"explicit_layers": 2}, "have no features"),
        ("ignn_chains.py", {"data.length": 0}, "length 0"),
        ("ignn_chains.py", {"data.classes": 200}, "200 classes"),
        ("ignn_chains.py", {"data.split": "half"}, "data.split='half'"),
        ("ignn_chains.py", {"data.select": "train"}, "data.select='train'"),
        ("ignn_chains.py", {"deq.f_max_iter": 40}, "the solve of training ends after 40 steps"),
        ("ignn_chains.py", {"deq.eval_f_max_iter": 30}, "the solve of evaluation ends after 30 steps"),
        ("ignn_chains.py", {"deq.b_max_iter": 40}, "the solve of the gradient ends after 40 steps"),
        ("ignn_chains.py", {"clip_each": -1.0}, "clip_each=-1.0"),
        ("ignn_chains.py", {"seed": -1}, "seed=-1"),
        ("ignn_demo_graphs.py", {"seed": -1}, "seed=-1"),
        ("ignn_chains.py", {"clip_each": "nan"}, "clip_each=nan"),
        ("ignn_chains.py", {"deq.n_state": 3}, "n_state"),
        ("ignn_demo_graphs.py", {"model.spectral_radius": 0.4}, "not well-posed"),
        ("ignn_demo_graphs.py", {"data.fold": 4, "data.folds": 4}, "data.fold=4"),
        ("ignn_demo_graphs.py", {"data.folds": 2}, "data.folds=2"),
        ("ignn_demo_graphs.py", {"data.graphs": 6, "data.folds": 4}, "rarest has 3"),
        ("ignn_demo_graphs.py", {"data.batch_size": 0}, "data.batch_size=0"),
        ("ignn_demo_graphs.py", {"data.name": "MUTAGEN"}, "data.name='MUTAGEN'"),
    ],
)
def test_mistakes_are_explained_in_a_paragraph(config, settings, message, tmp_path, capsys):
    main = ignn_graphs.main if config == "ignn_demo_graphs.py" else ignn_nodes.main
    assert main(command(config, tmp_path, settings)) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err and "Traceback" not in err


def test_what_a_killed_run_left_behind_is_no_result(tmp_path):
    assert final_value(tmp_path, "test/accuracy", 4) is None
    whole = '{"step": 2, "test/accuracy": 0.5}\n{"step": 4, "test/accuracy": 0.75}\n{"step": 4, "valid/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 6, "test/acc')
    assert final_value(tmp_path, "test/accuracy", 4) == 0.75 and final_value(tmp_path, "test/accuracy", 6) is None


def test_a_finished_run_is_a_result_of_its_own_config_alone(tmp_path):
    """With an experiment that writes what a run does: its config, and a test once it has come to its end."""
    calls = []

    def experiment(argv, end=4):
        folder, now = tmp_path / "run", parse(argv).config.to_dict()
        calls.append(argv)
        if (folder / "config.json").is_file() and json.loads((folder / "config.json").read_text())["model"] != now["model"]:
            return 2
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(now))
        (folder / "metrics.jsonl").write_text(f'{{"step": {end}, "test/accuracy": 0.5}}\n' if end else "")
        return 0

    def result(run=experiment, **settings):
        argv = command("ignn_chains.py", tmp_path, {"steps": 4, **{k.replace("__", "."): v for k, v in settings.items()}})
        return finish(run, argv, tmp_path / "run", {"seed": 1}, "test/accuracy", ("sweep", "data.dir"))

    assert result() == (0, 0.5) and len(calls) == 1
    assert result(sweep__seeds=(7,)) == (0, 0.5) and len(calls) == 1
    # Whether data elsewhere are others, the run finds out.
    assert result(data__dir="elsewhere") == (0, 0.5) and len(calls) == 2
    assert result(model__kappa=0.5) == (2, None) and len(calls) == 3
    # One that stops early has a result, one that is told to stop has none.
    assert result(lambda argv: experiment(argv, 2), steps=8) == (0, 0.5)
    assert result(lambda argv: experiment(argv, 0), steps=8) == (0, None)


def test_options_are_taken_out_of_a_command_line_in_both_their_forms():
    argv = ["x", "--mode", "folds", "--config=a", "--workdir=b", "--workdir", "c", "--config.mode=1"]
    assert without(argv, ("mode", "workdir")) == ["x", "--config=a", "--config.mode=1"]


def test_the_demo_trains_its_implicit_network(tmp_path):
    assert ignn_graphs.main(command("ignn_demo_graphs.py", tmp_path, {**GRAPHS, "steps": 2, "checkpoint_every": 0})) == 0
    trained = next(e for e in lines(tmp_path) if "train/loss" in e)
    assert np.isfinite(trained["train/loss"]) and trained["train/forward/converged"] == 1
