"""Cityscapes: street scenes of 2048 x 1024 with 19 classes, in the published layout.

leftImg8bit/{train,val,test}/<city>/<name>_leftImg8bit.png
gtFine/{train,val}/<city>/<name>_gtFine_labelIds.png
list/cityscapes/{train,val,test}.lst    (optional) an image and its labels a line, as paths from here
"""

import os
import pathlib

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import read_image

IGNORED = 255
# Label ids of the 19 classes, in the order of their training numbers; all others are ignored.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky"),
    *("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
PALETTE = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30)),
    *((220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142)),
    *((0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
CLASS_WEIGHTS = (
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023, 0.9539, 0.9843, 1.1116, 0.9037),
    *(1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
)


class Cityscapes:
    """A split: item i is an image `[H, W, 3]` of 8 bits and the training number of every pixel `[H, W]`, 255 where none counts.

    Args:
      directory: the root of the layout above.
      split: "train", "val" or "test", whose labels are not published: all its pixels are ignored.

    Raises:
      DataError: files are missing, or a list is damaged.
    """

    classes, palette = CLASSES, PALETTE

    def __init__(self, directory: str | os.PathLike, split: str):
        self.directory = pathlib.Path(directory)
        listed = self.directory / "list" / "cityscapes" / f"{split}.lst"
        self.pairs = self._from_list(listed, split) if listed.is_file() else self._from_folders(split)
        missing = [path for pair in self.pairs for path in pair if path is not None and not (self.directory / path).is_file()]
        if missing:
            raise DataError(f"{self.directory} lacks {len(missing)} files of {split}, the first of them {missing[0]}.")

    def _from_list(self, path, split):
        pairs = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            fields = line.split()
            if len(fields) != 2 and not (split == "test" and len(fields) == 1):
                raise DataError(f"{path}, line {number}: expected an image and its labels, found {line[:80]!r}.")
            pairs.append((fields[0], fields[1] if len(fields) == 2 else None))
        if not pairs:
            raise DataError(f"{path} is empty.")
        return pairs

    def _from_folders(self, split):
        root = self.directory / "leftImg8bit" / split
        images = sorted(root.glob("*/*_leftImg8bit.png"))
        if not images:
            raise DataError(
                f"{root} holds no images. Expected are leftImg8bit/{split}/<city>/<name>_leftImg8bit.png and, for training and "
                "validation, gtFine/... beside them (https://www.cityscapes-dataset.com, free for research on registration). "
                "Without a network there is configs/mdeq_shapes.py."
            )

        def labels(image):
            name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
            return f"gtFine/{split}/{image.parent.name}/{name}"

        return [(str(p.relative_to(self.directory)), None if split == "test" else labels(p)) for p in images]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = self.pairs[i]
        image = read_image(self.directory / image_path)
        if label_path is None:
            return image, np.full(image.shape[:2], IGNORED, np.uint8)
        labels = training_numbers(read_image(self.directory / label_path, 1)[..., 0], label_path)
        if labels.shape != image.shape[:2]:
            raise DataError(f"{label_path} is {labels.shape}, but its image {image.shape[:2]}.")
        return image, labels


def training_numbers(label_ids: np.ndarray, name: str) -> np.ndarray:
    """Label ids as numbers 0 to 18, and 255 for what is not evaluated.

    Raises:
      DataError: an id that Cityscapes does not have; ids go from 0 to 33, and 255 stands for -1.
    """
    strange = np.setdiff1d(label_ids, [*range(34), IGNORED])
    if strange.size:
        raise DataError(
            f"{name}: label ids {', '.join(map(str, strange[:5]))} are outside 0 to 33. Is it a *_labelIds.png, not a "
            "*_color.png or *_instanceIds.png?"
        )
    table = np.full(256, IGNORED, np.uint8)
    table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
    return table[label_ids]


def label_ids(training: np.ndarray) -> np.ndarray:
    """Numbers 0 to 18 as the label ids that the evaluation server expects."""
    return np.asarray(LABEL_IDS, np.uint8)[training]
