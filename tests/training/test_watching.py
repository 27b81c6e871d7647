"""What a run shows of itself, and the options that follow its evaluations."""

import json
import re
import sys
import types
import warnings

import numpy as np
import pytest

from deqjax.training import loop
from deqjax.training.checkpoint import Checkpoints, load_arrays, load_params
from deqjax.training.errors import UserError
from deqjax.training.start import trained_model
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import mesh_of
from tests.training.runs import assert_equal_states, lines, start, stopped, train
from tests.training.tiny import TinyTask, get_config


def test_the_console_tells_the_start_the_progress_and_the_compile_time(tmp_path, capsys):
    train(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"linear/kernel +4x1 +float32 +4 +-\n", out) and "Parameters: 5 (0.0 MiB)" in out
    assert "Devices: 8 x cpu" in out and "Batch: 16 in all, 2 per device" in out
    assert re.search(r"Compiled the training step and ran it once: \d+s", out)
    assert re.search(r"\[6/12\] [\d.e+]+ steps/s [\d.e+]+ rows/s ETA \d+s [\d.]+ GiB \| loss", out)


def test_an_average_of_the_weights_is_kept_evaluated_and_inherited(tmp_path):
    state = train(tmp_path / "run", ema=0.5, eval_every=0, keep=0)
    averaged, last = (np.asarray(tree["linear"]["kernel"][...]) for tree in (state.ema, state.params))
    assert np.max(np.abs(averaged - last)) > 1e-3
    config = get_config()
    model = trained_model(TinyTask(config), config, tmp_path / "run")
    np.testing.assert_array_equal(model.linear.kernel[...], averaged)
    valid = [entry["valid/loss"] for entry in lines(tmp_path / "run") if "valid/loss" in entry]
    np.testing.assert_allclose(valid[-1], TinyTask(config).evaluate(model, "valid")["loss"], rtol=1e-6)
    stored = load_arrays(tmp_path / "run", lambda path: path[0] == "ema")["ema"]
    np.testing.assert_array_equal(stored["linear"]["kernel"], averaged)


def test_the_average_is_that_of_its_definition(tmp_path):
    # Of one update: nine parts where the weights began, one where they are.
    state = train(tmp_path / "a", ema=0.9, steps=1)
    begun = train(tmp_path / "b", steps=0)
    kernel = lambda tree: np.asarray(tree["linear"]["kernel"][...])
    np.testing.assert_allclose(kernel(state.ema), 0.9 * kernel(begun.params) + 0.1 * kernel(state.params), rtol=1e-6)


def test_a_line_of_the_log_has_the_mean_since_the_one_before(tmp_path):
    """The last step has a line in any case."""
    losses = {}
    for every in (1, 3):
        train(tmp_path / str(every), steps=5, log_every=every)
        losses[every] = [entry["train/loss"] for entry in lines(tmp_path / str(every)) if "train/loss" in entry]
    np.testing.assert_allclose(losses[3], [np.mean(losses[1][:3]), np.mean(losses[1][3:])], rtol=1e-6)


def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0, 0.5])

    def evaluate(self, model, split):
        return {"loss": next(losses)} if split == "valid" else {"sum": float(model.linear.kernel[...].sum())}

    monkeypatch.setattr(TinyTask, "evaluate", evaluate)
    settings = {"patience": 2, "eval_every": 2, "checkpoint_every": 3}
    state = train(tmp_path, **settings)
    assert int(state.step) == 8 and int(state.stale) == 2 and float(state.best) == 2.0
    assert Checkpoints(tmp_path).best_steps()[0] == 4
    assert lines(tmp_path)[-1]["test/sum"] == pytest.approx(load_params(tmp_path, 4)["linear"]["kernel"].sum(), rel=1e-6)
    assert "Stopped early: the last 2 evaluations (config.patience) brought no better loss" in capsys.readouterr().out
    assert int(train(tmp_path, **settings).step) == 8
    assert next(losses) == 1.0  # nothing was evaluated again
    # With more patience it goes on.
    assert int(train(tmp_path, patience=9, eval_every=12).step) == 12


def test_a_metric_that_is_not_there_is_named(tmp_path, capsys):
    train(tmp_path, best_metric="los", patience=1)
    assert "config.best_metric='los' is not among these" in capsys.readouterr().out


