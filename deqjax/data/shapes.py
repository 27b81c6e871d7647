"""A synthetic set for segmentation: discs, squares and triangles on a noisy ground, whose colours say nothing.

Image number i of a split is a function of the split's name, i and the seed:

* The ground is one colour, uniform in 0 to 255 for each channel.
* Two to four shapes are laid on it, later ones over earlier ones. Each has a class, uniform in disc, square and triangle; a
  centre, uniform over the image; a radius r, uniform in size / 8 to size / 4; and a colour, drawn like the ground's until it
  differs from it by more than 60 in some channel.
* A disc is all pixels with dx^2 + dy^2 < r^2; a square those with max(|dx|, |dy|) < 0.9 r; a triangle, standing on its base,
  those with dy < 0.7 r and dy > 2 |dx| - r. Pixels are counted at their centres, y downwards.
* Normal noise of standard deviation 20 is added, and the sum is rounded and clipped.
"""

import dataclasses
import zlib

import numpy as np

CLASSES = ("ground", "disc", "square", "triangle")
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
    size: int = 64
    seed: int = 0
    classes = CLASSES
    palette = PALETTE

    def __len__(self):
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        rng, size = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), i)), self.size
        y, x = np.mgrid[:size, :size] + 0.5
        labels = np.zeros((size, size), np.uint8)
        ground = rng.uniform(0, 255, 3)
        image = np.broadcast_to(ground, (size, size, 3)).copy()
        for _ in range(rng.integers(2, 5)):
            label = int(rng.integers(1, len(CLASSES)))
            centre, r = rng.uniform(0, size, 2), rng.uniform(size / 8, size / 4)
            colour = rng.uniform(0, 255, 3)
            while np.max(np.abs(colour - ground)) <= 60:
                colour = rng.uniform(0, 255, 3)
            dx, dy = x - centre[0], y - centre[1]
            inside = {
                1: dx**2 + dy**2 < r**2,
                2: np.maximum(np.abs(dx), np.abs(dy)) < 0.9 * r,
                3: (dy < 0.7 * r) & (dy > 2 * np.abs(dx) - r),
            }[label]
            labels[inside], image[inside] = label, colour
        return np.clip(np.rint(image + rng.normal(0, 20, image.shape)), 0, 255).astype(np.uint8), labels
