"""Semantic segmentation with multiscale equilibrium models.

    python -m experiments.mdeq_segment --config configs/mdeq_shapes.py
    python -m experiments.mdeq_segment --config configs/mdeq_cityscapes.py:small --config.init_from=imagenet.pth

Modes: train (and resume), eval (mIoU, pixel accuracy, IoU of every class), anytime (mIoU after every number of solver steps,
from one solve), predict (labels and overlays of the pictures in `config.predict.folder`), export (the weights as a PyTorch
state dict). `config.init_from` takes another run, or a state dict: of an ImageNet classifier it uses all but the head.
"""

import contextlib
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.data.augment import denormalize, normalize, scale_and_crop
from deqjax.data.cityscapes import CLASS_WEIGHTS, Cityscapes, label_ids
from deqjax.data.errors import DataError
from deqjax.data.image_set import Damaged
from deqjax.data.images import image_files, pillow, read_image, write_image
from deqjax.data.prefetch import Prefetch
from deqjax.data.shapes import Shapes
from deqjax.interop.mdeq import describe, export_mdeq, load_mdeq
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.mdeq import MDEQ, resize_bilinear
from deqjax.nn.config import DEQConfig
from deqjax.training.console import say
from deqjax.training.mesh import make_mesh, replicated
from deqjax.training.metrics import vitals
from experiments.image_batches import (
    SPLITS,
    chosen_rows,
    evaluation_batches,
    read_or_blank,
    skipped,
    training_stream,
)
from experiments.image_losses import IGNORED, cross_entropy, cross_entropy_sums, ohem_cross_entropy
from experiments.image_metrics import confusion_matrix, segmentation_scores
from experiments.image_pictures import draw_confusion, overlay, voc_palette
from experiments.image_training import (
    along_one_solve,
    architecture,
    check_classes,
    check_length,
    check_pipeline,
    check_pixels,
    check_training,
    forward,
    radius_metric,
    report_anytime,
    summed,
    supervised,
)

DATA = ("shapes", "cityscapes")


