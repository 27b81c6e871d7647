"""Augmentations of images, deterministic given a random generator; NumPy arrays of 8-bit (or 16-bit) pixels in and out.

Sizes and offsets follow torchvision's formulas, resizing is Pillow's: a triangle as wide as the reduction.
"""

import math
from collections.abc import Sequence

import numpy as np

from deqjax.data.images import pillow, unit


def normalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Pixels as `(x / largest - mean) / std` of every channel, in float32."""
    return (unit(images) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def denormalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Back to real numbers from 0 to 1, as for a picture."""
    return np.clip(np.asarray(images) * np.asarray(std, np.float32) + np.asarray(mean, np.float32), 0, 1)


def pad_crop_flip(
    images: np.ndarray,
    rng: np.random.Generator,
    pad: int = 4,
    *,
    flip: bool = True,
    places: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """A window of the same size out of every image `[B, H, W, C]` with black edges of `pad` pixels; half of them mirrored.

    Args:
      places, batch_size: where these images are in a batch of so many, each of which has draws of its own: so a part of the
        batch is changed as the whole is. By default they are all of it.
    """
    B, H, W, _ = images.shape
    places, batch_size = (np.arange(B), B) if places is None else (np.asarray(places), batch_size)
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, batch_size))[:, places]
    rows, columns = top[:, None] + np.arange(H), left[:, None] + np.arange(W)
    if flip:
        columns = np.where(rng.random(batch_size)[places, None] < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> np.ndarray:
    """A random part of an image `[H, W, C]`, resized to a square (Szegedy et al. 2015).

    Args:
      size: of the square.
      area: least and largest share of the image.
      aspect: least and largest width over height, uniform in its logarithm.
      attempts: draws that may not fit into the image, before the largest central part within the aspects is taken.
    """
    H, W, _ = image.shape
    for _ in range(attempts):
        target = H * W * rng.uniform(*area)
        ratio = math.exp(rng.uniform(*map(math.log, aspect)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= W and 0 < h <= H:
            top, left = int(rng.integers(0, H - h + 1)), int(rng.integers(0, W - w + 1))
            return resize(image[top : top + h, left : left + w], size, size)
    ratio = min(max(W / H, aspect[0]), aspect[1])
    w, h = min(W, round(H * ratio)), min(H, round(W / ratio))
    # Halves are rounded down here, and to even numbers in `_center`: so torchvision does.
    top, left = (H - h) // 2, (W - w) // 2
    return resize(image[top : top + h, left : left + w], size, size)


def resize_and_center(image: np.ndarray, shorter: int, size: int) -> np.ndarray:
    """An image `[H, W, C]` with its shorter side resized, and the central square of it."""
    H, W, _ = image.shape
    h, w = (shorter, int(shorter * W / H)) if H <= W else (int(shorter * H / W), shorter)
    return _center(resize(image, h, w), size, size)


def mirror(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image `[H, W, ...]` or its mirror image, with equal chances."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear resizing of `[H, W, C]`."""
    if image.shape[:2] == (height, width):
        return image
    if image.dtype != np.uint8:
        # Pillow resizes 16 bits in no colour mode: plane by plane, as real numbers.
        planes = [_resize_plane(plane, height, width) for plane in np.moveaxis(image.astype(np.float32), -1, 0)]
        return np.rint(np.stack(planes, axis=-1)).astype(image.dtype)
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    Image = pillow()
    resized = np.asarray(Image.fromarray(squeezed).resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if image.shape[-1] == 1 else resized


def _resize_plane(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same of real numbers `[H, W]`."""
    Image = pillow()
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), Image.Resampling.BILINEAR))


def _center(image, height, width):
    H, W, _ = image.shape
    if height > H or width > W:
        # As torchvision: black edges where the image is smaller.
        before = [max(n - m, 0) // 2 for n, m in ((height, H), (width, W))]
        after = [max(n - m, 0) - b for (n, m), b in zip(((height, H), (width, W)), before, strict=True)]
        image = np.pad(image, ((before[0], after[0]), (before[1], after[1]), (0, 0)))
        H, W, _ = image.shape
    top, left = round((H - height) / 2), round((W - width) / 2)
    return image[top : top + height, left : left + width]


# Images with labels --------------------------------------------------------------------------------------------------


def scale_and_crop(
    image: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    base: int,
    ignored: int = 255,
) -> tuple[np.ndarray, np.ndarray]:
    """A random window of a randomly resized image `[H, W, C]` with its labels `[H, W]`, mirrored half of the time.

    The longer side becomes 0.5, 0.6, ..., 2.1 times `base`; where the image is then smaller than the window, black pixels and
    ignored labels fill it at the bottom and on the right.

    Args:
      size: height and width of the window.
      base: length that the factor applies to, 2048 for Cityscapes.
    """
    H, W, _ = image.shape
    longer = int(base * (0.5 + rng.integers(0, 17) / 10) + 0.5)
    h, w = (max(int(n * longer / max(H, W) + 0.5), 1) for n in (H, W))
    top, left = (int(rng.integers(0, max(n - m, 0) + 1)) for n, m in ((h, size[0]), (w, size[1])))
    rows, columns = np.arange(top, min(top + size[0], h)), np.arange(left, min(left + size[1], w))
    missing = [(0, size[0] - len(rows)), (0, size[1] - len(columns))]
    window = np.pad(_bilinear(image, (h, w), rows, columns), (*missing, (0, 0)))
    nearest = labels[np.ix_(_floored(rows, H, h), _floored(columns, W, w))]
    nearest = np.pad(nearest, missing, constant_values=ignored)
    return (window[:, ::-1], nearest[:, ::-1]) if rng.random() < 0.5 else (window, nearest)


def _bilinear(image, size, rows, columns):
    """Some rows and columns of the image resized as OpenCV does: between pixel centres, without smoothing."""
    (low_y, high_y, y), (low_x, high_x, x) = (
        _neighbours(at, n, m) for at, n, m in zip((rows, columns), image.shape[:2], size, strict=True)
    )
    upper, lower = image[low_y].astype(np.float32), image[high_y].astype(np.float32)
    between = upper + y[:, None, None] * (lower - upper)
    left, right = between[:, low_x], between[:, high_x]
    return np.rint(left + x[:, None] * (right - left)).astype(image.dtype)


def _neighbours(at, n, m):
    source = np.clip((at + 0.5) * (n / m) - 0.5, 0, n - 1)
    low = source.astype(int)
    return low, np.minimum(low + 1, n - 1), (source - low).astype(np.float32)


def _floored(at, n, m):
    """OpenCV's nearest neighbour: the pixel in which the upper left corner falls."""
    return np.minimum((at * (n / m)).astype(int), n - 1)
