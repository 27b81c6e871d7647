"""Image classification with multiscale equilibrium models.

    python -m experiments.mdeq_classify --config configs/mdeq_digits.py
    python -m experiments.mdeq_classify --config configs/mdeq_cifar10.py:large --mode eval --config.init_from=model.pth

Modes: train (and resume), eval (metrics of both splits), anytime (accuracy after every number of solver steps, from one solve),
export (the weights as a PyTorch state dict, to `config.export_path`). `config.init_from` takes another run or such a file.
"""

import contextlib
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.data.augment import mirror, normalize, pad_crop_flip, random_resized_crop, resize_and_center
from deqjax.data.cifar import cifar10
from deqjax.data.digits import digits
from deqjax.data.errors import DataError
from deqjax.data.image_set import Damaged, ImageArrays, ImageSet, class_folders, from_tfds
from deqjax.data.prefetch import Prefetch
from deqjax.data.recordio import record_images
from deqjax.interop.mdeq import export_mdeq, load_mdeq
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.mdeq import MDEQ
from deqjax.nn.config import DEQConfig
from deqjax.training.console import say
from deqjax.training.metrics import vitals
from experiments.image_batches import (
    SPLITS,
    chosen_rows,
    evaluation_batches,
    read_or_blank,
    skipped,
    training_stream,
)
from experiments.image_metrics import confusion_matrix, top_k
from experiments.image_pictures import draw_confusion
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

DATA = ("digits", "cifar10", "imagenet", "imagenet_records", "imagenet_tfds")
AUGMENT = ("none", "crop", "crop_flip", "resized_crop")


