"""The benchmarks run, and the published recipes with them at their published size."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "parameters"), [("configs/wt103.py", "97,571,288"), ("configs/wt103.py:seq_ift_jr", "97,691,888")]
)
def test_a_training_step_of_the_published_recipe_compiles_and_runs(config, parameters):
    command = [sys.executable, "-m", "benchmarks.lm_step", "--config", config, "--length", "8", "--steps", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"parameters {parameters} " in out
    # The unigram distribution of these random tokens costs about 9 nats, a uniform one 12.5.
    assert 8 < float(re.search(r"loss ([\d.]+)", out)[1]) < 20
    assert 0 < float(re.search(r"peak memory ([\d.]+) GiB", out)[1]) < 8
