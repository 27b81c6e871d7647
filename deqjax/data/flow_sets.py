"""Pairs of frames with their flow, in the layouts in which they are published.

FlyingChairs (Dosovitskiy et al. 2015), FlyingThings3D (Mayer et al. 2016), MPI Sintel (Butler et al. 2012), KITTI 2015
(Menze and Geiger 2015) and HD1K (Kondermann et al. 2016). Every function lists a split without reading any picture.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.flow_files import read_flo, read_kitti, read_pfm_flow
from deqjax.data.images import read_image

CHAIRS_SPLIT = ("FlyingChairs_train_val.txt", "chairs_split.txt")
# Vectors with a longer component are not valid.
LONGEST = 1000.0


class Pair(NamedTuple):
    """The files of two frames and of the flow from the first to the second, if it is known."""

    image1: pathlib.Path
    image2: pathlib.Path
    flow: pathlib.Path | None
    name: str  # under which a result is submitted
    begins: bool = True  # whether it does not go on from where the pair before it in the list ended


class Sample(NamedTuple):
    """Two frames and what is known of the flow between them."""

    image1: np.ndarray  # [H, W, 3], uint8
    image2: np.ndarray
    flow: np.ndarray  # [H, W, 2], float32; zero where it is not valid
    valid: np.ndarray  # [H, W], float32: 0 or 1


@dataclasses.dataclass(frozen=True)
class FlowSet:
    """A list of pairs.

    Attributes:
      name: of the set.
      pairs: files.
      sparse: whether the flow is known in some pixels only, from a laser scanner, and cannot be interpolated.
    """

    name: str
    pairs: Sequence[Pair]
    sparse: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def frames(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The two frames of a pair, `[H, W, 3]` of 8 bits.

        Raises:
          DataError: a file is missing or damaged, or the frames differ in size.
        """
        pair = self.pairs[number]
        image1, image2 = read_frame(pair.image1), read_frame(pair.image2)
        if image1.shape != image2.shape:
            raise DataError(
                f"{pair.image1} is {image1.shape[1]} x {image1.shape[0]} and {pair.image2} is {image2.shape[1]} x "
                f"{image2.shape[0]}: the frames of a pair must have the same size."
            )
        return image1, image2

    def read(self, number: int) -> Sample:
        """A pair with its flow. Vectors that are not finite, or longer than `LONGEST`, are not valid.

        Raises:
          DataError: as in `frames`; the flow is of another size, unknown, or valid nowhere.
        """
        pair = self.pairs[number]
        if pair.flow is None:
            raise DataError(
                f"{self.name}: the flow of {pair.image1} is not published, so it cannot be trained or evaluated on."
            )
        image1, image2 = self.frames(number)
        flow, valid = read_flow(pair.flow)
        if flow.shape[:2] != image1.shape[:2]:
            raise DataError(
                f"{pair.flow} is {flow.shape[1]} x {flow.shape[0]} and {pair.image1} is {image1.shape[1]} x {image1.shape[0]}."
            )
        if not valid.any():
            raise DataError(f"{pair.flow}: none of its vectors is valid (finite, and below {LONGEST:.0f} pixels).")
        return Sample(image1, image2, flow, valid)