def test_what_is_best_starts_anew_with_another_metric(tmp_path):
    stopped(tmp_path, 9)
    state = train(tmp_path, allow_changes=True, best_metric="mean", best_mode="max")
    last = [entry["valid/mean"] for entry in lines(tmp_path) if "valid/mean" in entry][-1]
    assert float(state.best) == pytest.approx(last) and int(state.stale) == 0
    kept = Checkpoints(tmp_path, metric="mean", mode="max")
    ranked = [kept.meta(step)["evaluation"]["mean"] for step in kept.best_steps()]
    assert len(ranked) >= 2 and ranked == sorted(ranked, reverse=True)


def test_patience_survives_a_crash_between_evaluation_and_end(tmp_path, monkeypatch):
    settings = {"patience": 2, "eval_every": 2, "optimizer.learning_rate": 0.0, "noise": 0.0}
    unbroken = train(tmp_path / "unbroken", **settings)
    stopped(tmp_path / "broken", 5, **settings)
    assert_equal_states(train(tmp_path / "broken", **settings), unbroken)
    assert int(unbroken.step) == 6


def test_a_profile_of_some_steps_is_written(tmp_path, capsys):
    train(tmp_path, profile_steps=3)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "Wrote a trace" in capsys.readouterr().out
    train(tmp_path / "short", steps=4, profile_steps=100)
    assert list((tmp_path / "short" / "profile").rglob("*.xplane.pb"))


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file")
    assert int(train(tmp_path, profile_steps=1).step) == 12
    assert f"The trace could not be written to {tmp_path / 'profile'}" in capsys.readouterr().out


def test_nothing_moves_between_host_and_device_unasked(tmp_path, monkeypatch):
    """The loop guards its step; here it is shown that the guard bites."""
    monkeypatch.setattr(loop, "place_batch", lambda mesh, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tmp_path)


def test_tensorboard_events_hold_what_the_log_does(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    train(tmp_path, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + length
    expected = {(e["step"], name): value for e in lines(tmp_path) for name, value in e.items() if name != "step"}
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path, wandb="deqjax", steps=5)
        train(tmp_path, wandb="deqjax")
    logs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2
    identity = (tmp_path / "wandb_id").read_text()
    assert all(identity in log.name for log in logs)
    assert b"train/loss" in b"".join(log.read_bytes() for log in logs)


def test_a_service_that_fails_costs_no_run(tmp_path, monkeypatch, capsys):
    class Run:
        define_metric = finish = lambda self, *args, **options: None

        def log(self, values):
            raise RuntimeError("the service is gone")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: Run()))
    (tmp_path / "wandb_id").write_bytes(b"\xff")
    assert int(train(tmp_path, wandb="deqjax", steps=3).step) == 3
    assert "Weights & Biases is left out of this run" in capsys.readouterr().out
    (tmp_path / "wandb_id").unlink()
    assert int(train(tmp_path, wandb="deqjax").step) == 12
    assert capsys.readouterr().out.count("Weights & Biases is left out from step 4 on: the service is gone") == 1


def test_an_option_that_is_not_installed_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r'config.tensorboard needs tensorboardX: pip install "deqjax\[log\]"'):
        train(tmp_path, tensorboard=True)


def test_a_restart_finds_what_was_compiled(tmp_path):
    """By default in the working directory, in a process without a cache of its own."""
    kept = []
    for steps in (4, 5):
        process = start(tmp_path, f"--config.steps={steps}", JAX_COMPILATION_CACHE_DIR=None)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        files = (tmp_path / "compiled").glob("jit_update*-cache")
        kept.append({path.name: path.stat().st_mtime_ns for path in files})
    assert len(kept[0]) == 1 and kept[0] == kept[1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_training_step_lowers_for_every_platform(shape):
    from deqjax.training.mesh import place_batch
    from deqjax.training.step import prepare, step_function

    config = get_config("wide")
    task, mesh = TinyTask(config), mesh_of(shape)
    batch = place_batch(mesh, task.batch(0))
    program = prepare(task, config, mesh, batch)
    lowers_everywhere(step_function(task, config, program, 3), program.init(), batch)


def test_settings_that_cannot_be_are_named(tmp_path):
    settings = {"accumulate": 0, "ema": 1.0, "patience": -1, "log_every": 0, "checkpoint_every": -1, "best_mode": "mean"}
    for name, value in settings.items():
        with pytest.raises(UserError, match=f"config.{name}="):
            loop.train(TinyTask(get_config()), get_config().to_dict() | {name: value}, tmp_path)
    # Patience would wait for evaluations that never come.
    with pytest.raises(UserError, match=r"set config\.eval_every"):
        loop.train(TinyTask(get_config()), get_config().to_dict() | {"patience": 2, "eval_every": 0}, tmp_path)


def test_a_log_line_is_json_with_numbers_only(tmp_path):
    train(tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, float | int) for value in json.loads(line).values())
