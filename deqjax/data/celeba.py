"""CelebA, aligned and cropped (Liu et al. 2015), as the diffusion models of the literature have it."""

import os
import pathlib

import numpy as np

from deqjax.data.augment import resize
from deqjax.data.errors import DataError
from deqjax.data.unlabelled_images import Files

_PARTITION = "list_eval_partition.txt"
_FOLDER = "img_align_celeba"
_NUMBERS = {"0": "train", "1": "valid", "2": "test"}


def celeba(directory: str | os.PathLike, size: int = 64) -> dict[str, Files]:
    """The splits "train", "valid" and "test".

    Of each picture of 178x218 the box of 128x128 around the face (rows 57 to 184, columns 25 to 152), scaled to `size`.

    Args:
      directory: holds `list_eval_partition.txt` and the folder `img_align_celeba`, as published.
      size: of the images.

    Raises:
      DataError: something is missing or damaged.
    """
    directory = pathlib.Path(directory)
    partition, folder = directory / _PARTITION, directory / _FOLDER
    # Some archives have the pictures one folder deeper.
    folder = folder / _FOLDER if (folder / _FOLDER).is_dir() else folder
    if not partition.is_file() or not folder.is_dir():
        raise DataError(
            f"{directory} lacks {_PARTITION} or the folder {_FOLDER} of CelebA's aligned pictures. Both are published by its "
            "authors (Large-scale CelebFaces Attributes Dataset); unpack img_align_celeba.zip there. "
            "configs/ddim_digits.py needs no download."
        )
    files: dict[str, list] = {name: [] for name in _NUMBERS.values()}
    for number, line in enumerate(partition.read_text().splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in _NUMBERS:
            raise DataError(f"{partition}, line {number}: {line!r} is not a file name and 0, 1 or 2.")
        files[_NUMBERS[fields[1]]].append(folder / fields[0])
    return {name: Files(found, lambda image: _face(image, size)) for name, found in files.items()}


def _face(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] != (218, 178):
        raise DataError(f"a picture of {image.shape[1]}x{image.shape[0]} pixels: CelebA's aligned ones have 178x218.")
    return resize(image[57:185, 25:153], size, size)