def read_flow(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow `[H, W, 2]`, zero where it is not valid, and validity `[H, W]`, of a file of any of the formats."""
    readers = {".flo": read_flo, ".pfm": read_pfm_flow, ".png": read_kitti}
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in readers:
        raise DataError(f"{path}: flow is read from {', '.join(readers)}.")
    found = readers[suffix](path)
    flow, valid = found if isinstance(found, tuple) else (found, np.ones(found.shape[:2], np.float32))
    # Comparisons with NaN are false.
    valid = valid * (np.abs(flow) < LONGEST).all(axis=-1)
    return np.where(valid[..., None] > 0, flow, np.float32(0)), valid.astype(np.float32)


def read_frame(path: str | os.PathLike) -> np.ndarray:
    """A frame `[H, W, 3]` of 8 bits; grey is repeated, alpha dropped."""
    image = read_image(path)
    return (image // 257).astype(np.uint8) if image.dtype == np.uint16 else image


# The sets ------------------------------------------------------------------------------------------------------------


def flying_chairs(root: str | os.PathLike, split: str) -> FlowSet:
    """FlyingChairs: split "train" (22,232 pairs) or "valid" (640).

    Args:
      root: holds `FlyingChairs_release/data`, and the list of splits in one of the two or here.
    """
    root = pathlib.Path(root)
    folder = _folder(root / "FlyingChairs_release" / "data", "FlyingChairs", "lmb.informatik.uni-freiburg.de")
    flows = sorted(folder.glob("*_flow.flo"))
    lists = [place / name for place in (root, folder.parent, folder) for name in CHAIRS_SPLIT if (place / name).is_file()]
    if not lists:
        raise DataError(
            f"FlyingChairs: {root} lacks {CHAIRS_SPLIT[0]}, which says which pairs are for training (1) or not (2)."
        )
    numbers = lists[0].read_text().split()
    if len(numbers) != len(flows) or set(numbers) - {"1", "2"}:
        raise DataError(
            f"{lists[0]} must hold 1 or 2 for each of {len(flows)} pairs in {folder}; it has {len(numbers)} entries."
        )
    wanted, stems = {"train": "1", "valid": "2"}[split], [flow.name.removesuffix("_flow.flo") for flow in flows]
    pairs = [
        Pair(_there(folder / f"{stem}_img1.ppm"), _there(folder / f"{stem}_img2.ppm"), flow, stem)
        for stem, flow, number in zip(stems, flows, numbers, strict=True)
        if number == wanted
    ]
    return FlowSet("chairs", _some(pairs, folder))


def flying_things(root: str | os.PathLike, rendering: str, split: str = "train") -> FlowSet:
    """FlyingThings3D, left camera, forwards and backwards in time: split "train" or "test".

    Args:
      root: holds `FlyingThings3D/frames_cleanpass`, `frames_finalpass` and `optical_flow`.
      rendering: "clean" or "final".
    """
    base, part = pathlib.Path(root) / "FlyingThings3D", {"train": "TRAIN", "test": "TEST"}[split]
    folder = _folder(base / "optical_flow" / part, "FlyingThings3D", "lmb.informatik.uni-freiburg.de")
    pairs = []
    for direction in ("into_future", "into_past"):
        for scene in sorted(path for path in folder.glob("*/*") if path.is_dir()):
            flows = _sequence(scene / direction / "left", "*.pfm")
            place = base / f"frames_{rendering}pass" / part / scene.relative_to(folder) / "left"
            images = _sequence(place, "*.png")
            if len(flows) < 2 or not flows.keys() <= images.keys():
                raise DataError(f"{place} has {len(images)} frames for {len(flows)} fields of flow in {scene / direction}.")
            for k in list(flows)[:-1]:
                first, second = (k, k + 1) if direction == "into_future" else (k + 1, k)
                # Pairs into the past are listed forwards, so none goes on from the one before.
                begins = direction == "into_past" or k == min(flows)
                name = str(flows[first].relative_to(folder))
                pairs.append(Pair(images[first], images[second], flows[first], name, begins))
    return FlowSet(f"things_{rendering}", _some(pairs, folder))


def sintel(root: str | os.PathLike, rendering: str, split: str = "training") -> FlowSet:
    """MPI Sintel: split "training" (1,041 pairs) or "test" (552, flow unpublished).

    Args:
      root: holds `Sintel/training` and `Sintel/test`.
      rendering: "clean" or "final".
    """
    base = pathlib.Path(root) / "Sintel" / split
    folder, pairs = _folder(base / rendering, "MPI Sintel", "sintel.is.tue.mpg.de"), []
    for scene in sorted(path for path in folder.iterdir() if path.is_dir()):
        images = _sequence(scene, "*.png")
        place, numbers = base / "flow" / scene.name, list(images)[:-1]
        flows = _sequence(place, "*.flo") if split == "training" else dict.fromkeys(numbers)
        if list(flows) != numbers:
            raise DataError(
                f"{scene} has {len(images)} frames, and {place} {len(flows)} fields of flow: one belongs to each but the last."
            )
        for n, k in enumerate(numbers):
            pairs.append(Pair(images[k], images[k + 1], flows[k], f"{scene.name}/frame{n + 1:04d}", n == 0))
    return FlowSet(f"sintel_{rendering}", _some(pairs, folder))


def kitti(root: str | os.PathLike, split: str = "training") -> FlowSet:
    """KITTI 2015: split "training" or "testing" (200 pairs each, the flow of the latter unpublished).

    Args:
      root: holds `KITTI/training` and `KITTI/testing`, the unpacked `data_scene_flow`.
    """
    base = pathlib.Path(root) / "KITTI" / split
    folder = _folder(base / "image_2", "KITTI 2015", "www.cvlibs.net/datasets/kitti")
    pairs = []
    for image1 in sorted(folder.glob("*_10.png")):
        image2 = _there(image1.with_name(image1.name.replace("_10.png", "_11.png")))
        flow = _there(base / "flow_occ" / image1.name) if split == "training" else None
        pairs.append(Pair(image1, image2, flow, image1.stem))
    return FlowSet("kitti", _some(pairs, folder), sparse=True)


def hd1k(root: str | os.PathLike) -> FlowSet:
    """HD1K, whose flow is published for training only.

    Args:
      root: holds `HD1k/hd1k_input` and `HD1k/hd1k_flow_gt`.
    """
    base = pathlib.Path(root) / "HD1k"
    folder, pairs = _folder(base / "hd1k_flow_gt" / "flow_occ", "HD1K", "hci-benchmark.iwr.uni-heidelberg.de"), []
    sequences: dict[str, list[pathlib.Path]] = {}
    for flow in sorted(folder.glob("*_*.png")):
        sequences.setdefault(flow.stem.partition("_")[0], []).append(flow)
    for flows in sequences.values():
        images = [_there(base / "hd1k_input" / "image_2" / flow.name) for flow in flows]
        pairs += [Pair(images[k], images[k + 1], flows[k], flows[k].stem, k == 0) for k in range(len(flows) - 1)]
    return FlowSet("hd1k", _some(pairs, folder), sparse=True)


def _sequence(folder: pathlib.Path, pattern: str) -> dict[int, pathlib.Path]:
    """The files of a video by the last number in their names, in order, without a gap."""
    numbers = ((re.search(r"(\d+)\D*$", path.stem), path) for path in folder.glob(pattern))
    files = dict(sorted((int(found[1]), path) for found, path in numbers if found))
    if gaps := set(range(min(files, default=0), max(files, default=0))) - files.keys():
        raise DataError(f"{folder} lacks number {min(gaps)} of its {pattern}.")
    return files


def _folder(path: pathlib.Path, name: str, source: str) -> pathlib.Path:
    if not path.is_dir():
        raise DataError(
            f"{name} is not there: {path} is no folder. It comes from {source}; config.data.dir names the folder above it. "
            "configs/flow_warped_photos.py needs no data."
        )
    return path


def _there(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise DataError(f"{path} is missing: its pair is not complete.")
    return path


def _some(pairs: list[Pair], folder: pathlib.Path) -> list[Pair]:
    if not pairs:
        raise DataError(f"{folder} holds no pair of frames.")
    return pairs
