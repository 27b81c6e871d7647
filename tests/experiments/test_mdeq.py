"""Image experiments: from training to pictures, the phases of training, meshes and other platforms, what they refuse."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from benchmarks import mdeq_step
from configs import mdeq_cifar10, mdeq_cityscapes, mdeq_digits, mdeq_imagenet, mdeq_shapes
from deqjax.data.errors import DataError
from deqjax.models.mdeq import MDEQConfig
from deqjax.nn.config import DEQConfig
from experiments import image_batches
from experiments.image_batches import skipped
from experiments.image_losses import IGNORED, ohem_cross_entropy
from experiments.image_pictures import overlay, voc_palette
from experiments.image_training import TRAINING, forward, jacobian_weight, regularises
from experiments.mdeq_classify import ClassificationTask
from experiments.mdeq_classify import main as classify
from experiments.mdeq_segment import SegmentationTask
from experiments.mdeq_segment import main as segment
from tests.data.test_image_sets import write_cityscapes, write_folders

# Everything small, plain steps, one step for the gradient: what compiles fastest.
TINY = {
    "deq.f_solver": "picard",
    "deq.f_max_iter": 4,
    "deq.eval_f_max_iter": 3,
    "deq.hook_ift": False,
    "deq.jac_loss_weight": 0.0,
    "model.channels": (4, 4),
    "model.n_groups": 2,
    "model.expansion": 2.0,
    "model.dropout": 0.0,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "data.batch_size": 16,
    "steps": 2,
    "log_every": 1,
    "eval_every": 2,
    "checkpoint_every": 2,
}
# One map here, two in segmentation.
DIGITS = TINY | {"model.channels": (4,), "model.head_channels": (2,), "model.final_channels": 4, "data.eval_batch_size": 160}
SHAPES = TINY | {"data.crop": (16, 16), "data.eval_size": (16, 16), "data.eval_batch_size": 8, "data.train_images": 32}
SHAPES |= {"data.eval_images": 12, "pictures": 3}


def configured(base, settings, **more):
    config = base.get_config()
    config.update_from_flattened_dict(settings | more)
    return config


def flags(settings):
    return [f"--config.{name}={value}" for name, value in settings.items()]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# From training to pictures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_classifier(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classifier")
    run = ["classify", "--config=configs/mdeq_digits.py", f"--workdir={workdir}", *flags(DIGITS)]
    assert classify(run) == 0
    return workdir, run


def test_a_classifier_trains_evaluates_and_shows_its_confusion(trained_classifier):
    workdir, _ = trained_classifier
    entries = lines(workdir)
    (test,) = [entry for entry in entries if "test/accuracy" in entry]
    assert 0 <= test["test/accuracy"] <= 1 and test["test/forward/steps"] == 3
    assert [entry["train/forward/steps"] for entry in entries if "train/loss" in entry] == [4, 4]
    assert Image.open(workdir / "confusion.png").size[0] > 100


def test_one_solve_gives_the_accuracy_at_every_number_of_steps(trained_classifier, tmp_path, capsys):
    workdir, run = trained_classifier
    assert classify([*run, "--mode=anytime", f"--config.anytime.out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "anytime.json").read_text())
    assert [row["steps"] for row in rows] == [1, 2, 3] and (tmp_path / "anytime.png").is_file()
    # The last row is what evaluation with that budget finds.
    (test,) = [entry for entry in lines(workdir) if "test/accuracy" in entry]
    np.testing.assert_allclose(rows[-1]["accuracy"], test["test/accuracy"], atol=1e-6)
    np.testing.assert_allclose(rows[-1]["loss"], test["test/loss"], rtol=1e-5)
    np.testing.assert_allclose(rows[-1]["residual"], test["test/forward/rel"], rtol=1e-4)
    assert "3  accuracy" in capsys.readouterr().out
    for flag, message in (
        ("steps=(3,2)", "must be numbers that increase"),
        ("split=tset", "must be one of train, valid, test"),
    ):
        assert classify([*run, "--mode=anytime", f"--config.anytime.{flag}"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_exported_weights_come_back(trained_classifier, tmp_path, capsys):
    workdir, run = trained_classifier
    file = tmp_path / "weights.safetensors"
    assert classify([*run, "--mode=export", f"--config.export_path={file}"]) == 0
    elsewhere = [argument for argument in run if not argument.startswith("--workdir")]
    assert classify([*elsewhere, f"--workdir={tmp_path}", "--mode=eval", f"--config.init_from={file}"]) == 0
    (test,) = [entry for entry in lines(workdir) if "test/accuracy" in entry]
    assert f"accuracy {test['test/accuracy']:.4g}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained_segmenter(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("segmenter")
    run = ["segment", "--config=configs/mdeq_shapes.py", f"--workdir={workdir}", *flags(SHAPES)]
    assert segment(run) == 0
    return workdir, run


def test_a_segmenter_trains_evaluates_and_shows_overlays(trained_segmenter):
    workdir, _ = trained_segmenter
    (test,) = [entry for entry in lines(workdir) if "test/miou" in entry]
    ious = [test[f"test/iou/{name}"] for name in ("ground", "disc", "square", "triangle")]
    np.testing.assert_allclose(test["test/miou"], np.mean(ious))
    assert 0 <= test["test/pixel_accuracy"] <= 1 and (workdir / "confusion.png").is_file()
    pictures = sorted((workdir / "overlays").iterdir())
    assert len(pictures) == 3 and Image.open(pictures[0]).size == (48, 16)


def test_one_solve_gives_the_miou_at_every_number_of_steps(trained_segmenter, tmp_path):
    workdir, run = trained_segmenter
    assert segment([*run, "--mode=anytime", f"--config.anytime.out={tmp_path}", "--config.anytime.steps=(1,3)"]) == 0
    rows = json.loads((tmp_path / "anytime.json").read_text())
    (test,) = [entry for entry in lines(workdir) if "test/miou" in entry]
    assert [row["steps"] for row in rows] == [1, 3]
    np.testing.assert_allclose([rows[-1][name] for name in ("miou", "loss")], [test["test/miou"], test["test/loss"]], rtol=1e-5)


def test_pictures_of_any_size_are_labelled(trained_segmenter, tmp_path, capsys):
    _, run = trained_segmenter
    (tmp_path / "in").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (13, 18, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "in" / "street.png")
    predict = [*run, "--mode=predict", f"--config.predict.folder={tmp_path / 'in'}", f"--config.predict.out={tmp_path / 'out'}"]
    assert segment(predict) == 0
    labels = Image.open(tmp_path / "out" / "street_labels.png")
    assert labels.mode == "P" and labels.size == (18, 13) and np.asarray(labels).max() < 4
    assert Image.open(tmp_path / "out" / "street_overlay.png").size == (18, 13)
    assert segment([*run, "--mode=predict"]) == 2
    assert "config.predict.folder is empty" in capsys.readouterr().err


def test_damaged_pictures_are_named_and_folders_below_kept_apart(trained_segmenter, tmp_path, capsys):
    _, run = trained_segmenter
    for place in ("a", "b"):
        (tmp_path / "in" / place).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "in" / place / "same.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    predict = [*run, "--mode=predict", f"--config.predict.folder={tmp_path / 'in'}", f"--config.predict.out={tmp_path / 'out'}"]
    assert segment(predict) == 0
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*_labels.png")) == [
        "a/same_labels.png",
        "b/same_labels.png",
    ]
    out = capsys.readouterr().out
    assert "broken.jpg is no picture" in out and "of 2 pictures" in out
    (tmp_path / "in" / "b" / "same.jpg").write_bytes(b"")
    assert segment(predict) == 2
    assert "b/same.jpg and" in (err := capsys.readouterr().err) and "have the same name" in " ".join(err.split())


def test_overlays_and_palettes():
    image, labels = np.full((2, 2, 1), 0.5), np.asarray([[0, 1], [255, 1]])
    out = overlay(image, labels, np.asarray([[255, 0, 0], [0, 255, 0]]), alpha=0.5)
    np.testing.assert_allclose(out[0, 0], [0.75, 0.25, 0.25])
    np.testing.assert_allclose(out[1, 0], [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(voc_palette(4), [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]])


def test_the_hardest_pixels_are_counted_among_those_that_are_not_ignored():
    """As in the original the pixel that sets the bound is left out itself."""
    right = jnp.asarray([0.3, 0.5, 0.5, 0.1, 0.5, 0.2])
    labels, logits = jnp.asarray([1, IGNORED, IGNORED, 1, IGNORED, 1]), jnp.log(jnp.stack([1 - right, right], axis=-1))
    for min_kept, kept in ((1, [0.1]), (2, [0.1, 0.2]), (9, [0.1, 0.2])):
        loss = ohem_cross_entropy(logits, labels, threshold=0.0, min_kept=min_kept)
        np.testing.assert_allclose(loss, -np.mean(np.log(kept)), rtol=1e-5)


# The phases of training ----------------------------------------------------------------------------------------------


def test_the_weight_of_the_jacobian_term_follows_the_published_schedule():
    deq = DEQConfig(jac_loss_weight=2.0, jac_loss_freq=1.0, jac_incremental=10)
    training = TRAINING | {"pretrain_steps": 5, "pretrain_jac_loss_weight": 0.03, "jac_stop_step": 40}
    weights = [float(jacobian_weight(deq, training, jnp.asarray(step))) for step in (0, 4, 5, 14, 15, 26, 39, 40)]
    np.testing.assert_allclose(weights, [0.03, 0.03, 2.0, 2.0, 2.1, 2.2, 2.3, 0.0], rtol=1e-6)
    assert regularises(DEQConfig(jac_incremental=10), TRAINING) and not regularises(DEQConfig(), TRAINING)


def test_the_unrolled_phase_ends_and_regularised_steps_vary_their_budget():
    phases = {"training.pretrain_steps": 1, "training.pretrain_unroll": 2, "training.f_max_iter_jitter": 3}
    jacobian = {"deq.jac_loss_weight": 1.0, "deq.jac_loss_freq": 0.7, "deq.f_tol": 0.0}
    task = ClassificationTask(configured(mdeq_digits, DIGITS, **phases, **jacobian))
    graph, state = nnx.split(task.model(nnx.Rngs(0)))

    @jax.jit
    def run(state, step):
        images = jnp.ones((2, 8, 8, 1)) * jnp.arange(2.0)[:, None, None, None]
        key = jax.random.fold_in(jax.random.key(0), step)
        out = forward(nnx.merge(graph, state, copy=True), images, key, step, task.training)
        return out.vitals["forward/steps"][0] / 2, out.jacobian

    taken, terms = np.asarray([run(state, step) for step in range(12)]).T
    assert taken[0] == 2 and terms[0] == 0
    taken, regularised = taken[1:], terms[1:] > 0
    assert 0 < regularised.sum() < 11
    assert set(taken[~regularised]) == {4.0} and set(taken[regularised]) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(set(taken[regularised])) > 1


@pytest.mark.slow
def test_memory_of_implicit_gradients_does_not_grow_with_the_steps_of_the_solver():
    memory = []
    for steps in (3, 30):
        config = configured(mdeq_shapes, SHAPES, **{"data.batch_size": 8})
        config.deq.update(mdeq_step.IMPLICIT | {"f_max_iter": steps, "b_max_iter": steps})
        memory.append(mdeq_step.measure(config, (32, 32), steps=0)["temporary_gib"])
    # Two traces of residuals per image grow.
    assert memory[1] - memory[0] < 1e-4 * memory[0] + 4 * 27 * 8 * 8 / 2**30


# Data and settings ---------------------------------------------------------------------------------------------------


def folders_config(root):
    config = mdeq_imagenet.get_config("small")
    changes = {"data.dir": str(root), "data.batch_size": 2, "data.eval_batch_size": 3, "data.image_size": 32, "data.resize": 36}
    config.update_from_flattened_dict(changes | {"model.n_classes": 2})
    return config


def test_damaged_images_are_replaced_in_training_and_do_not_count_in_evaluation(tmp_path, capsys):
    for split in ("train", "val"):
        write_folders(tmp_path / split)
        (tmp_path / split / "n02" / "1.JPEG").write_bytes(b"broken")
    task = ClassificationTask(folders_config(tmp_path))
    stream = task.data("train")
    for step in range(4):
        batch = stream.batch(step)
        assert batch["images"].shape == (2, 32, 32, 3) and batch["labels"].shape == (2,)
        for name, array in task.data("train").batch(step).items():
            np.testing.assert_array_equal(array, batch[name])
    batches = list(task.evaluation("test"))
    np.testing.assert_array_equal(np.concatenate([b["counted"] for b in batches]), [True, True, True, False, False, False])
    assert len(task.damaged["test"]) == len(task.damaged["train"]) == 1
    assert "n02/1.JPEG" in capsys.readouterr().out


def test_the_shares_of_several_processes_are_the_batch_of_one(monkeypatch):
    task = ClassificationTask(configured(mdeq_digits, DIGITS, **{"data.augment": "crop_flip"}))
    share = lambda: task._training_jobs(3)[0]()["images"]
    whole, shares = share(), []
    for part in range(2):
        monkeypatch.setattr(image_batches, "process_share", lambda mesh, part=part: (part, 2))
        shares.append(share())
    np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_cityscapes_is_cropped_in_training_and_whole_in_evaluation(tmp_path):
    for split in ("train", "val"):
        write_cityscapes(tmp_path, split, size=(64, 128))
    config = mdeq_cityscapes.get_config("small")
    changes = {"data.dir": str(tmp_path), "data.crop": (32, 64), "data.eval_size": (64, 128), "data.batch_size": 2}
    config.update_from_flattened_dict(changes | {"data.base_size": 128})
    task = SegmentationTask(config)
    batch = task.data("train").batch(0)
    assert batch["images"].shape == (2, 32, 64, 3) and set(np.unique(batch["labels"])) <= {0, 13, 18, 255}
    (first, _) = task.evaluation("test")
    assert first["images"].shape == (1, 64, 128, 3) and first["counted"][0]
    config.data.eval_size = (32, 64)
    task = SegmentationTask(config)
    assert not any(batch["counted"][0] for batch in task.evaluation("test"))
    with pytest.raises(DataError, match=r"none of 2 images could be evaluated; the first: .*data.eval_size=\(32, 64\)"):
        skipped(task.damaged["test"], 2)


@pytest.mark.parametrize(
    ("make_task", "config", "message"),
    [
        (ClassificationTask, mdeq_imagenet.get_config(), "there is no such folder"),
        (SegmentationTask, mdeq_cityscapes.get_config(), "holds no images"),
    ],
)
def test_data_that_are_missing_are_an_error_only_where_they_are_needed(make_task, config, message, tmp_path):
    config.data.dir, config.export_path = str(tmp_path / "nowhere"), str(tmp_path / "weights.safetensors")
    task = make_task(config)
    graph, state = nnx.split(nnx.eval_shape(lambda: task.model(nnx.Rngs(0))))
    assert "Wrote" in task.export(nnx.merge(graph, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)))
    for needs_them in (task.data, lambda split: next(task.evaluation(split))):
        with pytest.raises(DataError, match=message):
            needs_them("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.name": "mnist"}, "data.name='mnist': must be one of"),
        ({"data.augment": "resized_crop"}, "is not for data.name='digits'"),
        ({"data.batch_size": 2000}, "there are 1197 images"),
        ({"model.n_classes": 7}, "the data have 10 classes"),
        ({"model.downsample": 4}, "images are 8 x 8: height and width must be multiples of 16"),
        ({"training.pretrain_steps": 5, "deq.n_states": 2}, "the unrolled phase has one state"),
        ({"training.f_max_iter_jitter": 2}, "varies the solve of regularised steps"),
        ({"training.pretrain_unroll": 0}, "training.pretrain_unroll=0"),
        (
            {"training.f_max_iter_jitter": 2, "deq.f_solver": "simple_fixed_point_iter", "deq.jac_loss_weight": 0.5},
            "and a solver with residuals",
        ),
        ({"model.head": "segmentation"}, "experiments.mdeq_segment"),
        ({"model.in_channels": 3}, "model.in_channels=3, but the images have 1"),
        ({"data.mean": (0.1, 0.2)}, r"data.mean=\(0.1, 0.2\): give one number"),
        ({"data.std": (0.0,)}, "must be positive"),
        ({"data.threads": -1}, "data.threads=-1: must be 0 or more"),
        ({"data.pad": -1}, "data.pad=-1"),
        ({"data.crop_area": (0.5, 1.5)}, r"data.crop_area=\(0.5, 1.5\): give the least and the largest"),
    ],
)
def test_settings_of_classification_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask(configured(mdeq_digits, DIGITS | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.crop": (16, 17)}, r"data.crop=\(16, 17\): height and width must be multiples of 2"),
        ({"loss.class_weights": True}, "those of Cityscapes"),
        (
            {"model.head": "classification", "model.head_channels": (2, 2), "model.final_channels": 4},
            "experiments.mdeq_classify",
        ),
        ({"data.augment": "crop"}, "data.augment='crop'"),
        ({"data.eval_size": (16, 32), "data.crop": (16, 32)}, "the synthetic images are square"),
        ({"data.crop": (8, 8)}, r"data.crop=\(8, 8\): without data.augment"),
        ({"data.eval_images": 0}, "data.eval_images=0: must be 1 or more"),
        ({"data.threads": -1}, "data.threads=-1: must be 0 or more"),
        ({"model.in_channels": 1}, "model.in_channels=1, but the images have 3"),
    ],
)
def test_settings_of_segmentation_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTask(configured(mdeq_shapes, SHAPES | settings))


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    run = ["classify", "--config=configs/mdeq_imagenet.py", "--config.data.name=imagenet_tfds", f"--workdir={tmp_path}"]
    assert classify(run) == 2
    assert 'pip install "deqjax[tfds]"' in " ".join(capsys.readouterr().err.split())


def test_every_field_of_the_network_and_of_training_is_on_the_command_line():
    assert set(mdeq_cifar10.FIELDS) == set(MDEQConfig.__dataclass_fields__)
    config = mdeq_cifar10.base("mdeq_cifar10")
    assert config.training.to_dict() == TRAINING
    # The schedule follows the run, not the run the schedule.
    config.steps = 10
    assert config.optimizer.max_steps == 10
    config.optimizer.max_steps = 20
    assert (config.steps, config.optimizer.max_steps) == (10, 20)


@pytest.mark.parametrize("module", [mdeq_cifar10, mdeq_cityscapes, mdeq_digits, mdeq_imagenet, mdeq_shapes])
def test_files_of_one_recipe_do_not_replace_those_of_another(module):
    config, name = module.get_config(), module.__name__.rpartition(".")[2]
    assert config.anytime.out == f"runs/{name}/anytime"
    assert config.get("predict", {"out": f"runs/{name}/predictions"})["out"] == f"runs/{name}/predictions"


RECIPES = [(mdeq_cifar10, v) for v in mdeq_cifar10.VARIANTS] + [(mdeq_imagenet, v) for v in mdeq_imagenet.VARIANTS]
RECIPES += [(mdeq_cityscapes, v) for v in mdeq_cityscapes.VARIANTS]


@pytest.mark.parametrize(("module", "variant"), RECIPES, ids=lambda x: getattr(x, "__name__", x))
def test_every_published_recipe_builds_its_task(module, variant):
    config = module.get_config(variant)
    config.data.batch_size = 2
    size = (32, 32) if module is mdeq_cifar10 else (64, 64)
    task = mdeq_step.make_task(config, size)
    assert task.architecture.n_classes == {mdeq_cifar10: 10, mdeq_imagenet: 1000, mdeq_cityscapes: 19}[module]
    with pytest.raises(ValueError, match="no variant"):
        module.get_config("huge")
