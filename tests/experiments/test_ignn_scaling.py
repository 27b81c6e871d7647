"""Graph experiments on meshes, on platforms that are not here, and on fewer devices than they began with."""

import pytest
from flax import nnx

from configs import ignn_chains, ignn_demo_graphs
from deqjax.training.mesh import place_batch, place_whole
from deqjax.training.step import prepare, step_function
from experiments import ignn_nodes
from experiments.ignn_graphs import GraphTask
from experiments.ignn_nodes import NodeTask
from tests.experiments.test_ignn import CHAINS, GRAPHS, small_ppi
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_a_run_moves, assert_devices_share_out_a_batch, assert_meshes_agree, mesh_of

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
    # Five solves take long to compile.
    steps = assert_meshes_agree(task, ((2, 2, 2),) if name == "ppi" else ((8, 1, 1), (4, 2, 1), (2, 2, 2)))
    if (8, 1, 1) in steps:
        assert_devices_share_out_a_batch(steps[8, 1, 1])


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
def test_a_run_moves_from_eight_devices_to_one(tmp_path, monkeypatch):
    make_task = lambda: chains(**{"eval_every": 2, "checkpoint_every": 2, "log_every": 1})
    assert_a_run_moves(make_task, (ignn_nodes,), tmp_path, monkeypatch, rtol=1e-4)
