"""The experiment on optical flow, through its command line."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from configs import flow_chairs, flow_kitti, flow_sintel, flow_things, flow_warped_photos
from deqjax.data.errors import DataError
from deqjax.data.flow_files import read_flo, read_kitti, write_kitti
from deqjax.data.flow_sets import FlowSet, Pair
from deqjax.data.images import pillow
from deqjax.models.flow import DEQFlow, Estimate, FlowConfig, State
from deqjax.nn.config import DEQConfig
from deqjax.optim.schedules import learning_rate
from deqjax.training.errors import UserError
from deqjax.training.mesh import place_batch
from deqjax.training.start import changes
from deqjax.training.step import prepare, step_function
from experiments import deq_flow, image_batches
from experiments.deq_flow import FlowTask
from experiments.flow_data import Mix, Part, training_mix
from experiments.flow_evaluation import estimator, evaluate_set, submit
from experiments.flow_pictures import draw_frames, warp_error
from experiments.flow_warm_start import WarmStartTask, steps_to, table
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_meshes_agree, mesh_of

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "flow_warped_photos.py"
SMALL = {"data.n_train": 8, "data.n_valid": 2, "data.size": (32, 40), "data.motion": 3.0, "data.crop": (24, 32)}
SMALL |= {
    "data.batch_size": 8,
    "data.threads": 0,
    "deq.f_max_iter": 1,
    "deq.n_states": 1,
    "deq.eval_f_max_iter": 1,
    "viz.steps": (1,),
}
SMALL |= {"steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tmp_path_factory.mktemp("photos")


def settings_of(photos, **changes):
    return {**SMALL, "data.dir": str(photos), **changes}


def command(workdir, settings, *extra):
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["deq_flow", f"--config={CONFIG}", *flags, f"--workdir={workdir}", *extra]


def small_task(photos, **changes):
    config = flow_warped_photos.get_config()
    config.update_from_flattened_dict(settings_of(photos, **changes))
    return FlowTask(config)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_resumes_and_its_weights_can_be_evaluated_exported_and_drawn(tmp_path, photos, capsys):
    unbroken, settings = tmp_path / "unbroken", settings_of(photos)
    assert deq_flow.main(command(unbroken, settings)) == 0
    assert (unbroken / "samples.png").stat().st_size and (unbroken / "convergence.png").stat().st_size
    expected, valid = lines(unbroken)[1:]
    assert expected["step"] == 2 and {"valid/1px", "valid/3px", "valid/5px", "valid/f1"} <= valid.keys()

    # Again, from its first checkpoint.
    shutil.copytree(unbroken, resumed := tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "2")
    assert deq_flow.main(command(resumed, settings)) == 0
    assert "Restored step 1" in capsys.readouterr().out
    assert lines(resumed)[1]["train/loss"] == expected["train/loss"]

    weights = tmp_path / "weights.safetensors"
    assert deq_flow.main(command(unbroken, {**settings, "export_path": weights}, "--mode=export")) == 0
    # The weights of a run, and those of a file, whatever they were trained on.
    assert deq_flow.main(command(tmp_path / "other", {**settings, "init_from": weights}, "--mode=eval")) == 0
    assert f"EPE {valid['valid/epe']:.3f} (of zero flow " in capsys.readouterr().out
    clip, root = tmp_path / "clip", tmp_path / "data"
    frames(clip, 3)
    drawn = {**settings, "viz.input": clip, "viz.output": tmp_path / "drawn", "warm_start": True, "data.crop": (16, 24)}
    assert deq_flow.main(command(tmp_path / "other", {**drawn, "init_from": unbroken}, "--mode=viz")) == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        *("f0_flow.png", "f0_warp_error.png", "f1_flow.png", "f1_warp_error.png")
    ]
    benchmark(root)
    chosen = {**settings, "data.dir": root, "submit.path": tmp_path / "sintel_files"}
    assert deq_flow.main(command(unbroken, chosen, "--mode=submit")) == 0
    assert len(list((tmp_path / "sintel_files").rglob("*.flo"))) == 4
    assert read_flo(tmp_path / "sintel_files/final/cave/frame0002.flo").shape == (32, 40, 2)
    assert submit("kitti", root, tmp_path / "kitti_files", lambda mode: Still()) == 1
    assert read_kitti(tmp_path / "kitti_files/000000_10.png")[0].shape == (32, 40, 2)


def frames(folder, n, size=(32, 40)):
    # As large as the photographs, so that nothing is compiled again.
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for k in range(n):
        pillow().fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"f{k}.png")


def benchmark(root):
    """Test splits without flow."""
    for rendering in ("clean", "final"):
        frames(root / "Sintel/test" / rendering / "cave", 3)
    frames(root / "KITTI/testing/image_2", 2)
    for k in range(2):
        (root / f"KITTI/testing/image_2/f{k}.png").rename(root / f"KITTI/testing/image_2/000000_1{k}.png")


def test_mistakes_end_in_a_sentence(tmp_path, photos, capsys):
    for settings, words in (
        ({"data.stage": "sintle"}, "data.stage='sintle'"),
        ({"data.crop": (24, 33)}, "multiples of 8"),
        ({"evaluate": ("kiti",)}, "did you mean 'kitti'"),
        ({"evaluate": ()}, "evaluate is empty"),
        ({"evaluate": ("kitti",)}, "config.evaluate names kitti, but: KITTI 2015 is not there"),
        ({"viz.steps": (4, 2)}, "viz.steps=(4, 2)"),
        ({"data.ahead": 0}, "data.ahead=0"),
        ({"model.size": "medium"}, "size='medium'"),
        ({"data.stage": "chairs"}, "FlyingChairs is not there"),
        ({"deq.f_sover": "broyden"}, "did you mean"),
    ):
        assert deq_flow.main(command(tmp_path / "run", settings_of(photos, **settings))) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    for settings in ({"data.stage": "warped_photos"}, {"evaluate": ("warped_photos",)}):
        config = flow_chairs.get_config()
        config.update_from_flattened_dict(settings)
        with pytest.raises(ValueError, match=r"warped_photos needs data\.n_train, data\.n_valid, .*flow_warped_photos\.py"):
            FlowTask(config)


# Data of the stages --------------------------------------------------------------------------------------------------


def test_a_mix_holds_each_set_as_often_as_it_counts(photos):
    pairs = training_mix(small_task(photos).config.data).parts[0].pairs

    class Named:
        def __init__(self, name):
            self.name = name

        def __call__(self, sample, random):
            return sample._replace(flow=np.full(sample.flow.shape, self.name))

    mix = Mix([Part(pairs, 3, Named(1)), Part(pairs, 1, Named(2))])
    assert len(mix) == 4 * len(pairs)
    assert [float(mix.sample(n, (0,))["flow"][0, 0, 0]) for n in (0, 23, 24, 31)] == [1, 1, 2, 2]
    np.testing.assert_array_equal(mix.sample(1, (0,))["image1"], mix.sample(9, (0,))["image1"])


def test_batches_follow_from_seed_and_step(photos, monkeypatch):
    first, again = (small_task(photos).data("train") for _ in range(2))
    again.batch(0)
    for name, array in first.batch(3).items():
        np.testing.assert_array_equal(array, again.batch(3)[name])
    assert np.any(first.batch(3)["image1"] != first.batch(4)["image1"])
    shared = small_task(photos, **{"data.batch_size": 6})
    shared.config.mesh = {"data": 2, "fsdp": 2, "model": 2}
    monkeypatch.setattr(image_batches, "process_share", lambda mesh: (0, 4))
    with pytest.raises(UserError, match="The batch has 6 rows, which 4 devices cannot share evenly"):
        shared.data("train")


def test_every_recipe_is_one_that_can_be_built():
    for module in (flow_chairs, flow_things, flow_sintel, flow_kitti):
        for variant in ("base", "huge", "base+gma"):
            config = module.get_config(variant)
            FlowConfig(**config.model), DEQConfig.from_config(config.deq).eval_budget()
            # The last update comes before the rate's last one.
            rate = learning_rate(config.optimizer)
            assert float(rate(0)) == pytest.approx(config.optimizer.learning_rate / 25)
            assert 0 < float(rate(config.steps - 1)) < 0.01 * config.optimizer.learning_rate
    assert DEQConfig.from_config(flow_chairs.get_config().deq).step_lists(36) == (6,) * 6
    assert DEQConfig.from_config(flow_things.get_config().deq).eval_budget() == 60
    # A longer run has a longer schedule, with which it may go on; another schedule of the same run is another run.
    config = flow_warped_photos.get_config()
    before, config.steps = config.to_dict(), 2000
    assert config.optimizer.max_steps == 2100 and all(allowed for _, allowed in changes(before, config.to_dict()))
    config.optimizer.max_steps = 2200
    assert config.steps == 2000 and not all(allowed for _, allowed in changes(before, config.to_dict()))
    # The Jacobian term is not in this loss, and the tolerance of plain steps needs no annealing.
    others = {"jac_loss_weight", "jac_loss_freq", "jac_incremental", "no_stat", "f_tol_start", "f_tol_anneal_steps"}
    assert {field.name for field in dataclasses.fields(DEQConfig)} - set(flow_chairs.get_config().deq) == others
    for module, variant in ((flow_chairs, "medium"), (flow_sintel, "huge_1step"), (flow_kitti, "huge_3x")):
        with pytest.raises(ValueError, match=variant):
            module.get_config(variant)


# Pictures ------------------------------------------------------------------------------------------------------------


class Still:
    """An estimator that says that all moves one pixel to the right."""

    def __call__(self, image1, image2, start):
        flow = np.zeros((1, *image1.shape[:2], 2), np.float32)
        flow[..., 0] = 1
        return Estimate(flow, State(jax.numpy.zeros((1, 3, 4, 2)), jax.numpy.zeros((1, 3, 4, 2))), None)


def test_videos_go_in_and_come_out_and_too_short_ones_are_refused(tmp_path):
    import av

    frames(tmp_path / "clip", 3)
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 28, 20, "yuv420p"
        for k in range(3):
            image = np.full((20, 28, 3), 60 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    written = draw_frames(str(path), tmp_path / "out", Still())
    with av.open(str(written[0])) as container:
        sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert sizes == [(3 * 28, 20)] * 2

    (tmp_path / "clip/f1.png").unlink(), (tmp_path / "clip/f2.png").unlink()
    with pytest.raises(ValueError, match="fewer than two frames"):
        draw_frames(str(tmp_path / "clip"), tmp_path / "out", Still())
    frames(tmp_path / "other", 1, size=(24, 40))
    with pytest.raises(ValueError, match="one size"):
        draw_frames(f"{tmp_path}/clip/f0.png,{tmp_path}/other/f0.png", tmp_path / "out", Still())
    with pytest.raises(ValueError, match="same name"):
        draw_frames(",".join([f"{tmp_path}/clip/f0.png"] * 3), tmp_path / "out", Still())
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="no video"):
        draw_frames(str(tmp_path / "bad.mp4"), tmp_path / "out", Still())


def test_the_warp_error_of_the_true_flow_is_zero():
    image1 = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    flow = np.zeros((6, 9, 2))
    flow[..., 0] = 1
    assert not np.any(warp_error(image1, np.roll(image1, 1, axis=1), flow))
    assert np.any(warp_error(image1, image1, flow))


def test_the_table_of_warm_starts_counts_steps_to_a_level():
    assert [steps_to(np.array([5.0, 3.0, 1.0]), level) for level in (4.0, 1.0)] == [2, 3]
    text = table({"cold": np.array([[10.0, 2.0, 0.1]]), "warm_start": np.array([[2.0, 0.5, 0.1]])})
    assert "| 2 | 3.0 | 2.0 |" in text


def test_warm_starts_need_three_frames_of_one_size(tmp_path, photos):
    task = small_task(photos, **{"viz.input": str(tmp_path)})
    frames(tmp_path, 3)
    frames(tmp_path, 1, (24, 40))
    for message in ("all frames must have one size", "three frames or more"):
        with pytest.raises(DataError, match=message):
            WarmStartTask(task.config).report(None)
        (tmp_path / "f2.png").unlink(missing_ok=True)


def test_scores_of_a_set_are_over_pixels_or_over_pairs(tmp_path):
    """Of pairs with 1 and 3 valid pixels, which move by 1 and 5 pixels to the right."""
    pairs = []
    for k, (n, u) in enumerate(((1, 1), (3, 5))):
        frames(tmp_path / f"{k}", 2)
        flow, valid = np.zeros((32, 40, 2), np.float32), np.zeros((32, 40))
        flow[..., 0] = u
        valid.flat[:n] = 1
        write_kitti(tmp_path / f"{k}.png", flow, valid)
        pairs.append(Pair(tmp_path / f"{k}/f0.png", tmp_path / f"{k}/f1.png", tmp_path / f"{k}.png", str(k)))

    def estimate(*arguments):
        return Still()(*arguments)._replace(spectral_radius=np.array([0.75]))

    dense, sparse = (evaluate_set(FlowSet("own", pairs, sparse=sparse), estimate) for sparse in (False, True))
    assert (dense["epe"], sparse["epe"]) == (3, 2) and (dense["zero_flow"], sparse["zero_flow"]) == (4, 3)
    for found in (dense, sparse):
        assert (found["1px"], found["5px"], found["f1"], found["spectral_radius"]) == (25, 100, 75, 0.75)
    found = evaluate_set(FlowSet("own", pairs), lambda *frames: Still()(*frames)._replace(flow=np.full((1, 32, 40, 2), np.nan)))
    assert np.isnan(found["epe"]) and (found["5px"], found["f1"]) == (0, 100)


def test_evaluations_in_the_course_of_training_compile_once(monkeypatch):
    abstract = nnx.eval_shape(lambda: DEQFlow(FlowConfig(size="tiny"), DEQConfig(), nnx.Rngs(0)))
    traced, image = [], np.zeros((16, 24, 3), np.uint8)

    def call(model, image1, image2, *, start, mode):
        traced.append(mode)
        return Estimate(image1[..., :2] + model.mask.conv1.bias[0], start, None)

    monkeypatch.setattr(DEQFlow, "__call__", call)
    for weight in (1, 2):
        graph, state = nnx.split(abstract)
        model = nnx.merge(graph, jax.tree.map(lambda x, weight=weight: np.full(x.shape, weight, x.dtype), state))
        for mode in ("sintel", "kitti"):
            np.testing.assert_array_equal(estimator(model, mode)(image, image).flow, weight)
    assert traced == ["sintel", "kitti"]


# Many devices --------------------------------------------------------------------------------------------------------


def on_meshes(photos):
    task = small_task(photos, **{"deq.f_max_iter": 2, "optimizer.name": "sgd", "optimizer.weight_decay": 0.0})
    task.config.optimizer.momentum = 0.9
    task.config.optimizer.clip = 0.0
    return task


def test_eight_devices_compute_what_one_does(photos):
    assert_meshes_agree(on_meshes(photos), ((2, 2, 2),), tol=5e-4)


def test_training_lowers_for_every_platform(photos):
    task, mesh = on_meshes(photos), mesh_of((2, 2, 2))
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)
