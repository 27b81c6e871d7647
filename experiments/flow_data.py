"""Training mixes, evaluation sets and batches of optical flow."""

import functools
from typing import NamedTuple

import numpy as np

from deqjax.data import flow_sets
from deqjax.data.flow_augment import FlowAugmentor
from deqjax.data.flow_sets import FlowSet, Sample
from deqjax.data.warped_photos import warped_photos

STAGES = ("chairs", "things", "sintel", "kitti", "warped_photos")
# What the offline set needs of `config.data` beside what all need.
OFFLINE = ("n_train", "n_valid", "size", "motion", "data_seed", "min_scale", "max_scale", "strength")


class Part(NamedTuple):
    """A set as it takes part in a mix."""

    pairs: FlowSet
    repeats: int
    augmentor: FlowAugmentor


class Mix:
    """The pairs of several sets as one list, each as often as it counts."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self.ends = np.cumsum([len(part.pairs) * part.repeats for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def sample(self, number: int, seed: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Pair `number` changed at random, with frames from 0 to 255; the seed says how."""
        which = int(np.searchsorted(self.ends, number, side="right"))
        pairs, _, augmentor = self.parts[which]
        start = self.ends[which] - len(pairs) * self.parts[which].repeats
        sample = augmentor(pairs.read(int(number - start) % len(pairs)), np.random.default_rng(seed))
        return as_arrays(sample)


def as_arrays(sample: Sample) -> dict[str, np.ndarray]:
    """A sample as part of a batch."""
    return {name: np.ascontiguousarray(array, np.float32) for name, array in sample._asdict().items()}


def training_mix(data) -> Mix:
    """The sets of a stage, with its augmentation.

    Args:
      data: `config.data`: stage, dir, crop, and for the offline set its own settings.
    """
    root = data.dir
    augmentor = functools.partial(FlowAugmentor, crop=tuple(data.crop))
    if data.stage == "warped_photos":
        photos = flow_sets.flying_chairs(offline_folder(data), "train")
        gentle = augmentor(min_scale=data.min_scale, max_scale=data.max_scale, strength=data.strength, hue=0.05, eraser=())
        return Mix([Part(photos, 1, gentle)])
    if data.stage == "chairs":
        return Mix([Part(flow_sets.flying_chairs(root, "train"), 1, augmentor(min_scale=-0.1, max_scale=1.0))])
    if data.stage == "things":
        wide = augmentor(min_scale=-0.4, max_scale=0.8)
        return Mix([Part(flow_sets.flying_things(root, rendering), 1, wide) for rendering in ("clean", "final")])
    if data.stage == "kitti":
        sparse = augmentor(min_scale=-0.2, max_scale=0.4, flip=False, sparse=True)
        return Mix([Part(flow_sets.kitti(root), 1, sparse)])
    dense = augmentor(min_scale=-0.2, max_scale=0.6)
    parts = [Part(flow_sets.sintel(root, rendering), 100, dense) for rendering in ("clean", "final")]
    parts.append(Part(flow_sets.kitti(root), 200, augmentor(min_scale=-0.3, max_scale=0.5, sparse=True)))
    parts.append(Part(flow_sets.hd1k(root), 5, augmentor(min_scale=-0.5, max_scale=0.2, sparse=True)))
    return Mix([*parts, Part(flow_sets.flying_things(root, "clean"), 1, dense)])


def offline_folder(data):
    """Where the warped photographs are, written if they were not there."""
    return warped_photos(data.dir, data.n_train, data.n_valid, tuple(data.size), data.motion, data.data_seed)


# Names of sets to evaluate on, each with how frames are padded.
EVALUATIONS = {
    "chairs": "sintel",
    "things_clean": "sintel",
    "things_final": "sintel",
    "sintel_clean": "sintel",
    "sintel_final": "sintel",
    "kitti": "kitti",
    "hd1k": "kitti",
    "warped_photos": "sintel",
}


def evaluation_set(name: str, data) -> FlowSet:
    """A set with known flow: the validation split where there is one, else what is published for training or testing."""
    family, _, rendering = name.partition("_")
    if name == "warped_photos":
        return flow_sets.flying_chairs(offline_folder(data), "valid")
    if family == "chairs":
        return flow_sets.flying_chairs(data.dir, "valid")
    if family == "things":
        return flow_sets.flying_things(data.dir, rendering, "test")
    if family == "sintel":
        return flow_sets.sintel(data.dir, rendering)
    return flow_sets.kitti(data.dir) if name == "kitti" else flow_sets.hd1k(data.dir)
