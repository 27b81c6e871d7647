"""Sets of labelled images: in memory, in folders by class, or of TensorFlow Datasets. Item i is `(image [H, W, C], label)`."""

import dataclasses
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import SUFFIXES, read_image


@runtime_checkable
class ImageSet(Protocol):
    """What a classifier is trained on. `classes` are the names, in the order of the labels."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """Raises DataError where the image cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageArrays:
    """Images of one size in memory.

    Attributes:
      images: `[N, H, W, C]`, 8 bits.
      labels: `[N]`.
      classes: names.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])

    def subset(self, indices: np.ndarray) -> "ImageArrays":
        return ImageArrays(self.images[indices], self.labels[indices], self.classes)


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Images in files."""

    paths: Sequence[pathlib.Path]
    labels: Sequence[int]
    classes: Sequence[str]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_image(self.paths[i]), self.labels[i]


def class_folders(directory: str | os.PathLike, classes: Sequence[str] | None = None) -> ImageFiles:
    """The images of `directory/<class>/*`; a class's number is the rank of its name.

    Args:
      classes: those of another split, which must be the same.

    Raises:
      DataError: there is no such directory, a class has no folder or no image, or there is a folder too many.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: there is no such folder. Expected are {directory}/<class>/*.JPEG, one folder per class.")
    found = sorted(path.name for path in directory.iterdir() if path.is_dir())
    if not found:
        raise DataError(f"{directory} holds no folders: expected is one per class.")
    if classes is not None and list(classes) != found:
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        said = [f"it lacks the class folders {_some(missing)}"] if missing else []
        said += [f"the training set has no {_some(extra)}"] if extra else []
        raise DataError(f"{directory} does not have the classes of the training set: {', and '.join(said)}.")
    paths, labels, empty = [], [], []
    for label, name in enumerate(found):
        files = sorted(path for path in (directory / name).iterdir() if path.suffix.lower() in SUFFIXES)
        paths += files
        labels += [label] * len(files)
        empty += [] if files else [name]
    if empty:
        raise DataError(f"{directory}: no images in the class folders {_some(empty)}.")
    return ImageFiles(paths, labels, found)


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class FromTFDS:
    """A prepared set of TensorFlow Datasets with `image` and `label`, read without TensorFlow."""

    def __init__(self, source, classes: Sequence[str], name: str):
        self._source, self.classes, self._name = source, classes, name

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        try:
            example = self._source[i]
        except Exception as error:  # of the image's decoder, or of the file's
            raise DataError(f"example {i} of {self._name} cannot be read ({error}).") from error
        image = np.asarray(example["image"])
        return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image, int(example["label"])


def from_tfds(name: str, directory: str | os.PathLike, split: str) -> FromTFDS:
    """A split of a data set that TFDS has prepared in `directory` in its array_record form.

    Raises:
      DataError: it is not there, or prepared in another form.
      ImportError: TensorFlow Datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError('reading TensorFlow Datasets needs them: pip install "deqjax[tfds]"') from error
    try:
        builder = tfds.builder(name, data_dir=str(directory))
        source = builder.as_data_source(split=split)
        return FromTFDS(source, builder.info.features["label"].names, f"{name}, {split},")
    except Exception as error:  # its own errors are of many types
        raise DataError(
            f"TensorFlow Datasets cannot read {name} in {directory}: {str(error).partition(' Possible')[0]} Prepare it by "
            f"tfds.builder('{name}', data_dir=..., file_format='array_record').download_and_prepare()."
        ) from error


class Damaged:
    """Which images could not be read, for every thread: each is told once."""

    def __init__(self, tell=print):
        self._tell, self._lock, self.messages = tell, threading.Lock(), {}

    def note(self, i: int, error: DataError) -> None:
        with self._lock:
            new = i not in self.messages
            self.messages[i] = str(error)
        if new:
            self._tell(f"Skipped a damaged image, {len(self.messages)} so far: {error}")

    def next_sound(self, images, number: int, most: int = 100) -> tuple:
        """Item `number` of a set, or the next one that can be read. Raises DataError if so many in a row cannot."""
        for i in range(number, number + most):
            try:
                return images[i % len(images)]
            except DataError as error:
                self.note(i % len(images), error)
        raise DataError(f"{most} damaged images in a row, from number {number} on; the first: {self.messages[number]}")

    def __len__(self):
        return len(self.messages)
