import json
import os
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax.data.errors import DataError
from deqjax.training import checkpoint, loop
from deqjax.training.checkpoint import Checkpoints, committed_steps, load_params
from deqjax.training.errors import UserError
from deqjax.training.start import trained_model
from tests.training.runs import arrays, assert_equal_states, lines, start, stopped, train
from tests.training.tiny import TinyTask, get_config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return train(workdir), workdir


def test_training_learns_and_logs_the_vitals(unbroken):
    state, workdir = unbroken
    log = lines(workdir)
    assert [entry["step"] for entry in log if "train/loss" in entry] == [3, 6, 9, 12]
    first, last = (entry for entry in log if "valid/loss" in entry and entry["step"] in (4, 12))
    assert last["valid/loss"] < first["valid/loss"]
    vitals = {"train/grad_norm", "train/lr", "train/skipped", "train/backward/steps", "train/backward/rel"}
    assert all(vitals <= entry.keys() for entry in log if "train/loss" in entry)
    assert log[0]["train/backward/steps"] > 1
    assert log[-1].keys() == {"step", "test/loss", "test/mean"}
    assert int(state.step) == 12 and float(state.best) == last["valid/loss"]
    assert not state.variables["memory"].get_value().sharding.is_fully_replicated


def test_stopping_anywhere_and_going_on_changes_nothing(unbroken, tmp_path):
    # Five steps are no multiple of log_every or eval_every.
    train(tmp_path, steps=5)
    kept = [entry for entry in lines(tmp_path) if entry["step"] <= 4]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in kept)
        file.write('{"step": 9, "train/loss": 1.0}\n{"step": 10, "tra')
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])


def test_the_log_outlives_its_checkpoints(tmp_path):
    train(tmp_path, steps=4)
    before = lines(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path, steps=5)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.before.jsonl").read_text().splitlines()] == [
        entry["step"] for entry in before
    ]
    assert lines(tmp_path)[-1]["step"] == 5
    # A log without a line is not worth keeping, one that was kept is not written over.
    (tmp_path / "metrics.jsonl").write_text("")
    for _ in range(2):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        train(tmp_path, steps=0)
    kept = [path.read_text() for path in sorted(tmp_path.glob("metrics.before*"))]
    assert len(kept) == 2 and kept[0].count('"step": 0') == 1 and kept[1].count('"step": 3') == 1


def test_a_killed_process_resumes_bit_for_bit(unbroken, tmp_path):
    process = start(tmp_path, "--config.sleep=0.3")
    deadline = time.monotonic() + 60
    while not committed_steps(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and committed_steps(tmp_path)[-1] < 12
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])


def test_sigterm_saves_and_returns(unbroken, tmp_path, monkeypatch, capsys):
    original = TinyTask.batch

    def batch(self, step):
        if step == 7 and self.config.sleep == 0.0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(TinyTask, "batch", batch)
    handler = signal.getsignal(signal.SIGTERM)
    assert int(train(tmp_path).step) == 8
    assert "SIGTERM: saved step 8 of 12" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])


def test_eight_devices_compute_what_one_does(unbroken, tmp_path, monkeypatch):
    from deqjax.training import mesh

    one = jax.devices()[:1]
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: mesh.make_mesh(sizes, one))
    single, eight = arrays(train(tmp_path)), arrays(unbroken[0])
    for path in eight:
        np.testing.assert_allclose(single[path], eight[path], rtol=1e-5, atol=1e-6, err_msg="/".join(path))


def test_a_checkpoint_moves_to_other_devices(unbroken, tmp_path, monkeypatch):
    from deqjax.training import mesh

    train(tmp_path, steps=5)
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: mesh.make_mesh({"data": 1, "fsdp": -1}, jax.devices()[:2]))
    state, expected = arrays(train(tmp_path)), arrays(unbroken[0])
    for path in expected:
        np.testing.assert_allclose(state[path], expected[path], rtol=1e-5, atol=1e-6, err_msg="/".join(path))


def test_the_latest_and_the_best_checkpoint_are_kept_and_weights_load_as_numpy(unbroken):
    state, workdir = unbroken
    assert committed_steps(workdir)[-1] == 12 and len(committed_steps(workdir)) <= 2
    kernel = load_params(workdir)["linear"]["kernel"]
    assert type(kernel) is np.ndarray
    np.testing.assert_array_equal(kernel, state.params["linear"]["kernel"][...])


def test_a_finished_run_only_evaluates(unbroken, capsys):
    before = lines(unbroken[1])
    assert_equal_states(train(unbroken[1]), unbroken[0])
    assert "The run is finished" in capsys.readouterr().out
    assert lines(unbroken[1]) == before
    config = get_config()
    assert loop.evaluate(TinyTask(config), config, unbroken[1])["test/loss"] == before[-1]["test/loss"]
    assert "config." not in capsys.readouterr().out
    config.steps, config.dropout = 13, 0.2
    loop.evaluate(TinyTask(config), config, unbroken[1])
    out = capsys.readouterr().out
    assert "config.dropout was 0.1, is 0.2" in out and "config.steps" not in out