class SegmentationTask:
    """What the training loop needs to know about semantic segmentation."""

    name = "mdeq_segment"
    modes = ("train", "eval", "anytime", "predict", "export")
    weights_transfer = True
    free_to_change = (
        "data.dir",
        "data.threads",
        "data.ahead",
        "data.eval_batch_size",
        "data.eval_align_corners",
        "anytime",
        "pictures",
    )
    free_to_change += ("predict", "export_path")

    def __init__(self, config, splits: dict | None = None):
        """Lists the data that the config names, unless they are given.

        Data that are missing or damaged are an error of whatever needs them first; labelling pictures does not.

        Raises:
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.training = check_training(config)
        self.deq = DEQConfig.from_config(config.deq)
        self.deq.eval_budget()
        self.architecture = architecture(config.model)
        if self.architecture.head != "segmentation":
            raise ValueError("the model classifies whole images: python -m experiments.mdeq_classify")
        for name in ("crop", "eval_size"):
            if any(n < 1 or n % self.architecture.image_multiple for n in config.data[name]):
                multiple = self.architecture.image_multiple
                raise ValueError(f"data.{name}={config.data[name]}: height and width must be multiples of {multiple}.")
        if config.data.augment == "none" and tuple(config.data.crop) != tuple(config.data.eval_size):
            raise ValueError(
                f"data.crop={config.data.crop}: without data.augment it must be data.eval_size={config.data.eval_size}."
            )
        if splits is not None:
            self.splits = splits
        known = {"cityscapes": Cityscapes, "shapes": Shapes}[config.data.name]
        with contextlib.suppress(DataError):  # which whatever needs data meets again
            known = self.splits["train"]
            check_length(known, config.data.batch_size)
        self.classes, self.palette = known.classes, known.palette
        check_classes(self.classes, self.architecture.n_classes)
        check_pixels(config.data, self.architecture.in_channels, 3)
        self.items_per_step = ("images", config.data.batch_size)
        self.damaged = {split: Damaged(say) for split in SPLITS}
        self.weights = jnp.asarray(CLASS_WEIGHTS) if config.loss.class_weights else None
        self._evaluate_batch = jax.jit(self._metrics, static_argnums=0)

    @functools.cached_property
    def splits(self) -> dict:
        """The images of the config. Raises DataError: see `read`."""
        return read(self.config)

    @property
    def fingerprint(self) -> list:
        return [list(self.classes), len(self.splits["train"])]

    def model(self, rngs: nnx.Rngs) -> MDEQ:
        return MDEQ(self.architecture, self.deq, rngs)

    # Data ------------------------------------------------------------------------------------------------------------

    def data(self, split: str) -> Prefetch:
        """Batches of training images, made by threads."""
        return training_stream(self.config, self._training_jobs)

    def _training_jobs(self, step: int):
        numbers, seeds = chosen_rows(self.config, len(self.splits["train"]), step)
        return [functools.partial(self._training_sample, int(n), seed) for n, seed in zip(numbers, seeds, strict=True)]

    def _training_sample(self, number: int, seed) -> dict:
        """An image and its labels, augmented; what cannot be read is replaced by the next that can."""
        image, labels = self.damaged["train"].next_sound(self.splits["train"], number)
        data = self.config.data
        if data.augment == "scale_crop":
            image, labels = scale_and_crop(image, labels, np.random.default_rng(seed), data.crop, data.base_size)
        return self._sample(image, labels)

    def _sample(self, image, labels):
        return {"images": normalize(image, self.config.data.mean, self.config.data.std), "labels": labels.astype(np.int32)}

    def evaluation(self, split: str):
        """Batches of whole images; one that cannot be read, or has another size, does not count."""
        images, (H, W) = self.splits[split], self.config.data.eval_size

        def read_whole(number):
            image, labels = images[number]
            if labels.shape != (H, W):
                raise DataError(f"image {number} of {split} is {labels.shape}, but data.eval_size={(H, W)}.")
            return image, labels

        def load(number):
            blank = lambda: (np.zeros((H, W, 3), np.uint8), np.full((H, W), IGNORED, np.uint8))  # noqa: E731
            (image, labels), counted = read_or_blank(read_whole, number, self.damaged[split], blank)
            return self._sample(image, labels) | {"counted": np.bool_(counted)}

        return evaluation_batches(self.config, len(images), load)

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: MDEQ, batch, key, step):
        """Weighted mean cross entropy over the pixels that count, of every supervised state, plus the Jacobian term."""
        labels, loss = batch["labels"], self.config.loss
        out = forward(model, batch["images"], key, step, self.training)
        weight = cross_entropy_sums(jnp.zeros((*labels.shape, len(self.classes))), labels, weights=self.weights)[1]

        def criterion(logits):
            logits = resize_bilinear(logits, labels.shape[1:3], align_corners=True)
            if loss.ohem:
                options = {"threshold": loss.ohem_threshold, "min_kept": loss.ohem_min_kept}
                return ohem_cross_entropy(logits, labels, weights=self.weights, **options)
            return cross_entropy(logits, labels, weights=self.weights)

        return supervised(model, out, criterion, weight)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: MDEQ, split: str) -> dict[str, float]:
        """Loss, mIoU, accuracies and the IoU of every class over a split, and how the solves went."""
        graph, state = nnx.split(model)
        results = [self._evaluate_batch(graph, state, batch) for batch in self.evaluation(split)]
        scores = segmentation_scores(sum(np.asarray(counts, np.float64) for _, counts in results))
        by_class = {f"iou/{name}": float(iou) for name, iou in zip(self.classes, scores.pop("iou"), strict=True)}
        left_out = skipped(self.damaged[split], len(self.splits[split]))
        return summed([metrics for metrics, _ in results]) | scores | by_class | left_out

    def _metrics(self, graph, state, batch):
        """Sums of a batch, and its confusion matrix."""
        model = nnx.merge(graph, state)
        out = model.solve(model.encode(batch["images"]))
        metrics, counts = self.scores(model.decode(out.states[-1]), batch)
        counted = batch["counted"]
        return metrics | vitals(out.stats.sums(counted)) | radius_metric(out.spectral_radius, counted), counts

    def scores(self, logits, batch) -> tuple:
        """The loss of a batch, as sum and count, and its confusion matrix."""
        logits = self._at_full_size(logits, batch["labels"].shape[1:3])
        labels = jnp.where(batch["counted"][:, None, None], batch["labels"], IGNORED)
        counts = confusion_matrix(jnp.argmax(logits, axis=-1), labels, len(self.classes))
        return {"loss": cross_entropy_sums(logits, labels, weights=self.weights)}, counts

    def _at_full_size(self, logits, size):
        return resize_bilinear(logits, size, align_corners=self.config.data.eval_align_corners)

    def show(self, model: MDEQ, workdir: Path) -> None:
        """`confusion.png` of the test set, and of its first images `overlays/*.png`: the image, the truth, the prediction."""
        graph, state = nnx.split(model)
        # On every device, for one process writes the pictures.
        predict = jax.jit(
            lambda state, batch: (self._predictions(nnx.merge(graph, state), batch["images"]), batch),
            out_shardings=replicated(make_mesh(self.config.get("mesh"))),
        )
        counts, shown, folder = 0, [], Path(workdir) / "overlays"
        for batch in self.evaluation("test"):
            predictions, batch = jax.device_get(predict(state, batch))
            images, labels, counted = batch["images"], batch["labels"], batch["counted"]
            counts = counts + np.asarray(confusion_matrix(predictions[counted], labels[counted], len(self.classes)))
            for image, truth, prediction in zip(images[counted], labels[counted], predictions[counted], strict=True):
                if len(shown) < self.config.pictures:
                    image = denormalize(image, self.config.data.mean, self.config.data.std)
                    parts = [image, overlay(image, truth, self.palette), overlay(image, prediction, self.palette)]
                    shown.append(np.concatenate(parts, axis=1))
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(shown):
                write_image(folder / f"{number:03d}.png", picture)
            draw_confusion(counts, self.classes, Path(workdir) / "confusion.png")

    def _predictions(self, model, images):
        return jnp.argmax(self._at_full_size(model(images), images.shape[1:3]), axis=-1)

    def anytime(self, model: MDEQ) -> str:
        """mIoU on a split after every number of solver steps, all from one solve: a table, `anytime.json` and `anytime.png`."""
        rows = []
        for n, results in along_one_solve(self, model):
            means = summed([metrics | {"residual": residual} for (metrics, _), residual in results])
            scores = segmentation_scores(sum(np.asarray(counts, np.float64) for (_, counts), _ in results))
            rows.append({"steps": n} | means | {name: scores[name] for name in ("miou", "pixel_accuracy")})
        return report_anytime(rows, "miou", self.config.anytime.out)

    def predict(self, model: MDEQ) -> str:
        """Labels, as a picture with the colour map of PASCAL VOC, and an overlay for every picture in a folder.

        Pictures may have any size: they are filled up with black at the bottom and on the right, and cut again. Damaged ones
        are named and left out. What lies in a folder below goes into one of the same name.

        Raises:
          DataError: there is no such folder, or two of its pictures would give theirs the same name.
        """
        options, data, multiple = self.config.predict, self.config.data, self.architecture.image_multiple
        if not options.folder:
            raise DataError("config.predict.folder is empty: name the folder with the pictures to label.")
        Image, damaged = pillow(), Damaged(say)
        graph, state = nnx.split(model)
        predict = jax.jit(lambda state, images: self._predictions(nnx.merge(graph, state), images))
        paths = image_files(options.folder)
        names = {path.with_suffix(""): path for path in paths}
        for path in paths:
            if (other := names[path.with_suffix("")]) != path:
                raise DataError(f"{path} and {other} have the same name, and so would their labels: rename one.")
        for number, path in enumerate(paths):
            try:
                image = read_image(path, upright=True)
            except DataError as error:
                damaged.note(number, error)
                continue
            target = Path(options.out) / path.relative_to(options.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            H, W, _ = image.shape
            padded = np.pad(image, ((0, -H % multiple), (0, -W % multiple), (0, 0)))
            labels = np.asarray(predict(state, normalize(padded[None], data.mean, data.std)))[0, :H, :W]
            picture = Image.fromarray((label_ids(labels) if data.name == "cityscapes" else labels).astype(np.uint8), "P")
            picture.putpalette(voc_palette(256).tobytes())
            picture.save(target.with_name(f"{path.stem}_labels.png"))
            colours = overlay(image / np.iinfo(image.dtype).max, labels, self.palette)
            write_image(target.with_name(f"{path.stem}_overlay.png"), colours)
        return f"Wrote labels and overlays of {len(paths) - len(damaged)} pictures to {options.out}."

    # Checkpoints of other formats ------------------------------------------------------------------------------------

    def import_checkpoint(self, path: str, model: MDEQ) -> None:
        """A state dict of any dialect; of a classifier, or of other classes, all but the head."""
        state_dict = read_checkpoint(path)
        found = describe(state_dict)
        other = found.get("head") != "segmentation" or found["n_classes"] != self.architecture.n_classes
        if other:
            say(f"{path} has no head for these classes: the model begins with its stem and f alone.")
        load_mdeq(model, state_dict, backbone_only=other)

    def export(self, model: MDEQ) -> str:
        """Writes the weights under the originals' names; `.safetensors`, or `.pth` with PyTorch installed."""
        state_dict = export_mdeq(model)
        write_checkpoint(self.config.export_path, state_dict)
        return f"Wrote {len(state_dict)} tensors to {self.config.export_path}."


