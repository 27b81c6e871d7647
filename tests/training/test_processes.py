"""Two processes on one machine as one run, as on two hosts."""

import signal
import socket
import time

import numpy as np
import pytest

from deqjax.training.checkpoint import committed_steps
from tests.training.runs import arrays, lines, start, train


def start_two(workdir, *arguments, **keywords):
    """Two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    coordinator = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    devices = {"JAX_NUM_CPU_DEVICES": "4"}
    return [start(workdir, *arguments, *coordinator, f"--process_id={i}", **devices, **keywords) for i in range(2)]


def finish(processes, timeout=240):
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], outputs


def wait_for_checkpoint(workdir, processes, step=1):
    deadline = time.monotonic() + 120
    while (committed_steps(workdir) or [0])[-1] < step and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


def close(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_die_and_go_on(tmp_path):
    """They compute what one does, from given weights; SIGKILL of one of them costs nothing, SIGTERM to one saves in both."""
    weights = tmp_path / "kernel.npy"
    np.save(weights, np.full((4, 1), 0.5))
    sizes = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "model")] + [f"--config.init_from={weights}"]
    expected = train(tmp_path / "one", init_from=str(weights))
    both = tmp_path / "two"

    processes = start_two(both, *sizes, "--config.sleep=0.3")
    wait_for_checkpoint(both, processes, 4)
    processes[1].kill()
    # The first finds out when a message does not come.
    time.sleep(1)
    processes[0].kill()
    codes, _ = finish(processes)
    assert codes == [-signal.SIGKILL] * 2
    reached = committed_steps(both)[-1]
    assert 4 <= reached < 12

    processes = start_two(both, *sizes, "--config.sleep=0.3")
    # Once it saves again it is surely back in the loop.
    while committed_steps(both)[-1] == reached and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [0, 0], outputs
    assert "SIGTERM" in outputs[0][0] or "test, weights of step" in outputs[0][0], outputs
    # One process speaks for all; the transport has words of its own, which its threads may mix.
    assert not any(text in outputs[1][0] for text in ("Devices:", "Restored step", "steps/s", "SIGTERM", "weights of step")), (
        outputs
    )
    assert all(text in outputs[0][0] for text in ("Devices:", "Restored step")), outputs

    codes, outputs = finish(start_two(both, *sizes))
    assert codes == [0, 0], outputs
    close(lines(both), lines(tmp_path / "one"))
    # What two processes saved, one restores.
    moved = train(both)
    ours, theirs = arrays(moved), arrays(expected)
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-5, err_msg="/".join(path))


@pytest.mark.slow
def test_two_processes_are_refused_together(tmp_path):
    first = start(tmp_path, "--config.sleep=1")
    try:
        while not (tmp_path / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.05)
        codes, outputs = finish(start_two(tmp_path))
        assert codes == [2, 2], outputs
        assert "is in use" in outputs[0][1] and "could not lock" in outputs[1][1]
    finally:
        first.kill()
        first.communicate()


def test_processes_that_cannot_meet_say_what_to_give(tmp_path):
    process = start(tmp_path, "--distributed")
    err = " ".join(process.communicate()[1].split())
    assert process.returncode == 2 and "did not find each other" in err and "--coordinator HOST:PORT" in err
