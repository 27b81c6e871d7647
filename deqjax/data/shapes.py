"""A synthetic set for segmentation: discs, squares and triangles, each class in colours of its own, on a noisy ground.

Image number i of a split is a function of the split's name, i and the seed:

* The ground is grey, its level uniform in 40 to 215.
* Two to four shapes are laid on it, later ones over earlier ones. Each has a class, uniform in disc, square and triangle; a
  centre, uniform over the image; a radius r, uniform in size / 8 to size / 4; and its class's colour (`COLOURS`) with a number
  uniform in -60 to 60 added to every channel.
* A disc is all pixels with dx^2 + dy^2 < r^2; a square those with max(|dx|, |dy|) < 0.9 r; a triangle, standing on its base,
  those with dy < 0.7 r and dy > 2 |dx| - r. Pixels are counted at their centres, y downwards.
* Normal noise of standard deviation 20 is added, and the sum is rounded and clipped.
"""

import dataclasses
import zlib

import numpy as np

CLASSES = ("ground", "disc", "square", "triangle")
COLOURS = ((200, 75, 75), (75, 190, 80), (80, 100, 215))  # of disc, square and triangle
PALETTE = ((40, 40, 40), (220, 60, 60), (60, 160, 220), (240, 200, 60))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A split: item i is an image `[size, size, 3]` of 8 bits and the class of every pixel `[size, size]`.

    Attributes:
      split: "train", "valid" or "test".
      length: how many images it has.
      size: of an image.
      seed: of all splits.
    """

    split: str
    length: int
    size: int = 32
    seed: int = 0
    classes = CLASSES
    palette = PALETTE

    def __len__(self):
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        rng, size = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), i)), self.size
        y, x = np.mgrid[:size, :size] + 0.5
        labels = np.zeros((size, size), np.uint8)
        image = np.full((size, size, 3), rng.uniform(40, 215))
        for _ in range(rng.integers(2, 5)):
            label = int(rng.integers(1, len(CLASSES)))
            centre, r = rng.uniform(0, size, 2), rng.uniform(size / 8, size / 4)
            colour = np.asarray(COLOURS[label - 1]) + rng.uniform(-60, 60, 3)
            dx, dy = x - centre[0], y - centre[1]
            inside = {
                1: dx**2 + dy**2 < r**2,
                2: np.maximum(np.abs(dx), np.abs(dy)) < 0.9 * r,
                3: (dy < 0.7 * r) & (dy > 2 * np.abs(dx) - r),
            }[label]
            labels[inside], image[inside] = label, colour
        return np.clip(np.rint(image + rng.normal(0, 20, image.shape)), 0, 255).astype(np.uint8), labels
