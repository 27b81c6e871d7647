"""An offline set: photographs warped by smooth fields that are known exactly, in the layout of FlyingChairs.

The rule that makes it. A photograph, at full size or halved, is sampled twice. The second frame is a window of it, as it
is. The first frame shows at pixel x what the second one shows at x + u(x), sampled by cubic interpolation. The flow u is the
sum of a shift by up to `motion` pixels in each direction, an affine map that moves the corners by up to a quarter of that,
and two waves, as long as the window or half that, of an eighth of it at most; so it never folds, and nothing is occluded.
Where x + u(x) leaves the window the vector is marked as unknown. Every pair follows from the seed and its number; pairs
for validation come from photographs that training never shows.

The photographs are those in scikit-image and scikit-learn.
"""

import io
import os
import pathlib

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.flow_files import UNKNOWN_FLOW, write_flo, write_whole
from deqjax.data.flow_sets import CHAIRS_SPLIT
from deqjax.data.images import pillow
from deqjax.data.photographs import photograph

TRAINING = (
    *("astronaut", "brick", "chelsea", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "motorcycle", "rocket"),
    "flower",
)
VALIDATION = ("coffee", "china")


def warped_photos(
    root: str | os.PathLike,
    n_train: int = 400,
    n_valid: int = 40,
    size: tuple[int, int] = (112, 144),
    motion: float = 8.0,
    seed: int = 0,
) -> pathlib.Path:
    """Writes the set unless it is there, and returns the folder for `flying_chairs`. Several processes may do so at once.

    Args:
      root: folder of all variants of the set.
      n_train, n_valid: pairs for training and for validation.
      size: height and width.
      motion: of the largest shift, in pixels.

    Raises:
      ImportError: the photographs' packages are not installed.
      DataError: sizes that no photograph has.
    """
    H, W = size
    if n_train < 1 or n_valid < 1 or min(H, W) < 16 or not 0 <= motion <= min(H, W) / 4:
        raise DataError(
            f"{n_train} + {n_valid} pairs of {H} x {W} with a motion of {motion}: need pairs of both kinds, 16 pixels a side "
            "or more, and a motion up to a quarter of that."
        )
    folder = pathlib.Path(root) / f"{n_train}+{n_valid}_{H}x{W}_motion{motion:g}_seed{seed}"
    split = folder / CHAIRS_SPLIT[0]
    if split.is_file():
        return folder
    data = folder / "FlyingChairs_release" / "data"
    margin = int(np.ceil(2 * motion)) + 2
    for number in range(n_train + n_valid):
        random = np.random.default_rng((seed, number))
        names = TRAINING if number < n_train else VALIDATION
        photo = photograph(names[random.integers(len(names))])
        photo = np.repeat(photo, 3 // photo.shape[-1], axis=-1)
        if random.random() < 0.5 and min(photo.shape[0] // 2 - H, photo.shape[1] // 2 - W) > 2 * margin:
            photo = np.asarray(pillow().fromarray(photo).reduce(2))
        free = [n - m - 2 * margin for n, m in zip(photo.shape, size, strict=False)]
        if min(free) < 1:
            raise DataError(f"warped photographs of {H} x {W} with a motion of {motion} pixels do not fit {photo.shape[:2]}.")
        corner = [margin + int(random.integers(n)) for n in free]
        image1, image2, flow = warped_pair(photo, corner, smooth_field(size, motion, random))
        for name, image in (("img1", image1), ("img2", image2)):
            picture = io.BytesIO()
            pillow().fromarray(image).save(picture, "PPM")
            write_whole(data / f"{number + 1:05d}_{name}.ppm", picture.getvalue())
        write_flo(data / f"{number + 1:05d}_flow.flo", flow)
    # Last, so that a set that was interrupted is begun again.
    write_whole(split, "".join(f"{part}\n" for part in [1] * n_train + [2] * n_valid).encode())
    return folder


def smooth_field(size: tuple[int, int], motion: float, random: np.random.Generator) -> np.ndarray:
    """A field `[H, W, 2]` as the rule says."""
    H, W = size
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    shift, affine = random.uniform(-motion, motion, 2), random.uniform(-motion / 8, motion / 8, (2, 2))
    field = shift + x[..., None] * affine[0] + y[..., None] * affine[1]
    for periods in (1, 2):
        direction, phase = random.uniform(0, 2 * np.pi, 2)
        wave = np.sin(np.pi * periods * (np.cos(direction) * x + np.sin(direction) * y) + phase)
        field = field + random.uniform(-motion / 8, motion / 8, 2) * wave[..., None] / periods
    return field


def warped_pair(photo: np.ndarray, corner, field: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both frames, of 8 bits, and the flow with unknown vectors marked; the window begins at `corner` (row, column)."""
    H, W = field.shape[:2]
    y, x = np.meshgrid(np.arange(H), np.arange(W), indexing="ij")
    target_x, target_y = x + field[..., 0], y + field[..., 1]
    image1 = cubic(photo.astype(np.float64), corner[0] + target_y, corner[1] + target_x)
    image2 = photo[corner[0] : corner[0] + H, corner[1] : corner[1] + W]
    inside = (target_x >= 0) & (target_x <= W - 1) & (target_y >= 0) & (target_y <= H - 1)
    flow = np.where(inside[..., None], field, 10 * UNKNOWN_FLOW).astype(np.float32)
    return np.rint(np.clip(image1, 0, 255)).astype(np.uint8), np.ascontiguousarray(image2), flow


def cubic(image, y, x):
    """Samples at real coordinates that lie two pixels inside (Catmull and Rom)."""
    rows, columns = np.floor(y).astype(int), np.floor(x).astype(int)
    of_rows, of_columns = _cubic_weights(y - rows), _cubic_weights(x - columns)
    total = 0.0
    for j in range(4):
        for i in range(4):
            weight = of_rows[j] * of_columns[i]
            total = total + weight[..., None] * image[rows + j - 1, columns + i - 1]
    return total


def _cubic_weights(t):
    return (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (t**3 - t**2) / 2,
    )
