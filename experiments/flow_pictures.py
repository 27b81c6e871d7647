"""Pictures and videos of optical flow: its colours, what it leaves unexplained, and how a solve gets there."""

import itertools
import pathlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.flow_colors import flow_to_image
from deqjax.data.flow_sets import read_frame
from deqjax.data.images import image_files, pillow
from experiments.flow_evaluation import Estimator, carried_on
from experiments.pyplot import pyplot

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".m4v")


def frames_of(source: str) -> tuple[Iterator[tuple[str, np.ndarray]], float | None]:
    """Frames `[H, W, 3]` of 8 bits with their names, and the frames per second if they come from a video.

    Args:
      source: "first.png,second.png" (or more), a folder of pictures in the order of their names, or a video.

    Raises:
      DataError: there is no such file.
    """
    path = pathlib.Path(source)
    if path.suffix.lower() in VIDEOS and "," not in source:
        return _video_frames(path)
    paths = image_files(path) if path.is_dir() else [pathlib.Path(part.strip()) for part in source.split(",")]
    return ((p.stem, read_frame(p)) for p in paths), None


def _video_frames(path):
    av = _av()
    try:
        container = av.open(str(path))
        rate = float(container.streams.video[0].average_rate or 25)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{path} is no video that can be read ({error}).") from error

    def decode():
        with container:
            try:
                for k, frame in enumerate(container.decode(video=0)):
                    yield f"frame_{k + 1:05d}", frame.to_ndarray(format="rgb24")
            except av.error.FFmpegError as error:
                raise DataError(f"{path} is damaged: {error}.") from error

    return decode(), rate


def draw_frames(source: str, folder, estimate: Estimator, *, warm_start=False, fixed_point_reuse=False) -> list[pathlib.Path]:
    """Flow from every frame to the next: colours and warp errors, as pictures, or as one video if the source is one.

    A video shows the frame, the flow and the error side by side. Colours are as full as the longest vector so far.

    Returns:
      The files written.

    Raises:
      DataError: fewer than two frames, or frames of different sizes.
    """
    frames, rate = frames_of(source)
    folder, start, longest, written = pathlib.Path(folder), None, 0.0, []
    folder.mkdir(parents=True, exist_ok=True)
    writer = None if rate is None else VideoWriter(folder / f"{pathlib.Path(source).stem}_flow.mp4", rate)
    try:
        for (name, image1), (other, image2) in itertools.pairwise(frames):
            if image1.shape != image2.shape:
                sizes = " and ".join(f"{n} is {x.shape[1]} x {x.shape[0]}" for n, x in ((name, image1), (other, image2)))
                raise DataError(f"{source}: all frames must have one size, but {sizes}.")
            found = estimate(image1, image2, start)
            start = carried_on(found.z, warm_start, fixed_point_reuse)
            flow = np.asarray(found.flow[0])
            longest = max(longest, float(np.max(np.linalg.norm(flow, axis=-1))))
            colors, error = flow_to_image(flow, longest=longest), warp_error(image1, image2, flow)
            if writer is not None:
                writer.add(np.concatenate([image1, colors, error], axis=1))
                written = [writer.path]
                continue
            for kind, picture in (("flow", colors), ("warp_error", error)):
                written.append(folder / f"{name}_{kind}.png")
                pillow().fromarray(picture).save(written[-1])
    finally:
        if writer is not None:
            writer.close()
    if not written:
        raise DataError(f"{source} holds fewer than two frames: flow goes from one frame to the next.")
    return written


def warp_error(image1: np.ndarray, image2: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """How the second frame, fetched back along the flow, differs from the first: grey `[H, W, 3]`, black beyond the frame."""
    H, W, _ = flow.shape
    y, x = np.meshgrid(np.arange(H), np.arange(W), indexing="ij")
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= W - 1) & (y >= 0) & (y <= H - 1)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, W - 1), np.minimum(top + 1, H - 1)
    part_x, part_y = (x - left)[..., None], (y - top)[..., None]
    image = image2.astype(np.float64)
    upper = (1 - part_x) * image[top, left] + part_x * image[top, right]
    lower = (1 - part_x) * image[bottom, left] + part_x * image[bottom, right]
    error = np.mean(np.abs((1 - part_y) * upper + part_y * lower - image1), axis=-1) * inside
    return np.repeat(np.rint(error).astype(np.uint8)[..., None], 3, axis=-1)


class VideoWriter:
    """Frames of 8 bits as an MP4 file."""

    def __init__(self, path: pathlib.Path, rate: float):
        self.path, self._rate, self._container, self._stream = path, rate, None, None

    def add(self, frame: np.ndarray) -> None:
        av = _av()
        # The codec wants even sizes.
        frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
        if self._container is None:
            self._container = av.open(str(self.path), "w")
            self._stream = self._container.add_stream("mpeg4", rate=Fraction(self._rate).limit_denominator(1000))
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt, self._stream.bit_rate = "yuv420p", 8_000_000
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError('videos need PyAV: pip install "deqjax[media]"') from error
    return av


# Figures -------------------------------------------------------------------------------------------------------------


def draw_samples(samples, flows, path) -> None:
    """One row a pair: both frames, true flow, estimate, and the error up to 5 pixels."""
    plt = pyplot()
    figure, axes = plt.subplots(len(samples), 5, figsize=(12, 2.0 * len(samples)), squeeze=False)
    for row, sample, flow in zip(axes, samples, flows, strict=True):
        longest = float(np.max(np.linalg.norm(sample.flow, axis=-1)))
        truth = np.where(sample.valid[..., None] > 0, sample.flow, np.nan)
        error = np.where(sample.valid > 0, np.linalg.norm(flow - sample.flow, axis=-1), np.nan)
        colors = [flow_to_image(x, longest=longest) for x in (truth, flow)]
        for ax, picture in zip(row[:4], (sample.image1, sample.image2, *colors), strict=True):
            ax.imshow(picture)
        row[4].imshow(error, vmin=0, vmax=5, cmap="viridis")
        row[4].set_ylabel(f"EPE {np.nanmean(error):.2f}", fontsize=8)
    for ax, title in zip(axes[0], ("first frame", "second frame", "true flow", "estimate", "error, 0 to 5 px"), strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_convergence(residuals, steps, epe, path) -> None:
    """Residual of the best state so far, and EPE, against solver steps.

    Args:
      residuals: `[B, N]` absolute residual at each step.
      steps, epe: EPE after so many steps.
    """
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(6, 4))
    best = np.mean(np.minimum.accumulate(residuals, axis=1), axis=0)
    ax.plot(np.arange(1, len(best) + 1), best, color="tab:blue")
    ax.set_yscale("log")
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel("|f(z) - z|", color="tab:blue")
    other = ax.twinx()
    other.plot(steps, epe, color="tab:red", marker="o")
    other.set_ylabel("EPE (pixels)", color="tab:red")
    other.set_ylim(0)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
