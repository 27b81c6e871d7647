"""Random changes of a pair of frames and its flow: colours, erased rectangles, size, mirroring and a window.

What RAFT and its descendants train with. Every draw comes from the generator that is given, in the originals' order.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.flow_sets import Sample
from deqjax.data.images import pillow

OPERATIONS = ("brightness", "contrast", "saturation", "hue")


class Jitter(NamedTuple):
    """A change of colours: factors, the shift of the hue as a part of the circle, and the order of operations."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[str, ...] = OPERATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowAugmentor:
    """Changes samples at random.

    Attributes:
      crop: height and width of the window; images must be at least as large at the largest scale.
      min_scale, max_scale: powers of two between which the scale is drawn.
      flip: mirror, left to right half of the time, upside down a tenth of it (never if sparse).
      sparse: the flow is known in few pixels, which are moved and not interpolated; both axes have one scale.
      strength: of brightness, contrast and saturation; None: 0.4, or 0.3 if sparse.
      hue: largest shift of the hue, as a part of the circle; None: 0.5 / 3.14, or 0.3 / 3.14 if sparse.
      eraser: sides of the rectangles erased in the second frame are drawn from this range; (): none.
    """

    crop: tuple[int, int]
    min_scale: float
    max_scale: float
    flip: bool = True
    sparse: bool = False
    strength: float | None = None
    hue: float | None = None
    eraser: tuple[int, ...] = (50, 100)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """The sample changed; its frames and flow have the size of the window.

        Raises:
          DataError: the pictures are empty.
        """
        image1, image2 = self.colours(sample.image1, sample.image2, random)
        image2 = self.erased(image2, random)
        return self.moved(Sample(image1, image2, sample.flow, sample.valid), random)

    # Colours ---------------------------------------------------------------------------------------------------------

    def colours(self, image1, image2, random):
        """Both frames with other colours, a fifth of the time each with its own (never if sparse)."""
        if not self.sparse and random.random() < 0.2:
            return jittered(image1, self.draw_jitter(random)), jittered(image2, self.draw_jitter(random))
        # The mean that contrast refers to is then of both.
        both = jittered(np.concatenate([image1, image2]), self.draw_jitter(random))
        return both[: len(image1)], both[len(image1) :]

    def draw_jitter(self, random) -> Jitter:
        strength = (0.3 if self.sparse else 0.4) if self.strength is None else self.strength
        hue = ((0.3 if self.sparse else 0.5) / 3.14) if self.hue is None else self.hue
        order = tuple(OPERATIONS[k] for k in random.permutation(len(OPERATIONS)))
        factors = [random.uniform(1 - strength, 1 + strength) for _ in range(3)]
        return Jitter(*factors, random.uniform(-hue, hue), order)

    def erased(self, image, random):
        """Half of the time one or two rectangles take the picture's mean colour, as if something stood before them."""
        if not self.eraser or random.random() >= 0.5:
            return image
        H, W, _ = image.shape
        mean, image = image.reshape(-1, 3).mean(axis=0), image.copy()
        for _ in range(random.integers(1, 3)):
            x, y = random.integers(0, W), random.integers(0, H)
            dx, dy = random.integers(*self.eraser), random.integers(*self.eraser)
            image[y : y + dy, x : x + dx] = mean  # the fraction is cut off
        return image

    # Positions -------------------------------------------------------------------------------------------------------

    def moved(self, sample: Sample, random) -> Sample:
        """Another size, mirrored, and a window of it."""
        (H, W), (ch, cw) = sample.image1.shape[:2], self.crop
        if not H * W:
            raise DataError(f"a picture of {W} x {H} cannot be cropped.")
        margin = 1 if self.sparse else 8
        least = max((ch + margin) / H, (cw + margin) / W)
        scale = 2.0 ** random.uniform(self.min_scale, self.max_scale)
        sx = sy = scale
        if not self.sparse and random.random() < 0.8:
            sx, sy = (scale * 2.0 ** random.uniform(-0.2, 0.2) for _ in range(2))
        sx, sy = max(sx, least), max(sy, least)
        # What is too small for the window has to grow.
        if random.random() >= 0.8 and ch <= H and cw <= W:
            sx = sy = 1.0
        h, w = round(H * sy), round(W * sx)
        mirror = self.flip and random.random() < 0.5
        upside_down = self.flip and not self.sparse and random.random() < 0.1
        if self.sparse:
            # Reaching over the border makes windows at it likelier.
            top = min(max(int(random.integers(0, h - ch + 20)), 0), h - ch)
            left = min(max(int(random.integers(-50, w - cw + 50)), 0), w - cw)
        else:
            top, left = (int(random.integers(0, max(n - m, 1))) for n, m in ((h, ch), (w, cw)))
        rows, columns = top + np.arange(ch), left + np.arange(cw)
        rows, columns = h - 1 - rows if upside_down else rows, w - 1 - columns if mirror else columns
        sign = np.array([-1 if mirror else 1, -1 if upside_down else 1], np.float32)

        image1, image2 = (
            np.rint(resized_window(image, sx, sy, rows, columns)).astype(np.uint8) for image in (sample.image1, sample.image2)
        )
        if self.sparse:
            flow, valid = sample.flow, sample.valid
            if (sx, sy) != (1, 1):
                flow, valid = resized_sparse(flow, valid, sx, sy)
            flow, valid = flow[np.ix_(rows, columns)], valid[np.ix_(rows, columns)]
        else:
            flow = resized_window(sample.flow, sx, sy, rows, columns) * np.array([sx, sy], np.float32)
            # An unknown neighbour makes a vector unknown.
            valid = (resized_window(sample.valid[..., None], sx, sy, rows, columns)[..., 0] > 0.999).astype(np.float32)
        return Sample(image1, image2, flow * sign * valid[..., None], valid)


