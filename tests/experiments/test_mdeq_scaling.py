"""Image experiments on meshes, on platforms that are not here, and on fewer devices than they began with."""

import pytest
from flax import nnx

from configs import mdeq_digits, mdeq_shapes
from deqjax.training.mesh import place_batch
from deqjax.training.step import prepare, step_function
from experiments import image_batches
from experiments.mdeq_classify import ClassificationTask
from experiments.mdeq_segment import SegmentationTask
from tests.experiments.test_mdeq import DIGITS, SHAPES, configured
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_a_run_moves, assert_meshes_agree, mesh_of


def digits(**settings):
    return ClassificationTask(configured(mdeq_digits, DIGITS | settings))


def shapes(**settings):
    return SegmentationTask(configured(mdeq_shapes, SHAPES | settings))


def test_every_mesh_computes_what_one_device_does():
    """The statistics of batch normalisation among the rest."""
    assert_meshes_agree(digits(), ((8, 1, 1), (2, 4, 1)))


def test_every_mesh_segments_as_one_device_does():
    assert_meshes_agree(shapes(), ((4, 2, 1),))


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one(tmp_path, monkeypatch):
    def without_pictures():
        # Other schedules would follow the number of steps.
        task = digits(**{"optimizer.schedule": "constant"})
        task.show = None
        return task

    assert_a_run_moves(without_pictures, (image_batches,), tmp_path, monkeypatch, rtol=1e-4)


@pytest.mark.parametrize("make_task", [digits, shapes])
def test_training_and_evaluation_lower_for_every_platform(make_task):
    task, mesh = make_task(), mesh_of((2, 2, 2))
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)
    graph, state = nnx.split(nnx.eval_shape(lambda: task.model(nnx.Rngs(0))))
    evaluation = next(iter(task.evaluation("test")))
    lowers_everywhere(lambda state, batch: task._metrics(graph, state, batch), state, evaluation)
