"""Images for generative models, without labels, and their batches.

A set is anything with a length whose items are images `[H, W, C]` of 8 bits, all of one size: an array, or a reader of files.
"""

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from deqjax.data.augment import resize_and_center
from deqjax.data.digits import digits
from deqjax.data.errors import DataError
from deqjax.data.images import image_files, read_image
from deqjax.data.prefetch import Prefetch, rows_of_batch


@runtime_checkable
class Images(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class ImageBatches:
    """Training batches as a function of (seed, step): epochs in orders of their own, every image possibly mirrored."""

    def __init__(self, images: Images, batch_size: int, seed: int = 0, flip: bool = False, shard: int = 0, shards: int = 1):
        """Args:
        images: the set.
        batch_size: over all processes.
        seed: of order and mirroring.
        flip: mirror left and right with probability one half.
        shard, shards: which of how many equal parts of each batch to give.

        Raises:
          DataError: the set is smaller than a batch, its images are not of 8 bits, or the parts would not be equal.
        """
        if batch_size % shards:
            raise DataError(f"{shards} processes cannot share a batch of {batch_size} images evenly (data.batch_size).")
        if len(images) < batch_size:
            raise DataError(f"there are {len(images)} images, fewer than the {batch_size} of a batch (data.batch_size).")
        if len(images) and images[0].dtype != np.uint8:
            raise DataError(f"images of {images[0].dtype} numbers: they must have 8 bits, from 0 to 255.")
        self.images, self.batch_size, self.seed, self.flip = images, batch_size, seed, flip
        self._rows = slice(shard * batch_size // shards, (shard + 1) * batch_size // shards)
        # What is in memory already needs no threads.
        threads = 0 if isinstance(images, np.ndarray) else None
        self._stream = Prefetch(self._jobs, lambda images: {"image": np.stack(images)}, threads=threads)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`{"image": [B_local, H, W, C]}`, 8 bits unsigned."""
        return self._stream.batch(step)

    def cancel(self) -> None:
        """See `Prefetch`."""
        self._stream.cancel()

    def _jobs(self, step: int) -> list[Callable[[], np.ndarray]]:
        rows = rows_of_batch(self.seed, step, len(self.images), self.batch_size)
        mirrored = self.flip & (np.random.default_rng((self.seed, step, 1)).random(self.batch_size) < 0.5)
        chosen = zip(rows[self._rows], mirrored[self._rows], strict=True)
        return [functools.partial(_one, self.images, int(i), bool(flip)) for i, flip in chosen]


def _one(images: Images, index: int, mirrored: bool) -> np.ndarray:
    image = images[index]
    return image[:, ::-1] if mirrored else image


def take(images: Images, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Some images of a set, `[N, H, W, C]`; files are decoded in several threads."""
    if isinstance(images, np.ndarray):
        return images[np.asarray(indices)]
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        return np.stack(list(threads.map(images.__getitem__, map(int, indices))))


class Files:
    """Image files, each fitted to one size."""

    def __init__(self, files: Sequence[pathlib.Path], fit: Callable[[np.ndarray], np.ndarray], channels: int = 3):
        self.files, self.fit, self.channels = files, fit, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        """The fitted image. Raises DataError, naming the file, if it cannot be read."""
        return self.fit(eight_bits(read_image(self.files[index], self.channels)))


def folder(directory: str | os.PathLike, size: int, channels: int = 3) -> Files:
    """The images in any folder and those below it, the shorter side scaled to `size`, the centre cut out.

    Raises:
      DataError: there is no such folder, or no picture in it.
    """
    return Files(image_files(directory), lambda image: resize_and_center(image, size, size), channels)


def split(images: Images, share: float = 0.1, seed: int = 2019) -> tuple[Images, Images]:
    """Images to train on, and a share of them held out, chosen by shuffling with a seed."""
    order = np.random.RandomState(seed).permutation(len(images))
    held_out = max(round(share * len(images)), 1)
    return Part(images, np.sort(order[:-held_out])), Part(images, np.sort(order[-held_out:]))


class Part:
    """Some of the images of a set."""

    def __init__(self, images: Images, indices: np.ndarray):
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[int(self.indices[index])]


def padded_digits(size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits, 8x8, in the middle of black images: to train on, and every tenth, held out.

    Raises:
      DataError: the images would not hold them.
      ImportError: scikit-learn is not installed.
    """
    if size < 8:
        raise DataError(f"the digits have 8x8 pixels, so images of {size}x{size} cannot hold them (model.image_size).")
    images = digits("all").images
    before = (size - 8) // 2
    images = np.pad(images, ((0, 0), (before, size - 8 - before), (before, size - 8 - before), (0, 0)))
    held_out = np.arange(len(images)) % 10 == 9
    return images[~held_out], images[held_out]


def eight_bits(image: np.ndarray) -> np.ndarray:
    """Unsigned integers of 16 bits reduced to 8."""
    return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
