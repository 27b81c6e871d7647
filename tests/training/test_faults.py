"""What goes wrong around a run, and that nothing is lost by it."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from deqjax.data.errors import DataError
from deqjax.training import loop
from deqjax.training.checkpoint import Checkpoints, committed_steps, load_params
from deqjax.training.errors import UserError
from deqjax.training.integrity import changed, described, sealed
from tests.training.runs import assert_equal_states, lines, start, stopped, train
from tests.training.tiny import TinyTask, get_config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return train(workdir), workdir


def files_of(checkpoint):
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [empty, truncate, flip_a_bit, remove])
def test_a_damaged_newest_checkpoint_makes_way_for_the_one_before(harm, unbroken, tmp_path, capsys):
    stopped(tmp_path, 5)
    for path in files_of(tmp_path / "checkpoints" / "5"):
        harm(path)
    capsys.readouterr()
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/5 cannot be read" in out and "It is kept as" in out and "Restored step 4" in out
    assert (tmp_path / "damaged" / "5").is_dir()


def test_a_run_that_goes_on_elsewhere_says_which_checkpoints_it_passed_over(unbroken, tmp_path, capsys):
    stopped(tmp_path / "before", 5)
    for path in files_of(tmp_path / "before" / "checkpoints" / "5"):
        truncate(path)
    capsys.readouterr()
    assert_equal_states(train(tmp_path / "after", resume=str(tmp_path / "before")), unbroken[0])
    assert "checkpoints/5 cannot be read" in " ".join(capsys.readouterr().out.split())
    assert committed_steps(tmp_path / "before") == [4, 5]


def test_no_single_flipped_bit_gets_into_a_run(unbroken, tmp_path, capsys):
    """In each file in turn: the run either notices, or goes on with exactly what was saved."""
    stopped(tmp_path, 5)
    noticed = 0
    for path in files_of(tmp_path / "checkpoints" / "5"):
        sound = path.read_bytes()
        if not sound:
            continue
        flip_a_bit(path)
        capsys.readouterr()
        try:
            params = load_params(tmp_path, 5)
        except UserError:
            noticed += 1
        else:
            path.write_bytes(sound)
            for ours, expected in zip(*map(jax.tree.leaves, (params, load_params(tmp_path, 5))), strict=True):
                np.testing.assert_array_equal(ours, expected)
        path.write_bytes(sound)
    assert noticed >= 2


def test_an_array_that_reads_well_but_is_another_is_noticed(tmp_path):
    stopped(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)
    meta = checkpoints.directory / "5" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["arrays"]["params/linear/kernel"][2] ^= 4
    meta.write_text(json.dumps(sealed({k: v for k, v in content.items() if k != "seal"})))
    with pytest.raises(UserError, match="1 arrays are not what was written, params/linear/kernel for one"):
        load_params(tmp_path, 5)
    train(tmp_path, steps=5)
    assert (tmp_path / "damaged" / "5").is_dir()


def test_a_changed_sign_and_a_changed_order_are_noticed():
    x = np.arange(1.0, 5, dtype=np.float32)
    for other in (x * np.array([1, -1, 1, 1], np.float32), x[::-1].copy()):
        assert changed(described({"x": x}), described({"x": other})) == ["x"]


def test_arrays_of_64_bits_are_as_sound_where_jax_computes_with_32():
    saved = {"x": np.asarray([[1 / 3, 1e300, -0.0]]), "n": np.asarray(2**40 + 1)}
    written = described(jax.tree.map(jax.numpy.asarray, saved))
    with jax.enable_x64(False):
        assert described(saved) == written
        assert changed(written, described(saved | {"n": np.asarray(2**41 + 1)})) == ["n"]


@pytest.mark.parametrize("content", ["null", "[]", "{}", "1", '{"task": "tiny", "config": {}}'])
def test_metadata_that_are_something_else_are_damaged(content, unbroken, tmp_path):
    stopped(tmp_path, 5)
    (tmp_path / "checkpoints" / "5" / "meta" / "metadata").write_text(content)
    assert_equal_states(train(tmp_path), unbroken[0])
    assert (tmp_path / "damaged" / "5").is_dir()


def test_if_no_checkpoint_is_sound_the_run_does_not_start_over_by_itself(tmp_path):
    stopped(tmp_path, 5)
    for step in (4, 5):
        for path in files_of(tmp_path / "checkpoints" / str(step)):
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/5 cannot be read.*No other is sound either. Remove .* starts anew"):
        train(tmp_path)
    assert committed_steps(tmp_path) == [4, 5]


def test_a_damaged_best_checkpoint_leaves_the_next_best(tmp_path, capsys):
    train(tmp_path, keep=2)
    best, second = Checkpoints(tmp_path).best_steps()[:2]
    for path in files_of(tmp_path / "checkpoints" / str(best)):
        truncate(path)
    config = get_config()
    capsys.readouterr()
    loop.evaluate(TinyTask(config), config, tmp_path)
    assert f"Took the weights of step {second}" in capsys.readouterr().out


def test_leftovers_and_strangers_among_the_checkpoints_do_no_harm(unbroken, tmp_path):
    stopped(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    (folder / "8.orbax-checkpoint-tmp-0").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "old").mkdir()
    (folder / ".4").mkdir()  # of a run that was killed while it took over another's
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe garbage\n[1]\n{"no": "step"}\n{"step": 9, "train/loss": 1.0}\n{"step": 10, "tra')
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])
    assert (folder / "notes.txt").exists() and not (folder / ".4").exists()


def test_a_second_process_on_a_workdir_is_refused(tmp_path):
    first = start(tmp_path, "--config.sleep=0.5")
    try:
        while not (tmp_path / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.05)
        with pytest.raises(UserError, match=rf"is in use: process {first.pid} on .* trains there"):
            train(tmp_path)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    # The lock of a killed process is gone with it.
    train(tmp_path)


def test_neither_clock_nor_hostname_matter(unbroken, tmp_path, monkeypatch):
    stopped(tmp_path, 5)
    assert socket.gethostname() in (tmp_path / ".lock").read_text()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e9)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])
    assert "elsewhere" in (tmp_path / ".lock").read_text()


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path):
    process = start("/proc/run")
    err = process.communicate()[1]
    assert process.returncode == 2 and "/proc/run cannot be written" in err and "Traceback" not in err
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="Cannot keep checkpoints"):
        train(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_file_system_that_becomes_read_only_or_full_keeps_the_last_checkpoint(unbroken, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        stopped(tmp_path, 5)
        before = load_params(tmp_path)
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        ballast = tmp_path / "ballast"
        ballast.write_bytes(b"x" * max(free - 8192, 0))
        with pytest.raises((UserError, OSError)):
            train(tmp_path)
        np.testing.assert_array_equal(load_params(tmp_path)["linear"]["kernel"], before["linear"]["kernel"])
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(UserError, match="cannot be written"):
            train(tmp_path)
        config = get_config()
        assert loop.evaluate(TinyTask(config), config, tmp_path)  # evaluating needs no writing
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path)], check=True)
        assert_equal_states(train(tmp_path), unbroken[0])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("error", [DataError("shard 3 is gone"), FileNotFoundError(2, "No such file", "/data/shard3")])
def test_data_that_disappear_cost_no_work(error, unbroken, tmp_path, monkeypatch):
    original = TinyTask.batch

    def batch(self, step):
        if step == 7:
            raise error
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TinyTask, "batch", batch)
        with pytest.raises(UserError, match=r"stops at step 7: .*shard.*goes on from step 7"):
            train(tmp_path)
    assert committed_steps(tmp_path)[-1] == 7
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])


@pytest.mark.parametrize("step", [4, 8, 12])
def test_validation_data_that_disappear_are_evaluated_later(step, unbroken, tmp_path, monkeypatch):
    original, evaluations = TinyTask.evaluate, iter(range(4, 100, 4))

    def evaluate(self, model, split):
        if next(evaluations) == step:
            raise DataError("gone")
        return original(self, model, split)

    with monkeypatch.context() as patch:
        patch.setattr(TinyTask, "evaluate", evaluate)
        with pytest.raises(UserError, match=f"goes on from step {step}"):
            train(tmp_path)
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])
    assert Checkpoints(tmp_path).best_steps() == Checkpoints(unbroken[1]).best_steps()


def test_an_evaluation_that_comes_later_does_not_touch_the_only_weights(unbroken, tmp_path, monkeypatch):
    def gone(*args, **options):
        raise DataError("gone")

    settings = {"eval_every": 0, "checkpoint_every": 0}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="goes on from step 12"):
        patch.setattr(TinyTask, "evaluate", gone)
        train(tmp_path, **settings)
    before = {path: path.read_bytes() for path in files_of(tmp_path / "checkpoints" / "12" / "state")}
    evaluated = train(tmp_path, **settings)
    assert before == {path: path.read_bytes() for path in before}
    assert float(evaluated.best) == Checkpoints(tmp_path).meta(12)["evaluation"]["loss"]
    assert all(path.stat().st_size for path in files_of(tmp_path / "checkpoints" / "12" / "meta"))
    assert_equal_states(train(tmp_path, **settings), evaluated)


def test_a_changed_config_is_refused_by_name_unless_allowed(tmp_path, capsys):
    stopped(tmp_path, 5)
    changed = {"optimizer.learning_rate": 0.1, "seed": 4, "log_every": 2}
    with pytest.raises(
        UserError,
        match=r"another config: config.optimizer.learning_rate was 0.05, is 0.1; config.seed was 3, is 4\. .*--allow_",
    ):
        train(tmp_path, **changed)
    capsys.readouterr()
    assert int(train(tmp_path, allow_changes=True, **changed).step) == 12
    out = capsys.readouterr().out
    assert "config.seed was 3, is 4" in out and "config.log_every was 3, is 2" in out


def test_a_seed_is_no_number_of_steps(tmp_path):
    """Settings that follow from config.steps may change with it; one that has the same value by chance may not."""
    stopped(tmp_path, 5, steps=12, seed=12)
    with pytest.raises(UserError, match=r"config\.seed was 12, is 14"):
        train(tmp_path, steps=14, seed=14)


def test_a_batch_that_makes_the_solver_fail_is_counted_and_survived(tmp_path, monkeypatch):
    original = TinyTask.batch

    def batch(self, step):
        drawn = original(self, step)
        return drawn | {"x": np.full_like(drawn["x"], np.inf)} if step == 4 else drawn

    monkeypatch.setattr(TinyTask, "batch", batch)
    state = train(tmp_path)
    assert int(state.skipped) == 1 and int(state.step) == 12
    log = [entry for entry in lines(tmp_path) if "train/skipped" in entry]
    assert [entry["train/skipped"] for entry in log] == [0, 1, 1, 1]
    assert all(np.isfinite(entry["train/loss"]) for entry in log)


def test_sigterm_from_outside_saves_and_ends_with_status_0(unbroken, tmp_path):
    process = start(tmp_path, "--config.sleep=0.3")
    while not (pathlib.Path(tmp_path) / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "SIGTERM: saved step" in out and "The same command goes on from there" in out
    assert_equal_states(train(tmp_path), unbroken[0])
    assert lines(tmp_path) == lines(unbroken[1])
