"""Implicit representations, trained, stopped, exported and rendered."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.io import wavfile

from deqjax.data.coordinates import coordinates
from deqjax.data.errors import DataError
from deqjax.data.images import read_image
from deqjax.data.meshes import Mesh
from deqjax.interop.inr_file import read_signals, write_signals
from deqjax.models.inr import INRConfig, Signals, representation, training_bytes
from deqjax.nn.config import DEQConfig
from deqjax.training import loop
from deqjax.training.mesh import make_mesh
from deqjax.training.state import named_leaves
from experiments import deq_inr, inr_table
from experiments.inr_data import Signal
from experiments.inr_signals import SignalTask
from experiments.inr_task import chunks, values_on_grid
from tests.experiments.inr import ROOT, configured
from tests.training.runs import assert_equal_states


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """What is not about devices runs on one of them."""
    from experiments import inr_shapes, inr_signals, inr_task

    for module in (loop, inr_signals, inr_shapes, inr_task):
        monkeypatch.setattr(module, "make_mesh", lambda _: make_mesh({"data": 1}, jax.devices()[:1]))


def picture(seed=0, side=8, channels=1, count=1, **index):
    raw = np.random.default_rng(seed).integers(0, 256, (count, side, side, channels)).astype(np.uint8)
    everything = np.arange(side * side)
    return Signal("image", raw, 0.0, index.get("train", everything), index.get("test", everything))


def trained(tmp_path, config, signal=None, make=None):
    task = SignalTask(config, signal) if make is None else make(config)
    state = loop.train(task, config, tmp_path)
    return task, state, [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


# Training ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_as_if_it_had_not_been_with_the_states_it_had(tmp_path):
    _, whole, log = trained(tmp_path / "whole", configured(data__batch_size=32))
    trained(tmp_path / "parts", configured(data__batch_size=32, steps=2))
    _, resumed, log_of_parts = trained(tmp_path / "parts", configured(data__batch_size=32))
    assert_equal_states(resumed, whole)
    paths = {"/".join(path): leaf for path, leaf in named_leaves(whole.variables).items()}
    assert bool(np.all(paths["warm/seen"])) and float(np.abs(paths["warm/z"]).min()) < float(np.abs(paths["warm/z"]).max())
    clean = lambda log: [{k: v for k, v in entry.items() if not k.startswith("time/")} for entry in log]
    assert clean(log_of_parts)[-1] == clean(log)[-1]


def test_the_solver_runs_at_the_first_visit_to_a_coordinate_only(tmp_path):
    _, _, log = trained(tmp_path, configured(data__batch_size=32, steps=5, eval_every=0))
    # Two batches of 32: two first visits.
    assert ["train/forward/steps" in entry for entry in log if "train/loss" in entry] == [True, True, False, False, False]


def test_states_may_be_solved_for_again_every_so_often(tmp_path):
    _, _, log = trained(tmp_path, configured(resolve_every=3, steps=5, eval_every=0))
    assert ["train/forward/steps" in entry for entry in log if "train/loss" in entry] == [True, False, False, True, False]


def test_the_warm_quality_is_never_reported_alone(tmp_path):
    task, _, log = trained(tmp_path, configured(steps=30, eval_every=30, optimizer__learning_rate=3e-3))
    test = log[-1]
    assert test["test/warm/gap_max"] > 0 and abs(test["test/psnr"] - test["test/psnr_warm"]) < 1
    assert test["test/psnr"] > 12 and test["test/forward/steps_max"] >= test["test/forward/steps"] > 1
    # Weights without their run have no states to compare with.
    assert "psnr_warm" not in task.evaluate(task.model(nnx.Rngs(0)), "valid")
    for name in ("reconstruction.png", "comparison.png", "psnr.png"):
        assert (tmp_path / name).stat().st_size > 0, name


def test_the_warm_quality_is_that_of_the_states_there_are():
    task = SignalTask(configured(data__batch_size=32), picture())
    model = task.model(nnx.Rngs(0))
    cold = task.evaluate(model, "valid")
    assert "psnr_warm" not in cold and "warm/gap_max" not in cold
    # One of two batches has been visited.
    batch = {name: jnp.asarray(array) for name, array in task.samples(*(array[:, 0] for array in task.dealt(0))).items()}
    z = jnp.full((32, 8), 9.0, jnp.float32)
    model.warm.remember(jnp.int32(0), z[None])
    values = model.signals.net(batch["x"], z_init=z, train=True, solver_options={"f_max_iter": 0}).values[-1]
    error = jnp.mean(jnp.square(jnp.clip((values + 1) / 2, 0, 1) - (batch["target"][:, 0] + 1) / 2))
    found = task.evaluate(model, "valid")
    assert found["psnr_warm"] == pytest.approx(float(-10 * jnp.log10(error)), abs=1e-3) and found["psnr"] == cold["psnr"]


@pytest.mark.parametrize(("network", "warm_start"), [("deq", True), ("deq", False), ("one_pass", True)])
def test_an_epoch_visits_every_coordinate_once_and_with_states_always_in_the_same_batch(network, warm_start):
    task = SignalTask(configured(data__batch_size=24, warm_start=warm_start, model__network=network), picture())
    epochs = []
    for epoch in range(2):
        batches = [task.batch(3 * epoch + k) for k in range(3)]
        counted = np.concatenate([b["x"][b["weight"] > 0] for b in batches])
        assert len(counted) == len(np.unique(counted, axis=0)) == 64
        epochs.append({int(b["block"]): b["x"].tobytes() for b in batches})
    assert (epochs[0] == epochs[1]) == (task.new_warm_start() is not None)


def test_batches_are_the_same_on_any_number_of_devices_and_none_is_empty(monkeypatch):
    for devices in (1, 8):
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        monkeypatch.setattr("experiments.inr_signals.make_mesh", lambda _, mesh=mesh: mesh)
        assert SignalTask(configured(), picture(side=25)).layout_of_batches == (632, 1)
        few = SignalTask(configured(data__batch_size=5), picture(train=np.arange(17)))
        assert few.layout_of_batches == (8, 3) and all(few.batch(step)["weight"].sum() for step in range(3))


def test_held_out_pixels_are_those_between_and_are_not_trained_on():
    config = configured("inr_astronaut.py", data__step=64)
    config.data.generalize = True
    task = SignalTask(config)
    train, test = (coordinates(index, (8, 8), "xy") for index in (task.signal.train, task.signal.test))
    assert len(train) == len(test) == 16
    np.testing.assert_allclose(test - train, 2 / 7, atol=1e-6)
    assert {x.tobytes() for x in task.batch(0)["x"]} == {x.tobytes() for x in train}
    model = task.model(nnx.Rngs(0))
    assert "psnr" in task.evaluate(model, "test") and "psnr_warm" not in task.evaluate(model, "test")


def test_slices_come_by_themselves_when_memory_is_short_and_change_nothing(tmp_path, capsys):
    _, whole, _ = trained(tmp_path / "whole", configured(steps=3, eval_every=0))
    config = configured(steps=3, eval_every=0)
    config.data.memory_gib = 2e-5
    _, short, _ = trained(tmp_path / "short", config)
    out = capsys.readouterr().out
    assert config.accumulate > 1 and "the gradient is added up" in out and f"in {config.accumulate} slice(s)" in out
    for path, leaf in named_leaves(whole.params).items():
        np.testing.assert_allclose(named_leaves(short.params)[path], leaf, atol=2e-5, err_msg="/".join(path))


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["deq", "one_pass", "siren", "ffn"])
def test_a_signal_as_weights_renders_as_its_network_without_the_signal(tmp_path, network):
    config = configured(model__network=network, warm_start=network == "deq", model__filter="gabor", model__n_hidden=40)
    config.model.n_layers = 1 if network == "deq" else 2
    task = SignalTask(config, picture(channels=3))
    model = task.model(nnx.Rngs(0))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    expected = values_on_grid(model.signals.net, (5, 9), "xy", mesh)
    sizes = {}
    for dtype, error in (("float32", 1e-5), ("float16", 3e-3), ("int8", 0.1)):
        config.export_path, config.export_dtype = str(tmp_path / f"{dtype}.inr"), dtype
        assert "dB" in task.export(model)
        sizes[dtype] = (tmp_path / f"{dtype}.inr").stat().st_size
        (net,), about = read_signals(tmp_path / f"{dtype}.inr")
        assert about == {"kind": "image", "shape": [8, 8], "order": "xy", "rate": 0.0}
        np.testing.assert_allclose(values_on_grid(net, (5, 9), "xy", mesh), expected, atol=error)
    assert sizes["int8"] < sizes["float16"] < sizes["float32"]
    config.export_path, config.render.output, config.render.scale = str(tmp_path / "float32.inr"), str(tmp_path / "r.png"), 2.0
    config.data.path = "gone.png"
    assert "16 x 16" in SignalTask(config).render()
    assert read_image(tmp_path / "r.png").shape == (16, 16, 3)


def test_a_signal_as_weights_is_solved_as_it_was_trained(tmp_path):
    settings = {"no_stat": True, "f_max_iter": 7, "eval_f_max_iter": 9, "f_options": {"damping": 0.5}}
    build = lambda rngs: representation(INRConfig(n_in=1, n_out=1, n_hidden=4), DEQConfig(**settings), rngs)
    write_signals(tmp_path / "s.inr", Signals(build, 1, nnx.Rngs(0)), {})
    (net,), _ = read_signals(tmp_path / "s.inr")
    assert {name: getattr(net.deq.config, name) for name in settings} == settings


def test_files_that_hold_no_signal_are_named(tmp_path):
    config = configured()
    for content in (b"", b"nothing", b"PK\x03\x04 cut"):
        (tmp_path / "bad.inr").write_bytes(content)
        config.export_path = str(tmp_path / "bad.inr")
        with pytest.raises(DataError, match=r"bad.inr"):
            SignalTask(config).render()
    task = SignalTask(config, picture())
    config.export_path = str(tmp_path / "cut.inr")
    task.export(task.model(nnx.Rngs(0)))
    whole = (tmp_path / "cut.inr").read_bytes()
    config.export_path, header = str(tmp_path / "bad.inr"), whole.index(b"header.npy")
    for damaged in (whole[: len(whole) // 2], whole[: header + 40] + b"damage" + whole[header + 46 :]):
        (tmp_path / "bad.inr").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            SignalTask(config).render()
    config.export_path, config.render.shape = str(tmp_path / "cut.inr"), (4,)
    with pytest.raises(DataError, match="2 axes"):
        SignalTask(config).render()
    solid = configured("inr_sdf.py", **SHAPE, export_path=str(tmp_path / "solid.inr"))
    make = deq_inr.make_task(solid)
    make.export(make.model(nnx.Rngs(0)))
    solid.render.shape = (1, 8, 8)
    with pytest.raises(DataError, match="2 or more"):
        make.render()
    config.render.shape, config.render.output = (4, 4), str(tmp_path / "a.mp3")
    with pytest.raises(DataError, match="ending"):
        SignalTask(config).render()
    config.export_dtype = "int4"
    with pytest.raises(DataError, match="int4"):
        task.export(task.model(nnx.Rngs(0)))


def test_a_state_dict_goes_out_and_in(tmp_path):
    config = configured(export_path=str(tmp_path / "w.safetensors"))
    task = SignalTask(config, picture())
    model, other = task.model(nnx.Rngs(0)), task.model(nnx.Rngs(1))
    task.export(model)
    task.import_checkpoint(config.export_path, other)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    values = [values_on_grid(fit.signals.net, (4, 4), "xy", mesh) for fit in (model, other)]
    np.testing.assert_array_equal(*values)
    with pytest.raises(DataError, match="one signal"):
        SignalTask(config, picture(count=2)).import_checkpoint(config.export_path, model)


def test_values_in_chunks_are_those_at_once():
    task = SignalTask(configured(), picture(side=7))
    model, mesh = task.model(nnx.Rngs(0)), make_mesh({"data": 1}, jax.devices()[:1])
    whole = task.evaluate(model, "valid")
    task.config.data.memory_gib = 1e-5
    assert task.chunk(49) < 49
    assert task.evaluate(model, "valid") == pytest.approx(whole, rel=1e-4)
    grids = [values_on_grid(model.signals.net, (7, 5), "xy", mesh, memory) for memory in (1.0, 1e-5)]
    np.testing.assert_allclose(*grids, atol=1e-6)
    assert [list(range(7))[start : start + 3][kept] for start, kept in chunks(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_grid_is_drawn_at_the_very_coordinates_that_are_trained_on(monkeypatch):
    monkeypatch.setattr("experiments.inr_task._values", lambda graph, mesh, state, x: x)
    net = representation(INRConfig(n_in=1, n_out=1, n_hidden=4), DEQConfig(), nnx.Rngs(0))
    drawn = values_on_grid(net, (3000,), "ij", make_mesh({"data": 1}, jax.devices()[:1]))
    np.testing.assert_array_equal(drawn, coordinates(np.arange(3000), (3000,)))


# Kinds of signals ----------------------------------------------------------------------------------------------------


def test_a_sound_of_ones_own_is_fitted_and_written(tmp_path):
    wavfile.write(tmp_path / "in.wav", 50, np.sin(np.arange(60)).astype(np.float32))
    config = configured("inr_audio.py", data__path=str(tmp_path / "in.wav"), data__step=1, model__input_scale=5.0)
    _, _, log = trained(tmp_path / "run", config)
    assert "test/psnr" in log[-1]
    rate, samples = wavfile.read(tmp_path / "run" / "reconstruction.wav")
    assert rate == 50 and samples.shape == (60,)
    assert (tmp_path / "run" / "comparison.png").is_file()


def test_silence_has_no_signal_to_noise_ratio():
    for raw, has_ratio in ((np.zeros((1, 8, 1), np.float32), False), (np.ones((1, 8, 1), np.float32), True)):
        task = SignalTask(configured("inr_audio.py", model__network="one_pass"), Signal("audio", raw, 9.0, *2 * [np.arange(8)]))
        assert ("snr" in task.evaluate(task.model(nnx.Rngs(0)), "valid")) == has_ratio


def test_a_video_has_a_quality_for_every_frame(tmp_path):
    config = configured("inr_video.py", data__name="waves", data__frames=3, data__step=8)
    _, _, log = trained(tmp_path, config)
    assert log[-1]["test/psnr_std"] > 0 and (tmp_path / "reconstruction.mp4").is_file()


def test_an_export_of_a_video_has_the_quality_of_its_evaluation(tmp_path):
    settings = {"model__network": "one_pass", "export_dtype": "float32", "export_path": str(tmp_path / "v.inr")}
    raw = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4, 1)).astype(np.uint8)
    raw[0, 1:] //= 100  # so dark that its frames differ in quality
    task = SignalTask(configured("inr_video.py", **settings), Signal("video", raw, 25.0, np.arange(48), np.arange(48)))
    model = task.model(nnx.Rngs(0))
    report = task.evaluate(model, "valid")
    assert report["psnr_std"] > 0.5 and f"renders at {report['psnr']:.2f} dB" in task.export(model)


SHAPE = {"data__batch_size": 64, "data__eval_points": 50, "data__grid": 8, "model__input_scale": 2.0, "data__step": 1}


def test_an_inside_is_learned_and_drawn(tmp_path):
    settings = SHAPE | {"data__eval_points": 400, "optimizer__learning_rate": 1e-2, "data__name": "sphere"}
    settings |= {"steps": 100, "eval_every": 100, "best_metric": "hard/iou"}
    _, _, log = trained(tmp_path, configured("inr_occupancy.py", **settings), make=deq_inr.make_task)
    losses = [entry["train/loss"] for entry in log if "train/loss" in entry]
    assert log[-1]["test/loss"] < 0.5 * losses[0] and 0 <= log[-1]["test/hard/iou"] <= 1
    assert (tmp_path / "slices.png").is_file() and (tmp_path / "hard-iou.png").is_file()


@pytest.mark.parametrize(("name", "slices"), [("inr_occupancy.py", 2), ("inr_sdf.py", 4)])
def test_points_of_a_shape_come_in_slices_when_memory_is_short(name, slices, capsys):
    config = configured(name, **SHAPE)
    config.data.memory_gib = 0.9 * 64 * training_bytes(INRConfig(n_in=3, n_out=1, n_hidden=8), DEQConfig(grad=3)) / 2**30
    assert len(deq_inr.make_task(config).batch(0)["x"]) == 64
    assert config.accumulate == slices and f"over {slices} slices" in capsys.readouterr().out


def test_an_inside_of_a_mesh_is_learned_in_its_own_box(tmp_path):
    from deqjax.data.meshes import level_set, write_mesh
    from deqjax.data.solids import signed_distance

    axis = np.linspace(-1, 1, 20)
    write_mesh(
        tmp_path / "m.ply",
        *level_set(signed_distance("sphere", np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1))),
    )
    config = configured("inr_occupancy.py", **SHAPE, steps=2, data__path=str(tmp_path / "m.ply"))
    task = deq_inr.make_task(config)
    batch = task.batch(0)
    low, high = Mesh(tmp_path / "m.ply").box
    assert np.all(batch["x"] >= low) and np.all(batch["x"] <= high) and 0 < batch["inside"].mean() < 1
    assert task.about()["span"] == [0.0, 1.0]


def test_a_distance_is_learned_from_points_and_normals(tmp_path):
    config = configured("inr_sdf.py", **SHAPE, steps=60, data__name="sphere", optimizer__learning_rate=5e-3, eval_every=60)
    task, _, log = trained(tmp_path / "exact", config, make=deq_inr.make_task)
    task.test_points = None  # they are made once
    first = task.evaluate(task.model(nnx.Rngs(0)), "test")
    assert log[-1]["test/surface_rmse"] < 0.5 * first["surface_rmse"]
    assert log[-1]["test/normal_angle"] < first["normal_angle"]
    random = np.random.default_rng(0)
    np.savetxt(tmp_path / "c.xyz", np.concatenate(task.on_surface(random, 30), axis=1))
    config.data.path = str(tmp_path / "c.xyz")
    (points,) = deq_inr.make_task(config).test_points(random).values()
    assert "distance" not in points and points["x"].shape == (100, 3) and points["on"].sum() == 50


# The table -----------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_network_and_goes_on_where_it_was(tmp_path, capsys):
    command = ["inr_table", f"--config={ROOT}/configs/inr_camera.py", f"--workdir={tmp_path}", "--config.steps=2"]
    command += ["--config.warm_start=false", "--config.data.step=64", "--config.eval_every=0"]
    command += ["--config.table.networks=('DEQ-gabor-1L8D', 'siren-2L6D')"]
    for _ in range(2):
        assert inr_table.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("Starting from scratch") == 2 and "psnr_warm" not in out  # as the command says
    rows = [line for line in out.splitlines() if line.startswith("| ")][-2:]
    assert rows[0].startswith("| DEQ-gabor-1L8D | 185 |") and rows[1].startswith("| siren-2L6D | 67 |")
    assert inr_table.main([*command, "--config.table.networks=('relu-1L2D',)"]) == 2
    assert "relu-1L2D" in capsys.readouterr().err
