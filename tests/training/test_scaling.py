"""Many devices: the same numbers as on one, arrays where they should be, and no more talk than needed."""

import inspect

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from deqjax.nn.variables import AdjointProbe
from deqjax.training.errors import UserError
from deqjax.training.layout import parameter_spec
from deqjax.training.mesh import make_mesh, place_batch, process_share
from deqjax.training.step import loss_function, prepare
from tests.training.collectives import collectives
from tests.training.meshes import SHAPES, compiled_step, loss_and_gradient, mesh_of
from tests.training.runs import assert_close_states, stopped, train
from tests.training.tiny import TinyTask, get_config

SGD = {"optimizer.name": "sgd", "optimizer.momentum": 0.5, "optimizer.clip": 0.0}


def tiny(**changes):
    config = get_config("wide")
    config.optimizer.momentum = 0.0
    config.update_from_flattened_dict(changes)
    return TinyTask(config)


@pytest.fixture(scope="module")
def on_one_device():
    return loss_and_gradient(tiny(**SGD), mesh_of((1, 1, 1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_computes_what_one_device_does(shape, on_one_device):
    for path, array in loss_and_gradient(tiny(**SGD), mesh_of(shape)).items():
        np.testing.assert_allclose(array, on_one_device[path], rtol=1e-5, atol=1e-6, err_msg="/".join(path))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)])
def test_a_batch_in_slices_has_the_gradient_of_the_whole(shape, on_one_device, monkeypatch):
    # Dropout and noise are drawn per slice, and statistics follow each slice.
    quiet = {**SGD, "dropout": 0.0, "noise": 0.0}
    whole = loss_and_gradient(tiny(**quiet), mesh_of((1, 1, 1)))
    sliced = loss_and_gradient(tiny(**quiet, accumulate=2), mesh_of(shape))
    assert whole.keys() == sliced.keys()
    for path in whole:
        if path[:2] not in (("variables", "mean"), ("variables", "dropout")):
            np.testing.assert_allclose(sliced[path], whole[path], rtol=1e-5, atol=1e-6, err_msg="/".join(path))


def test_every_step_and_every_slice_draws_with_a_key_of_its_own():
    class Drawing(TinyTask):
        def loss(self, model, batch, key, step):
            return jax.random.normal(key), {}

    graphdef, *states = nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Param, AdjointProbe, ...)
    drawn = [
        float(loss_function(Drawing(get_config()), graphdef, seed)(*states, {}, step, part)[0])
        for seed in (0, 1)
        for step in (0, 1)
        for part in (None, 0, 1)
    ]
    assert len(set(drawn)) == 12


def test_slices_that_rows_do_not_fill_are_an_error():
    with pytest.raises(UserError, match=r"16 rows, which 8 devices cannot share evenly, each in 3 slices .*multiple of 24"):
        compiled_step(tiny(accumulate=3), mesh_of((8, 1, 1)))


def test_a_run_in_slices_resumes_like_any_other(tmp_path):
    unbroken = train(tmp_path / "unbroken", accumulate=2)
    stopped(tmp_path / "broken", 5, accumulate=2)
    assert_close_states(train(tmp_path / "broken", accumulate=2), unbroken)


def test_parameters_moments_and_averages_are_split_over_fsdp():
    task = tiny(ema=0.9)
    mesh = mesh_of((2, 4, 1))
    program = prepare(task, task.config, mesh, place_batch(mesh, task.batch(0)))
    state = program.init()
    for tree in (state.params, state.ema):
        assert tree["linear"]["kernel"].get_value().sharding.spec == P("fsdp", None)
    moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.shape == (4, 2)]
    assert len(moments) == 2 and all(leaf.addressable_shards[0].data.shape == (1, 2) for leaf in moments)
    assert state.variables["memory"].get_value().sharding.spec == P(("data", "fsdp"))


def test_what_a_layout_says_is_done_where_it_divides():
    layout = [("qkv/kernel", 1, 6), ("kernel", 0, 100)]
    spec = lambda path, shape, **sizes: parameter_spec({"fsdp": 1, "model": 1} | sizes, path, shape, layout)
    assert spec("a/qkv/kernel", (8, 48), model=2) == P(None, "model")
    assert spec("opt/0/a/qkv/kernel/mu", (8, 48), model=3) == P(None, "model")
    assert spec("a/qkv/kernel", (8, 48), model=4) == P(None, None)  # six heads in four parts
    assert spec("a/kernel", (100, 8), model=2, fsdp=2) == P("model", "fsdp")
    assert spec("a/kernel", (101, 7), model=2, fsdp=2) == P(None, None)
    assert spec("other", (4, 8, 6), fsdp=2) == P(None, "fsdp", None)  # the longest
    assert spec("a/bias", (8,), model=2) == P(None)
    assert spec("a/kernel", (), model=2, fsdp=2) == P()


def test_data_parallel_devices_talk_once_per_step_and_once_per_convergence_check():
    _, step, _ = compiled_step(tiny(), mesh_of((8, 1, 1)))
    found = collectives(step)
    in_loops = [c for c in found if "while" in c.scope]
    assert [(c.kind, c.entries) for c in in_loops] == [("all-reduce", 1)] * 2  # the solve, and its adjoint
    gradients = [c for c in found if c not in in_loops]
    assert [c.kind for c in gradients] == ["all-reduce"] and gradients[0].entries >= 10


def test_weights_split_over_fsdp_are_put_together_outside_the_solve():
    _, step, _ = compiled_step(tiny(), mesh_of((2, 4, 1)))
    found = collectives(step)
    assert {c.entries for c in found if "while" in c.scope} == {1}
    assert any(c.kind == "all-gather" for c in found)


def test_each_process_feeds_the_rows_of_its_devices(monkeypatch):
    class Device:
        def __init__(self, process):
            self.process_index = process

    class Mesh:
        def __init__(self, processes):
            self.devices = np.vectorize(Device, otypes=[object])(np.asarray(processes))
            self.shape = dict(zip(("data", "fsdp", "model"), self.devices.shape, strict=True))

    shares = {}
    for name, processes in {
        "a row each": [[[0]], [[0]], [[1]], [[1]]],
        "one row over two": [[[0, 1]], [[2, 3]]],
        "fsdp over two": [[[0], [1]]],
    }.items():
        for process in range(np.max(processes) + 1):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            shares.setdefault(name, []).append(inspect.unwrap(process_share)(Mesh(processes)))
    assert shares == {
        "a row each": [(0, 2), (1, 2)],
        "one row over two": [(0, 2), (0, 2), (1, 2), (1, 2)],
        "fsdp over two": [(0, 2), (1, 2)],
    }


@pytest.mark.parametrize("sizes", [{"data": 0, "fsdp": -1}, {"data": -1, "fsdp": 3}, {"data": -1, "model": 16}])
def test_sizes_that_do_not_multiply_are_an_error(sizes):
    with pytest.raises(UserError, match="8 devices: the sizes must multiply"):
        make_mesh(sizes)


def test_a_run_moves_from_eight_devices_to_two_to_one(tmp_path, monkeypatch):
    from deqjax.training import loop

    expected = train(tmp_path / "unbroken")
    sizes = {8: {"data": 2, "fsdp": 4}, 2: {"fsdp": 2}, 1: {}}
    for count, steps in ((8, 5), (2, 9), (1, 12)):
        monkeypatch.setattr(loop, "make_mesh", lambda _, n=count: make_mesh(sizes[n], jax.devices()[:n]))
        state = train(tmp_path / "moved", steps=steps)
    assert_close_states(state, expected)
