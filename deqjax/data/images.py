"""Pictures in files: any kind that people have, read into one array form."""

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable

import numpy as np

from deqjax.data.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff")


def read_image(path: str | os.PathLike, channels: int | None = 3, upright: bool = False) -> np.ndarray:
    """The picture in a file, `[H, W, channels]`, 8 bits unsigned, or 16 if it is grey and the file has 16.

    Palettes are looked up, CMYK becomes RGB, an alpha channel is dropped; grey is repeated for three channels, and colour
    becomes its luma (ITU-R 601) for one. The first frame of several counts.

    Args:
      path: of the file.
      channels: 3 for RGB, 1 for grey; None for as many as the picture has.
      upright: turned as the camera says that it was held (EXIF), which the published sets' own readers do not heed.

    Raises:
      DataError: there is no such file, it is empty, truncated or no picture, or it has no pixels.
    """
    return _read(path, str(path), channels, upright)


def decode_image(data: bytes, name: str, channels: int | None = 3) -> np.ndarray:
    """The picture in the bytes of a file, as by `read_image`; errors call it by the name."""
    return _read(io.BytesIO(data), name, channels, upright=False)


def _read(file, name, channels, upright):
    image = pillow()
    try:
        with image.open(file) as opened:
            return _as_array(_upright(opened) if upright else opened, channels)
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file.") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, image.DecompressionBombError) as error:
        raise DataError(f"{name} is no picture that can be read ({error}).") from error


def _upright(file):
    from PIL import ImageOps

    return ImageOps.exif_transpose(file)


def _as_array(file, channels):
    if channels is None:
        channels = 1 if pillow().getmodebase(file.mode) == "L" else 3
    if file.mode.startswith("I;16") or file.mode == "I":  # grey with 16 bits, which Pillow would clip
        array = np.asarray(file)
        if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
            raise ValueError("its values exceed 16 bits")
        return np.repeat(array.astype(np.uint16)[..., None], channels, axis=-1)
    if file.mode == "F":
        raise ValueError("its values are real numbers; save it with 8 or 16 bits")
    if file.mode in ("P", "PA"):
        # By way of RGBA: a palette may hold transparent colours.
        file = file.convert("RGBA")
    array = np.asarray(file.convert("RGB" if channels == 3 else "L"))
    return array if channels == 3 else array[..., None]


def unit(image: np.ndarray) -> np.ndarray:
    """Unsigned integers of 8 or 16 bits as real numbers from 0 to 1."""
    return (image / np.iinfo(image.dtype).max).astype(np.float32)


def quantized(image: np.ndarray) -> np.ndarray:
    """Real numbers from 0 to 1 (others are clipped) as 8 bits, the inverse of `unit`."""
    return np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes real numbers from 0 to 1 (others are clipped), `[H, W, 1 or 3]`, as 8 bits a channel."""
    rounded = quantized(image)
    pillow().fromarray(rounded[..., 0] if rounded.shape[-1] == 1 else rounded).save(path)


def image_files(folder: str | os.PathLike, suffixes: Iterable[str] = SUFFIXES) -> list[pathlib.Path]:
    """The pictures in a folder and the folders below it, sorted by path.

    Raises:
      DataError: there is no such folder, or no picture in it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in tuple(suffixes) and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no pictures ({', '.join(suffixes)}).")
    return files


def pillow():
    """Pillow's Image module."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading and writing pictures needs Pillow: pip install "deqjax[vision]"') from error
    return Image
