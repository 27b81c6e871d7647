"""Images in LMDB databases: LSUN (Yu et al. 2015) and FFHQ (Karras et al. 2019)."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from deqjax.data.augment import resize_and_center
from deqjax.data.errors import DataError
from deqjax.data.images import decode_image
from deqjax.data.unlabelled_images import Part, eight_bits


class Database:
    """Encoded images in an LMDB database, by number, each fitted to one size."""

    def __init__(self, directory: pathlib.Path, fit: Callable[[np.ndarray], np.ndarray], keys: Sequence[bytes] | None = None):
        """Args:
        directory: of the database.
        fit: makes an image of the wanted size.
        keys: of the images; None takes every entry, in the order of the database.

        Raises:
          DataError: there is no such database, or it holds nothing.
          ImportError: lmdb is not installed.
        """
        self.directory, self.fit = directory, fit
        self.keys = _every_key(directory) if keys is None else keys
        if not self.keys:
            raise DataError(f"{directory} holds no images.")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> np.ndarray:
        """The fitted image. Raises DataError, naming the entry, if it is missing or no picture."""
        key = self.keys[index]
        name = f"the entry {key.decode(errors='replace')!r} of {self.directory}"
        value = _value(self.directory, key)
        if value is None:
            raise DataError(f"{name} is missing.")
        return self.fit(eight_bits(decode_image(value, name)))


def _every_key(directory) -> list[bytes]:
    with _environment(directory).begin() as transaction:
        return list(transaction.cursor().iternext(keys=True, values=False))


def _value(directory, key: bytes) -> bytes | None:
    with _environment(directory).begin() as transaction:
        return transaction.get(key)


@functools.cache
def _environment(directory):
    """The open database; a process may open one but once."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError('LSUN and FFHQ are LMDB databases: pip install "deqjax[vision]"') from error
    try:
        return lmdb.open(str(directory), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{directory} is no LMDB database that can be read ({error}).") from error


def lsun(directory: str | os.PathLike, category: str, size: int = 256, split: str = "train") -> Database:
    """One category of LSUN, the shorter side scaled to `size`, the centre cut out.

    Args:
      directory: holds `<category>_train_lmdb` and `<category>_val_lmdb`, unpacked from the published archives.
      category: e.g. "bedroom", "church_outdoor", "cat".
      size: of the images.
      split: "train" or "val".

    Raises:
      DataError: the database is missing or damaged.
    """
    database = pathlib.Path(directory) / f"{category}_{split}_lmdb"
    if not (database / "data.mdb").is_file():
        raise DataError(
            f"there is no {database}/data.mdb. Download LSUN's {category}_{split}_lmdb.zip with the script of its authors "
            "(github.com/fyu/lsun) and unpack it there. configs/ddim_digits.py needs no download."
        )
    return Database(database, lambda image: resize_and_center(image, size, size))


def ffhq(directory: str | os.PathLike, size: int = 256, seed: int = 2019) -> tuple[Part, Part]:
    """FFHQ at a resolution that its database has: nine tenths to train on, and the rest.

    Args:
      directory: of a database with entries `<size>-<number of five digits>`, counted by the entry `length`.
      size: resolution.
      seed: of the shuffle before the split.

    Raises:
      DataError: the database is missing or damaged, or has no images of this size.
    """
    directory = pathlib.Path(directory)
    if not (directory / "data.mdb").is_file():
        raise DataError(f"there is no {directory}/data.mdb, the LMDB database of FFHQ that StyleGAN's prepare_data.py makes.")
    try:
        length = int((_value(directory, b"length") or b"").decode())
    except ValueError as error:
        raise DataError(f"{directory} has no entry 'length' with the number of images.") from error

    def fit(image):
        if image.shape[:2] != (size, size):
            raise DataError(f"{directory} has an image of {image.shape[1]}x{image.shape[0]} under the name of {size}x{size}.")
        return image

    images = Database(directory, fit, [f"{size}-{number:05d}".encode() for number in range(length)])
    order = np.random.RandomState(seed).permutation(length)
    n_train = int(0.9 * length)
    return Part(images, order[:n_train]), Part(images, order[n_train:])