def test_weights_of_another_run_start_a_new_one(unbroken, tmp_path):
    state = train(tmp_path, init_from=str(unbroken[1]), steps=0, ema=0.5)
    for weights in (state.params, state.ema):
        np.testing.assert_array_equal(weights["linear"]["kernel"][...], unbroken[0].params["linear"]["kernel"][...])
    assert float(state.variables["mean"][...]) == float(unbroken[0].variables["mean"][...])
    assert not np.any(state.variables["memory"][...]) and int(state.step) == 0
    # Random streams begin anew as well.
    draws = [{int(x) for path, x in arrays(s.variables).items() if path[-1] == "count"} for s in (unbroken[0], state)]
    assert draws == [{12}, {0}]


def test_weights_that_are_asked_for_are_used_unless_the_run_began_with_them(unbroken, tmp_path, capsys):
    np.save(tmp_path / "kernel.npy", np.ones((4, 1)))
    config = get_config()

    def kernel(workdir, init_from):
        config.init_from = str(init_from)
        return np.asarray(trained_model(TinyTask(config), config, workdir).linear.kernel[...])

    assert np.all(kernel(unbroken[1], tmp_path / "kernel.npy") == 1)
    assert f"The run in {unbroken[1]} did not begin with config.init_from=" in capsys.readouterr().out
    begun = train(tmp_path / "run", init_from=str(tmp_path / "kernel.npy"), steps=1)
    for path in (tmp_path / "kernel.npy", tmp_path / "run", ""):
        np.testing.assert_array_equal(kernel(tmp_path / "run", path), begun.params["linear"]["kernel"][...])


def test_weights_of_a_run_on_other_data_are_taken_where_they_are_of_use(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTask, "fingerprint", ["other", 1], raising=False)
    with pytest.raises(UserError, match="made with other data"):
        train(tmp_path, init_from=str(unbroken[1]), steps=0)
    monkeypatch.setattr(TinyTask, "weights_transfer", True, raising=False)
    state = train(tmp_path, init_from=str(unbroken[1]), steps=0)
    np.testing.assert_array_equal(state.params["linear"]["kernel"][...], unbroken[0].params["linear"]["kernel"][...])
    config = get_config()
    for use in (loop.train, loop.evaluate):  # but such a run neither goes on nor is evaluated
        with pytest.raises(UserError, match="made with other data"):
            use(TinyTask(config), config, unbroken[1])

    def absent(self):
        raise DataError("no data here")

    # Where there are none to compare with, such weights are of use all the same.
    monkeypatch.setattr(TinyTask, "fingerprint", property(absent))
    assert loop.evaluate(TinyTask(config), config, unbroken[1])["test/loss"] == lines(unbroken[1])[-1]["test/loss"]
    monkeypatch.setattr(TinyTask, "weights_transfer", False)
    with pytest.raises(DataError, match="no data here"):
        loop.evaluate(TinyTask(config), config, unbroken[1])


def test_a_checkpoint_of_another_model_is_refused_by_name(unbroken):
    with pytest.raises(UserError, match=r"params/linear/bias: \[1\] there, \[2\] here; params/linear/kernel"):
        train(unbroken[1], width=2)


def test_a_save_that_fails_at_once_stops_the_run(tmp_path, monkeypatch):
    original = checkpoint.ocp.CheckpointManager.save

    def fails(self, step, *args, **kwargs):
        if step == 8:
            raise OSError(28, "No space left on device")
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", fails)
    with pytest.raises(UserError, match=r"No space left on device.*checkpoint of step 5 is intact"):
        train(tmp_path)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(unbroken, tmp_path, monkeypatch, capsys):
    # A limit on the size of files makes real writes fail in the middle, in the background threads too.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = checkpoint.ocp.CheckpointManager.save

    def save(self, step, *args, **kwargs):
        if step == 8:
            self.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return original(self, step, *args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
            with pytest.raises(UserError, match="so the run stops here"):
                train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert committed_steps(tmp_path) == [4, 5]
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])


