"""CIFAR-10: 60,000 colour images of 32 x 32 in ten classes, from any of its published forms."""

import io
import os
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.image_set import ImageArrays

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = [f"data_batch_{k}" for k in range(1, 6)]
_PYTHON, _BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_ARCHIVES = {_PYTHON: "cifar-10-python.tar.gz", _BINARY: "cifar-10-binary.tar.gz"}


def cifar10(directory: str | os.PathLike, split: str) -> ImageArrays:
    """A split, "train" or "test".

    Args:
      directory: holds one of the two archives, python or binary, packed or unpacked; or the files of a TFDS `cifar10`.

    Raises:
      DataError: none of these is there, or what is there is damaged.
    """
    directory = pathlib.Path(directory)
    for folder, suffix, read in ((_PYTHON, "", _read_python), (_BINARY, ".bin", _read_binary)):
        names = [name + suffix for name in (_TRAIN if split == "train" else ["test_batch"])]
        if contents := _contents(directory, folder, names):
            images, labels = zip(*(read(name, data) for name, data in contents.items()), strict=True)
            return ImageArrays(np.concatenate(images), np.concatenate(labels), CLASSES)
    if (directory / "cifar10").is_dir():
        from deqjax.data.image_set import from_tfds

        source = from_tfds("cifar10", directory, split)
        images, labels = zip(*(source[i] for i in range(len(source))), strict=True)
        return ImageArrays(np.stack(images), np.asarray(labels, np.int32), CLASSES)
    raise DataError(
        f"{directory} holds no CIFAR-10. Put {' or '.join(_ARCHIVES.values())} there, packed or unpacked "
        "(https://www.cs.toronto.edu/~kriz/cifar.html), or the cifar10 folder of TensorFlow Datasets in its array_record form. "
        "Without a network there are configs/mdeq_digits.py and configs/ddim_digits.py."
    )


def _contents(directory, folder, names) -> dict[str, bytes]:
    """The files' bytes, from a folder or its archive; nothing where there is neither."""
    for place in (directory / folder, directory):
        if (place / names[0]).is_file():
            if missing := [name for name in names if not (place / name).is_file()]:
                raise DataError(f"{place} lacks {', '.join(missing)}.")
            return {str(place / name): (place / name).read_bytes() for name in names}
    archive = directory / _ARCHIVES[folder]
    if not archive.is_file():
        return {}
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if pathlib.PurePosixPath(member.name).name in names and member.isfile():
                    found[f"{archive}/{pathlib.PurePosixPath(member.name).name}"] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{archive} is damaged ({error}). Download it again.") from error
    if len(found) != len(names):
        raise DataError(f"{archive} is damaged: it holds {len(found)} of the files {', '.join(names)}.")
    # In the order of the names, whatever that in the archive.
    return dict(sorted(found.items()))


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and refuses everything else: a pickle is a program."""

    def find_class(self, module, name):
        allowed = {"_reconstruct": np._core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of CIFAR-10; nothing was run")


def _read_python(name, data):
    try:
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        return _planes(name, np.asarray(batch["data"]), np.asarray(batch["labels"]))
    except DataError:
        raise
    except Exception as error:  # what a damaged pickle raises has no end
        raise DataError(f"{name} is damaged: it is no batch of CIFAR-10 ({error}).") from error


def _read_binary(name, data):
    if not data or len(data) % 3073:
        raise DataError(f"{name} is damaged: {len(data)} bytes are not a whole number of records of 3073.")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return _planes(name, records[:, 1:], records[:, 0])


def _planes(name, data, labels):
    """Rows of red, green and blue planes as `[N, 32, 32, 3]`, and labels."""
    if data.ndim != 2 or data.shape[1] != 3072 or data.dtype != np.uint8 or labels.shape != data.shape[:1]:
        raise DataError(f"{name} is damaged: images are {data.dtype}{list(data.shape)} for {labels.size} labels.")
    if labels.size and (labels.min() < 0 or labels.max() > 9):
        raise DataError(f"{name} is damaged: labels run from {labels.min()} to {labels.max()}, not from 0 to 9.")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int32)
