"""Images in LMDB databases: LSUN (Yu et al. 2015) and FFHQ (Karras et al. 2019)."""

import io
import os
import pathlib
import threading
from collections.abc import Callable

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.image_batches import Part, centre, eight_bits
from deqjax.data.images import read_image


class Database:
    """Encoded images in an LMDB database, by number, each fitted to one size.

    Args:
      directory: of the database.
      fit: makes an image of the wanted size.
      keys: of the images; None takes every entry, in the order of the database.

    Raises:
      DataError: there is no such database, or it is empty.
      ImportError: lmdb is not installed.
    """

    def __init__(self, directory: str | os.PathLike, fit: Callable[[np.ndarray], np.ndarray], keys: list[bytes] | None = None):
        self.directory, self.fit, self._keys = pathlib.Path(directory), fit, keys
        self._environment, self._lock = None, threading.Lock()
        with self._open().begin() as transaction:
            if self._keys is None:
                self._keys = list(transaction.cursor().iternext(keys=True, values=False))
        if not self._keys:
            raise DataError(f"{self.directory} holds no images.")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> np.ndarray:
        """The fitted image. Raises DataError, naming the entry, if it is missing or no picture."""
        key = self._keys[index]
        with self._open().begin() as transaction:
            value = transaction.get(key)
        entry = f"the entry {key.decode(errors='replace')!r} of {self.directory}"
        if value is None:
            raise DataError(f"{entry} is missing.")
        try:
            return self.fit(eight_bits(read_image(io.BytesIO(value))))
        except DataError as error:
            raise DataError(
                f"the entry {key.decode(errors='replace')!r} of {self.directory} is no picture ({error})."
            ) from error

    def _open(self):
        try:
            import lmdb
        except ImportError as error:
            raise ImportError('LSUN and FFHQ are LMDB databases: pip install "deqjax[vision]"') from error
        with self._lock:
            if self._environment is None:
                try:
                    self._environment = lmdb.open(
                        str(self.directory), readonly=True, lock=False, readahead=False, meminit=False
                    )
                except lmdb.Error as error:
                    raise DataError(f"{self.directory} is no LMDB database that can be read ({error}).") from error
        return self._environment


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
    return Database(database, lambda image: centre(image, size))


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
    whole = Database(directory, lambda image: image, [b"length"])
    with whole._open().begin() as transaction:
        try:
            length = int(transaction.get(b"length").decode())
        except (AttributeError, ValueError) as error:
            raise DataError(f"{directory} has no entry 'length' with the number of images.") from error

    def fit(image):
        if image.shape[:2] != (size, size):
            raise DataError(f"{image.shape[1]}x{image.shape[0]} pixels under the name of {size}x{size}")
        return image

    images = Database(directory, fit, [f"{size}-{number:05d}".encode() for number in range(length)])
    order = np.random.RandomState(seed).permutation(length)
    n_train = int(0.9 * length)
    return Part(images, order[:n_train]), Part(images, order[n_train:])
