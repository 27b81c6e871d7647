"""The signals that a config names: pictures, sound and video on regular grids, as arrays."""

import dataclasses
from pathlib import Path

import numpy as np

from deqjax.data.audio import melody, read_audio
from deqjax.data.coordinates import size
from deqjax.data.errors import DataError
from deqjax.data.image_sets import SETS, image_set
from deqjax.data.images import read_image
from deqjax.data.photographs import NAMES, faces, photograph
from deqjax.data.video import CLIPS, clip, read_video, waves
from experiments.inr_pictures import displayed

RECORDINGS = {"bach": "gt_bach.wav", "counting": "gt_counting.wav"}
# Name of data -> kind -> what may be read without a path.
KINDS = {
    "image": (*NAMES, "faces", *SETS),
    "audio": ("melody", *RECORDINGS),
    "video": ("waves", *CLIPS, "cat"),
}


@dataclasses.dataclass(frozen=True)
class Signal:
    """Samples of one or several signals on one grid, and which of them are for training and for testing.

    Attributes:
      kind: "image", "audio" or "video".
      raw: `[S, *grid, C]`, integers of 8 or 16 bits, or for sound real numbers.
      rate: samples or frames per second; 0 of pictures.
      train, test: numbers of samples, counted row-major.
    """

    kind: str
    raw: np.ndarray
    rate: float
    train: np.ndarray
    test: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape[1:-1]

    @property
    def order(self) -> str:
        return "xy" if self.kind == "image" else "ij"

    def values(self, index: np.ndarray) -> np.ndarray:
        """What a network learns at some samples, `[n, S, C]`: pictures from -1 to 1, sound as it is."""
        flat = self.raw.reshape(self.raw.shape[0], -1, self.raw.shape[-1])[:, index]
        if self.kind != "audio":
            flat = 2 * (flat / np.iinfo(flat.dtype).max) - 1
        return np.moveaxis(flat, 0, 1).astype(np.float32)

    def whole(self, number: int) -> np.ndarray:
        """One signal as it is shown, `[*grid, C]`."""
        values = self.values(np.arange(size(self.shape)))[:, number]
        return displayed(values, self.kind).reshape(*self.shape, -1)


def read(data) -> Signal:
    """The signal that a config names.

    Raises:
      DataError: it is missing, damaged or empty.
    """
    raw, rate = {"image": _image, "audio": _audio, "video": _video}[data.kind](data)
    if not raw.size:
        raise DataError(f"{data.path or data.name}: data.seconds={data.seconds} leaves no samples.")
    everything = np.arange(size(raw.shape[1:-1]))
    train = test = everything
    if data.generalize:
        grid = everything.reshape(raw.shape[1:-1])
        train, test = grid[::2, ::2].reshape(-1), grid[1::2, 1::2].reshape(-1)
        if not len(test):
            raise DataError(f"a picture of {grid.shape[0]} x {grid.shape[1]} pixels has none to hold out.")
    return Signal(data.kind, raw, float(rate), train, test)


def _image(data):
    if data.path:
        pictures = read_image(data.path, data.channels or None, upright=True)[None]
    elif data.name == "faces":
        pictures = faces(data.count)
    elif data.name in SETS:
        loaded = image_set(data.name, data.dir, data.count)
        pictures = np.rint(loaded).astype(np.uint8)
    else:
        pictures = photograph(data.name)[None]
    return _with_channels(pictures[:, :: data.step, :: data.step], data.channels), 0


def _audio(data):
    if not data.path and data.name == "melody":
        samples, rate = melody(data.seconds or 2.0, data.rate), data.rate
    else:
        path = data.path or str(Path(data.dir) / RECORDINGS[data.name])
        if not data.path and not Path(path).is_file():
            raise DataError(
                f"{path} is missing: a WAV file, which comes with the code of SIREN (Sitzmann et al. 2020). "
                "configs/inr_audio.py needs no file, and takes any WAV file by --config.data.path."
            )
        samples, rate = read_audio(path)
        samples = samples[: round(data.seconds * rate)] if data.seconds else samples
    samples = samples[:: data.step]
    return samples[None, :, None], rate / data.step


def _video(data):
    if not data.path and data.name == "waves":
        frames, rate = waves(data.frames or 16)[:, :: data.step, :: data.step], 25.0
    elif not data.path and data.name in CLIPS:
        frames, rate = clip(data.name, data.frames, data.step)
    else:
        path = data.path or str(Path(data.dir) / "cat_video.mp4")
        if not data.path and not Path(path).is_file():
            raise DataError(
                f"{path} is missing: a video, which the authors of SIREN (Sitzmann et al. 2020) hand out. configs/inr_video.py "
                "needs no file, and takes any video by --config.data.path."
            )
        frames, rate = read_video(path, data.frames, data.step)
    return _with_channels(frames[None], data.channels), rate


def _with_channels(pictures, channels):
    """Colour as its luma for one channel, grey repeated for three; as they are for 0."""
    if channels == 1 and pictures.shape[-1] == 3:
        luma = pictures @ np.array([0.299, 0.587, 0.114])
        return np.rint(luma).astype(pictures.dtype)[..., None]
    return np.repeat(pictures, 3, axis=-1) if channels == 3 and pictures.shape[-1] == 1 else pictures