class ClassificationTask:
    """What the training loop needs to know about image classification."""

    name = "mdeq_classify"
    modes = ("train", "eval", "anytime", "export")
    weights_transfer = True
    free_to_change = ("data.dir", "data.threads", "data.ahead", "anytime", "export_path", "data.eval_batch_size")

    def __init__(self, config, splits: dict[str, ImageSet] | None = None):
        """Reads the data that the config names, or their list, unless they are given.

        Data that are missing or damaged are an error of whatever needs them first; exporting weights does not.

        Raises:
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.training = check_training(config)
        self.deq = DEQConfig.from_config(config.deq)
        self.deq.eval_budget()
        self.architecture = architecture(config.model)
        if self.architecture.head != "classification":
            raise ValueError("the model segments: python -m experiments.mdeq_segment")
        if splits is not None:
            self.splits = splits
        with contextlib.suppress(DataError):  # which whatever needs data meets again
            self._check_images(self.splits["train"])
        self.items_per_step = ("images", config.data.batch_size)
        self.damaged = {split: Damaged(say) for split in SPLITS}
        self._evaluate_batch = jax.jit(self._metrics, static_argnums=0)

    @functools.cached_property
    def splits(self) -> dict[str, ImageSet]:
        """The images of the config. Raises DataError: see `read`."""
        return read(self.config)

    @property
    def fingerprint(self) -> list:
        return [list(self.splits["train"].classes), len(self.splits["train"])]

    def _check_images(self, images) -> None:
        """Raises ValueError if the model, or a batch, does not fit the training set."""
        config, multiple = self.config, self.architecture.image_multiple
        check_classes(images.classes, self.architecture.n_classes)
        check_length(images, config.data.batch_size)
        # Files are read in colour.
        *size, channels = images.images.shape[1:] if isinstance(images, ImageArrays) else (*(config.data.image_size,) * 2, 3)
        check_pixels(config.data, self.architecture.in_channels, channels)
        if any(n % multiple for n in size):
            raise ValueError(f"images are {size[0]} x {size[1]}: height and width must be multiples of {multiple}.")

    def model(self, rngs: nnx.Rngs) -> MDEQ:
        return MDEQ(self.architecture, self.deq, rngs)

    # Data ------------------------------------------------------------------------------------------------------------

    def data(self, split: str) -> Prefetch:
        """Batches of training images, made by threads."""
        return training_stream(self.config, self._training_jobs, isinstance(self.splits["train"], ImageArrays))

    def _training_jobs(self, step: int):
        images = self.splits["train"]
        numbers, seeds = chosen_rows(self.config, len(images), step)
        if isinstance(images, ImageArrays):
            # In memory a whole batch is less work than the switching between its rows.
            return [functools.partial(self._from_memory, numbers, step, [place for _, _, place in seeds])]
        return [functools.partial(self._from_file, int(n), seed) for n, seed in zip(numbers, seeds, strict=True)]

    def _from_memory(self, numbers, step: int, places: list[int]) -> dict:
        images, data = self.splits["train"], self.config.data
        pixels = images.images[numbers]
        if data.augment in ("crop", "crop_flip"):
            rng, flip = np.random.default_rng((self.config.seed, step, 0)), data.augment == "crop_flip"
            pixels = pad_crop_flip(pixels, rng, data.pad, flip=flip, places=places, batch_size=data.batch_size)
        return self._sample(pixels, images.labels[numbers])

    def _from_file(self, number: int, seed) -> dict:
        """An image, augmented; one that cannot be read is replaced by the next that can."""
        data, rng = self.config.data, np.random.default_rng(seed)
        image, label = self.damaged["train"].next_sound(self.splits["train"], number)
        if data.augment == "none":
            return self._sample(resize_and_center(image, data.resize, data.image_size), label)
        image = random_resized_crop(image, rng, data.image_size, data.crop_area, data.crop_aspect, data.crop_attempts)
        return self._sample(mirror(image, rng), label)

    def _sample(self, image, label):
        return {"images": normalize(image, self.config.data.mean, self.config.data.std), "labels": np.asarray(label, np.int32)}

    def evaluation(self, split: str):
        """Batches of a split, not augmented."""
        images, data = self.splits[split], self.config.data

        def from_memory(numbers):
            batch = self._sample(images.images[numbers], images.labels[numbers])
            return batch | {"counted": np.ones(np.shape(numbers), bool)}

        def from_file(number):
            blank = lambda: (np.zeros((data.image_size, data.image_size, 3), np.uint8), 0)  # noqa: E731
            (image, label), counted = read_or_blank(images.__getitem__, number, self.damaged[split], blank)
            image = resize_and_center(image, data.resize, data.image_size)
            return self._sample(image, label) | {"counted": np.bool_(counted)}

        in_memory = isinstance(images, ImageArrays)
        return evaluation_batches(self.config, len(images), from_memory if in_memory else from_file, in_memory)

    # Training and evaluation -----------------------------------------------------------------------------------------

    def loss(self, model: MDEQ, batch, key, step):
        """Mean cross entropy, weighted over supervised states, plus the Jacobian term."""
        out = forward(model, batch["images"], key, step, self.training)
        criterion = lambda logits: jnp.mean(_cross_entropy(logits, batch["labels"]))  # noqa: E731
        loss, metrics = supervised(model, out, criterion, len(batch["labels"]))
        right = top_k(out.logits[-1], batch["labels"], 1)
        return loss, metrics | {"accuracy": (jnp.sum(right.astype(loss.dtype)), jnp.asarray(right.size, loss.dtype))}

    def evaluate(self, model: MDEQ, split: str) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy over a split, and how the solves went."""
        graph, state = nnx.split(model)
        result = summed([self._evaluate_batch(graph, state, batch) for batch in self.evaluation(split)])
        return result | skipped(self.damaged[split], len(self.splits[split]))

    def _metrics(self, graph, state, batch):
        model = nnx.merge(graph, state)
        out = model.solve(model.encode(batch["images"]))
        return self.scores(model.decode(out.states[-1]), batch) | {
            **vitals(out.stats.sums(batch["counted"])),
            **radius_metric(out.spectral_radius, batch["counted"]),
        }

    def scores(self, logits, batch) -> dict:
        """Metrics of a batch, as sums and counts."""
        counted = batch["counted"].astype(logits.dtype)
        total = lambda values: (jnp.sum(values.astype(logits.dtype) * counted), jnp.sum(counted))  # noqa: E731
        labels = batch["labels"]
        scores = {"loss": total(_cross_entropy(logits, labels)), "accuracy": total(top_k(logits, labels, 1))}
        return scores | ({"top5": total(top_k(logits, labels, 5))} if self.architecture.n_classes > 10 else {})

    def show(self, model: MDEQ, workdir: Path) -> None:
        """The confusion of the test set's classes, if they are few enough to be seen: `confusion.png`."""
        if self.architecture.n_classes > 30:
            return
        graph, state = nnx.split(model)

        @jax.jit
        def count(state, batch):
            predictions = jnp.argmax(nnx.merge(graph, state)(batch["images"]), axis=-1)
            labels = jnp.where(batch["counted"], batch["labels"], 255)
            return confusion_matrix(predictions, labels, self.architecture.n_classes)

        counts = sum(np.asarray(count(state, batch)) for batch in self.evaluation("test"))
        if jax.process_index() == 0:
            draw_confusion(counts, self.splits["test"].classes, workdir / "confusion.png")

    def anytime(self, model: MDEQ) -> str:
        """Test accuracy after every number of solver steps, all from one solve: a table, `anytime.json` and `anytime.png`."""
        rows = [
            {"steps": n} | summed([scores | {"residual": residual} for scores, residual in results])
            for n, results in along_one_solve(self, model)
        ]
        return report_anytime(rows, "accuracy", self.config.anytime.out)

    # Checkpoints of other formats ------------------------------------------------------------------------------------

    def import_checkpoint(self, path: str, model: MDEQ) -> None:
        """Published weights: a `.pth`, `.pt` or `.safetensors` state dict of any dialect."""
        load_mdeq(model, read_checkpoint(path))

    def export(self, model: MDEQ) -> str:
        """Writes the weights under the originals' names; `.safetensors`, or `.pth` with PyTorch installed."""
        state_dict = export_mdeq(model)
        write_checkpoint(self.config.export_path, state_dict)
        return f"Wrote {len(state_dict)} tensors to {self.config.export_path}."


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# Data ----------------------------------------------------------------------------------------------------------------