def jittered(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """A picture `[H, W, 3]` of 8 bits with other colours, by Pillow's arithmetic."""
    from PIL import ImageEnhance

    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    picture = pillow().fromarray(image)
    for operation in jitter.order:
        if operation == "hue":
            hue, saturation, value = picture.convert("HSV").split()
            turned = np.asarray(hue) + np.uint8(int(jitter.hue * 255) % 256)  # around the circle
            picture = pillow().merge("HSV", (pillow().fromarray(turned), saturation, value)).convert("RGB")
        else:
            picture = enhancers[operation](picture).enhance(getattr(jitter, operation))
    return np.asarray(picture)


def resized_window(image: np.ndarray, sx: float, sy: float, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some rows and columns of a picture `[H, W, C]` enlarged by sx and sy: bilinear, between pixel centres, as OpenCV does.

    Returns:
      `[rows, columns, C]`, float32.
    """
    (top, bottom, y), (left, right, x) = (
        _neighbours(at, s, n) for at, s, n in ((rows, sy, image.shape[0]), (columns, sx, image.shape[1]))
    )
    upper, lower = image[top].astype(np.float32), image[bottom].astype(np.float32)
    between = upper + y[:, None, None] * (lower - upper)
    return between[:, left] + x[:, None] * (between[:, right] - between[:, left])


def _neighbours(at, scale, n):
    source = np.clip((at + 0.5) / scale - 0.5, 0, n - 1)
    low = np.floor(source).astype(int)
    return low, np.minimum(low + 1, n - 1), (source - low).astype(np.float32)


def resized_sparse(flow: np.ndarray, valid: np.ndarray, sx: float, sy: float) -> tuple[np.ndarray, np.ndarray]:
    """Sparse flow `[H, W, 2]` and validity `[H, W]` enlarged: each valid pixel goes to the nearest new one.

    Of those that meet the last one stays. The first row and the first column of the result stay empty, as in the originals.
    """
    H, W = valid.shape
    h, w = round(H * sy), round(W * sx)
    y, x = np.nonzero(valid >= 1)
    new_x, new_y = np.round(x * sx).astype(int), np.round(y * sy).astype(int)
    kept = (new_x > 0) & (new_x < w) & (new_y > 0) & (new_y < h)
    new_flow, new_valid = np.zeros((h, w, 2), np.float32), np.zeros((h, w), np.float32)
    new_flow[new_y[kept], new_x[kept]] = flow[y[kept], x[kept]] * np.array([sx, sy], np.float32)
    new_valid[new_y[kept], new_x[kept]] = 1
    return new_flow, new_valid
