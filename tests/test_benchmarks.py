"""The benchmarks run, and the published recipes with them at their published size."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.peers import Budget, jax_solvers
from benchmarks.problems import problems

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_training_step_of_the_published_recipe_compiles_and_runs():
    command = [sys.executable, "-m", "benchmarks.lm_step", "--config", "configs/wt103.py:seq_ift_jr"]
    command += ["--length", "8", "--steps", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "parameters 97,691,888 " in out
    # The unigram distribution of these random tokens costs about 9 nats, a uniform one 12.5.
    assert 8 < float(re.search(r"loss ([\d.]+)", out)[1]) < 20
    assert 0 < float(re.search(r"peak memory ([\d.]+) GiB", out)[1]) < 8


@pytest.mark.slow
def test_the_solver_benchmark_writes_both_tables(tmp_path):
    """On the problems of equal accuracy, which are small; the peers are those that happen to be installed."""
    file = tmp_path / "solvers.json"
    command = [sys.executable, "-m", "benchmarks.solvers", "--only", "radius 0.9", "--repeats", "1", "--json", str(file)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "time to a relative residual" in out
    rows = [row for row in json.loads(file.read_text())["equal accuracy"] if row["library"] == "deqjax"]
    assert {row["method"] for row in rows} == {"picard", "anderson", "broyden"}
    reached = [row for row in rows if row["seconds"]]
    assert len(reached) == 5  # plain steps do not get there at radius 0.97
    assert all(row["residual"] <= 1e-5 for row in reached)


@pytest.mark.parametrize("steps", [4, 20])
def test_at_equal_steps_every_library_evaluates_f_as_often(steps):
    """Also where it has long been at the solution to the last bit. The peers are those that happen to be installed."""
    count = 0

    def counted(z):
        nonlocal count
        count += 1
        return 0.125 * z + 1

    def f(z):
        # An evaluation whose result nobody uses is not made, and not counted.
        return [jax.pure_callback(counted, jax.ShapeDtypeStruct(z[0].shape, z[0].dtype), z[0])]

    for name, solve in jax_solvers(Budget(steps)).items():
        compiled = jax.jit(lambda z, solve=solve: solve(f, z)).lower([jnp.zeros((3, 4))]).compile()
        count = 0
        jax.block_until_ready(compiled([jnp.zeros((3, 4))]))
        assert count == steps, name


def test_the_maps_of_the_benchmark_keep_the_shapes_of_their_states():
    for problem in problems().values():
        weights = {name: jnp.asarray(w) for name, w in problem.weights.items()}
        start = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in problem.shapes]
        out = jax.eval_shape(problem.in_jax(weights), start)
        assert [z.shape for z in out] == [z.shape for z in start]