def read(config) -> dict[str, ImageSet]:
    """The images that the config names, of every split."""
    data = config.data
    if data.name == "digits":
        return {split: digits(split) for split in SPLITS}
    if data.name == "cifar10":
        return _with_valid(cifar10(data.dir, "train"), cifar10(data.dir, "test"), data)
    directory = Path(data.dir)
    if data.name == "imagenet":
        train = class_folders(directory / "train")
        test = class_folders(directory / "val", train.classes)
    elif data.name == "imagenet_records":
        train, test = (record_images(directory / name, config.model.n_classes or 1000) for name in ("train.rec", "val.rec"))
    else:
        train, test = (from_tfds("imagenet2012", directory, split) for split in ("train", "validation"))
    return {"train": train, "valid": test, "test": test}


def _with_valid(train: ImageArrays, test: ImageArrays, data) -> dict[str, ImageArrays]:
    """With select="valid" the last tenth of the training images chooses the weights; with "test" the test images do."""
    if data.select == "test":
        return {"train": train, "valid": test, "test": test}
    first = len(train) - len(train) // 10
    parts = train.subset(np.arange(first)), train.subset(np.arange(first, len(train)))
    return {"train": parts[0], "valid": parts[1], "test": test}


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    data = config.data
    for name, value, allowed in (
        ("name", data.name, DATA),
        ("augment", data.augment, AUGMENT),
        ("select", data.select, ("valid", "test")),
    ):
        if value not in allowed:
            raise ValueError(f"data.{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
    in_memory = data.name in ("digits", "cifar10")
    if data.augment in (("resized_crop",) if in_memory else ("crop", "crop_flip")):
        raise ValueError(f"data.augment={data.augment!r} is not for data.name={data.name!r}.")
    check_pipeline(data, image_size=1, resize=1, pad=0, crop_attempts=0)
    for name, most in (("crop_area", 1), ("crop_aspect", math.inf)):
        low, high = data[name]
        if not 0 < low <= high <= most:
            raise ValueError(
                f"data.{name}={tuple(data[name])}: give the least and the largest, both positive and up to {most}."
            )
    if not in_memory and data.resize < data.image_size:
        raise ValueError(
            f"data.resize={data.resize} is smaller than data.image_size={data.image_size}, the square cut out of it."
        )


def main(argv=None):
    from deqjax.cli import run

    return run(ClassificationTask, argv)


if __name__ == "__main__":
    sys.exit(main())
