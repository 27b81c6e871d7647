"""Runs of the tiny task, and what they leave behind."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from deqjax.data.errors import DataError
from deqjax.training import loop
from deqjax.training.errors import UserError
from deqjax.training.state import named_leaves
from tests.training.tiny import TinyTask, get_config

ROOT = pathlib.Path(__file__).parents[2]
# Another process computes the same to the bit, with these.
ENVIRONMENT = {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}


def train(workdir, *, allow_changes=False, profile_steps=0, **changes):
    config = get_config()
    config.update_from_flattened_dict(changes)
    return loop.train(TinyTask(config), config, workdir, allow_changes=allow_changes, profile_steps=profile_steps)


def stopped(workdir, at, **changes):
    """A run that its data stop, with its checkpoint, at a step."""
    original = TinyTask.batch

    def batch(self, step):
        if step == at:
            raise DataError("no more")
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="no more"):
        patch.setattr(TinyTask, "batch", batch)
        train(workdir, **changes)


def start(workdir, *arguments, module="tests.training.tiny", config="tests/training/tiny.py", **environment):
    """The same from the command line, in a process of its own; a variable that is None is unset."""
    command = [sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}", *arguments]
    environment = {name: value for name, value in (os.environ | ENVIRONMENT | environment).items() if value is not None}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(workdir):
    """The log without what depends on the clock."""
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if not name.startswith("time/")} for entry in entries]


def arrays(state):
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {path: np.asarray(raw(leaf)) for path, leaf in named_leaves(state).items()}


def assert_equal_states(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg="/".join(path))


def assert_close_states(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-5, atol=1e-6, err_msg="/".join(path))