# Data ----------------------------------------------------------------------------------------------------------------


def read(config) -> dict:
    """The images that the config names, of every split. Cityscapes keeps the labels of its test set: "val" serves for both."""
    data = config.data
    if data.name == "shapes":
        lengths = {"train": data.train_images, "valid": data.eval_images, "test": data.eval_images}
        return {split: Shapes(split, n, data.eval_size[0], data.data_seed) for split, n in lengths.items()}
    train, val = (Cityscapes(data.dir, split) for split in ("train", "val"))
    return {"train": train, "valid": val, "test": val}


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    data, loss = config.data, config.loss
    for name, value, allowed in (("name", data.name, DATA), ("augment", data.augment, ("none", "scale_crop"))):
        if value not in allowed:
            raise ValueError(f"data.{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
    check_pipeline(data, base_size=1)
    for name in ("crop", "eval_size"):
        if len(data[name]) != 2:
            raise ValueError(f"data.{name}={data[name]}: give height and width.")
    if data.name == "shapes":
        if data.eval_size[0] != data.eval_size[1]:
            raise ValueError(f"data.eval_size={data.eval_size}: the synthetic images are square.")
        if min(data.train_images, data.eval_images) < 1:
            raise ValueError(f"data.train_images={data.train_images}, data.eval_images={data.eval_images}: must be 1 or more.")
    if loss.class_weights and data.name != "cityscapes":
        raise ValueError("loss.class_weights are those of Cityscapes; set it to False for other data.")
    if not 0 <= loss.ohem_threshold <= 1 or loss.ohem_min_kept < 1:
        raise ValueError("loss.ohem_threshold must lie between 0 and 1, and loss.ohem_min_kept be 1 or more.")


def main(argv=None):
    from deqjax.cli import run

    return run(SegmentationTask, argv)


if __name__ == "__main__":
    sys.exit(main())
