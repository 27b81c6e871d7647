"""Graph experiments on meshes, on platforms that are not here, and on fewer devices than they began with."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import ignn_chains, ignn_demo_graphs
from deqjax.training import loop
from deqjax.training.mesh import make_mesh, place_batch, place_whole
from deqjax.training.step import prepare, step_function
from experiments import ignn_nodes
from experiments.ignn_graphs import GraphTask
from experiments.ignn_nodes import NodeTask
from tests.experiments.test_ignn import CHAINS, GRAPHS, lines, small_ppi
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import loss_and_gradient, mesh_of

# The gradient stays in the momentum.
SGD = {"optimizer.name": "sgd", "optimizer.weight_decay": 0.0}


def chains(**settings):
    config = ignn_chains.get_config()
    config.update_from_flattened_dict({**CHAINS, "model.dropout": 0.0, **SGD, **settings})
    config.optimizer.momentum = 0.9
    return NodeTask(config)


def graphs():
    config = ignn_demo_graphs.get_config()
    config.update_from_flattened_dict({**GRAPHS, **SGD})
    config.optimizer.momentum = 0.9
    return GraphTask(config)


def ppi():
    task = small_ppi("ift", **{name.replace(".", "__"): value for name, value in SGD.items()})
    task.config.optimizer.momentum = 0.9
    return task


TASKS = {"chains": chains, "graphs": graphs, "ppi": ppi}


@pytest.mark.parametrize("name", TASKS)
def test_every_mesh_computes_what_one_device_does(name):
    task = TASKS[name]()
    expected = loss_and_gradient(task, mesh_of((1, 1, 1)))
    # Five solves take long to compile.
    for shape in ((2, 2, 2),) if name == "ppi" else ((8, 1, 1), (4, 2, 1), (2, 2, 2)):
        for path, array in loss_and_gradient(task, mesh_of(shape)).items():
            scale = np.max(np.abs(expected[path]), initial=1e-2)
            np.testing.assert_allclose(array, expected[path], rtol=0, atol=2e-5 * scale, err_msg=f"{shape} {'/'.join(path)}")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_training_and_evaluation_lower_for_every_platform(name, shape):
    task, mesh = TASKS[name](), mesh_of(shape)
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)

    graph, state = nnx.split(program.model(program.init()))
    lowers_everywhere(lambda state, batch: task._metrics(graph, state, batch), state, place_whole(mesh, task.batch(0)))


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_two_to_one(tmp_path, monkeypatch):
    task = chains(**{"eval_every": 2, "checkpoint_every": 2, "log_every": 1})

    def train(workdir, sizes, steps):
        count = int(np.prod(list(sizes.values())))
        for module in (loop, ignn_nodes):
            monkeypatch.setattr(module, "make_mesh", lambda _: make_mesh(sizes, jax.devices()[:count]))
        task.config.steps = steps
        return loop.train(task, task.config, workdir)

    expected = train(tmp_path / "unbroken", {"data": 8}, 6)
    for sizes, steps in (({"data": 2, "fsdp": 2, "model": 2}, 2), ({"fsdp": 2}, 4), ({"data": 1}, 6)):
        moved = train(tmp_path / "moved", sizes, steps)
    for name in ("train/loss", "valid/loss"):
        ours, theirs = ([e[name] for e in lines(tmp_path / run) if name in e] for run in ("moved", "unbroken"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert int(moved.step) == int(expected.step) == 6
