"""SIGKILL, again and again: the run ends as if nothing had happened, to the bit."""

import signal
import time

import numpy as np
import pytest

from deqjax.training.checkpoint import FOLDER, committed_steps
from tests.training.runs import assert_equal_states, lines, start, train

KILLS = 20
SETTINGS = {"steps": 120, "log_every": 3, "eval_every": 4, "checkpoint_every": 1, "ema": 0.9, "patience": 50}


def saving(workdir):
    """The unfinished checkpoint that is being written, or None."""
    return next((workdir / FOLDER).glob("*tmp*"), None)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """Half of them strike while a checkpoint is being saved in the background."""
    unbroken = train(tmp_path / "unbroken", **SETTINGS)
    killed = tmp_path / "killed"
    arguments = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    random, during_a_save, hits = np.random.default_rng(0), 0, 0
    for round_ in range(2 * KILLS):
        begun = (committed_steps(killed) or [0])[-1]
        process = start(killed, *arguments, "--config.sleep=0.03")
        while process.poll() is None and (committed_steps(killed) or [0])[-1] <= begun:
            time.sleep(0.002)
        if round_ % 2:
            while process.poll() is None and saving(killed) is None:
                pass
        else:
            time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.communicate()
        struck = process.returncode == -signal.SIGKILL
        hits += struck
        during_a_save += struck and saving(killed) is not None
        if hits == KILLS or not struck:
            break
    assert hits == KILLS and during_a_save >= 5, (hits, during_a_save)
    assert committed_steps(killed)[-1] < SETTINGS["steps"]
    assert_equal_states(train(killed, **SETTINGS), unbroken)
    assert lines(killed) == lines(tmp_path / "unbroken")
