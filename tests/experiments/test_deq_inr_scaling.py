"""Representations on meshes, on platforms that are not here, and on fewer devices than they began with."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.cli import load_config
from deqjax.training.mesh import place_batch, place_whole
from deqjax.training.step import prepare, step_function
from experiments import inr_signals, inr_task
from experiments.deq_inr import make_task
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_a_run_moves, assert_devices_share_out_a_batch, assert_meshes_agree, mesh_of

ROOT = pathlib.Path(__file__).parents[2]
# 8 x 8 pixels or 64 points. The gradient stays in the momentum.
SMALL = {"data.step": 64, "model.n_hidden": 16, "model.input_scale": 4.0, "optimizer.name": "sgd"}
SHAPE = {"data.batch_size": 64, "data.eval_points": 32, "data.step": 1}


def task_of(name, **settings):
    config = load_config(str(ROOT / "configs" / name))
    config.update_from_flattened_dict({**SMALL, **settings})
    config.optimizer.momentum = 0.9
    return make_task(config)


TASKS = {
    "picture": lambda: task_of("inr_camera.py:clipped"),
    "batches of two pictures": lambda: task_of("inr_faces.py", **{"data.count": 2, "data.step": 3, "data.batch_size": 40}),
    "distance": lambda: task_of("inr_sdf.py", **SHAPE),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_mesh_computes_what_one_device_does(name):
    task = TASKS[name]()
    steps = assert_meshes_agree(task, ((8, 1, 1),) if name == "distance" else ((8, 1, 1), (2, 2, 2)), tol=3e-5)
    if name == "distance":
        assert_devices_share_out_a_batch(steps[8, 1, 1])


@pytest.mark.parametrize("name", TASKS)
def test_training_and_evaluation_lower_for_every_platform(name):
    task, mesh = TASKS[name](), mesh_of((2, 2, 2))
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)

    graph, state = nnx.split(program.model(program.init()))
    if name == "distance":
        (points,) = task.test_points(np.random.default_rng(0)).values()
        points["new"] = np.ones(len(points["x"]), np.float32)
        lowers_everywhere(lambda state, batch: task._chunk_metrics(graph, state, batch), state, place_whole(mesh, points))
    else:
        index, weight = (array[:, 0] for array in task.dealt(0))
        samples = task.samples(index, weight) | {"frame": np.zeros(len(index), np.int32)}
        evaluate = lambda state, batch, *place: task._chunk_metrics(graph, True, state, batch, *place)
        lowers_everywhere(evaluate, state, place_whole(mesh, samples), jnp.int32(0), jnp.int32(0))


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one(tmp_path, monkeypatch):
    # 81 pixels, which no two devices could share evenly.
    settings = {"data.step": 60, "eval_every": 2, "checkpoint_every": 2, "log_every": 1}
    make_task = lambda: task_of("inr_camera.py", **settings)
    assert_a_run_moves(make_task, (inr_signals, inr_task), tmp_path, monkeypatch, rtol=1e-4, names=("train/loss", "valid/psnr"))