def test_bad_updates_are_skipped_and_counted(tmp_path, monkeypatch):
    """Those without a finite gradient, and those without a finite loss; the rate is that of the updates that were made."""
    original = TinyTask.loss

    def loss(self, model, batch, key, step):
        value, metrics = original(self, model, batch, key, step)
        no_gradient = jnp.sqrt(jnp.where(step == 7, 0.0, 1.0) * jnp.sum(model.linear.kernel[...] ** 2))
        return value + no_gradient + jnp.where(step == 8, jnp.inf, 0.0), metrics

    monkeypatch.setattr(TinyTask, "loss", loss)
    falling = {"optimizer.schedule": "step", "optimizer.decay_at": (6,), "optimizer.decay_factor": 0.1}
    state = train(tmp_path, poison_from=2, poison_to=5, ema=0.5, **falling)
    assert int(state.skipped) == 5 and int(state.skipped_in_a_row) == 0 and int(state.step) == 12
    assert all(np.all(np.isfinite(x)) for tree in (state.params, state.ema) for x in arrays(tree).values())
    log = [entry for entry in lines(tmp_path) if "train/skipped" in entry]
    assert [entry["train/skipped"] for entry in log] == [1, 3, 5, 5]
    np.testing.assert_allclose([entry["train/lr"] for entry in log], [0.05, 0.05, 0.05, 0.005], rtol=1e-6)


def test_a_bad_update_leaves_no_trace(tmp_path):
    spoiled = train(tmp_path / "spoiled", steps=6, poison_from=5, poison_to=6, ema=0.5)
    before = train(tmp_path / "before", steps=5, ema=0.5)
    for part in ("params", "opt", "ema", "variables"):
        got, expected = (arrays(getattr(state, part)) for state in (spoiled, before))
        assert got.keys() == expected.keys() and got
        for path, array in got.items():
            np.testing.assert_array_equal(array, expected[path], err_msg="/".join(path))


def test_an_update_that_is_not_finite_is_a_bad_one_though_its_gradient_is_sound(tmp_path):
    """The solver would hide such weights: it falls back to its start, and losses stay finite."""
    reckless = {"optimizer.name": "sgd", "optimizer.clip": 0.0, "optimizer.learning_rate": 1e39}
    state = train(tmp_path, dropout=0.0, max_bad_steps=99, **reckless)
    assert int(state.skipped) == 12
    assert all(np.all(np.isfinite(x)) for x in arrays(state.params).values())


def test_a_run_that_goes_on_elsewhere_takes_its_best_weights_along(tmp_path, monkeypatch):
    """Also one that has no steps left to take."""
    losses = {4: 1.0, 8: 3.0, 12: 2.0}

    def evaluate(self, model, split):
        return {"loss": losses[int(model.seen[...])]} if split == "valid" else {"seen": float(model.seen[...])}

    monkeypatch.setattr(TinyTask, "evaluate", evaluate)
    tested = lambda name: lines(tmp_path / name)[-1]["test/seen"]
    train(tmp_path / "unbroken")
    stopped(tmp_path / "before", 9)
    train(tmp_path / "after", resume=str(tmp_path / "before"))
    train(tmp_path / "again", resume=str(tmp_path / "after"))
    assert tested("unbroken") == tested("after") == tested("again") == 4
    assert committed_steps(tmp_path / "again") == [4, 12]


def test_a_run_that_goes_on_from_before_damage_takes_the_best_weights_up_to_there(tmp_path, monkeypatch):
    losses, every = {4: 2.0, 8: 3.0, 12: 1.0}, {"eval_every": 4, "checkpoint_every": 4}
    evaluate = lambda self, model, split: {"loss": losses[int(model.seen[...])]} if split == "valid" else {}
    monkeypatch.setattr(TinyTask, "evaluate", evaluate)
    train(tmp_path / "before", keep=3, **every)
    for file in (tmp_path / "before" / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    losses[12] = 9.0
    train(tmp_path / "after", resume=str(tmp_path / "before"), **every)
    assert Checkpoints(tmp_path / "after").best_steps() == [4, 8, 12]


def test_clipping_and_decay_may_begin_in_a_run(tmp_path):
    stopped(tmp_path, 5, **{"optimizer.clip": 0.0})
    changed = {"optimizer.clip": 1.0, "optimizer.weight_decay": 1e-4, "optimizer.clip_value": 9.0}
    assert int(train(tmp_path, allow_changes=True, **changed).step) == 12


def test_too_many_bad_updates_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"diverged.*last 4 steps, up to step 9; the checkpoint of step 5 is kept"):
        train(tmp_path, poison_from=5, poison_to=12, eval_every=5, **{"max_bad_steps": 3})
    assert int(train(tmp_path / "borne", poison_from=6, poison_to=9, **{"max_bad_steps": 3}).step) == 12


def test_a_step_compiles_once(tmp_path, capsys):
    train(tmp_path)
    assert capsys.readouterr().out.count("Compiled") == 1


def test_a_batch_that_devices_cannot_share_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTask, "batch", lambda self, step: {"x": np.zeros((6, 4))})
    with pytest.raises(UserError, match="'x' has 6 rows, which 8 devices cannot share"):
        train(tmp_path)
