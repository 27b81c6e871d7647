"""Pictures and videos of optical flow: its colours, what it leaves unexplained, and how a solve gets there."""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.flow_colors import flow_to_image
from deqjax.data.flow_sets import read_frame
from deqjax.data.images import image_files, pillow
from deqjax.data.video import VideoWriter, video_frames
from experiments.flow_evaluation import Estimator, carried_on
from experiments.pyplot import pyplot

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".m4v")


def frames_of(source: str) -> tuple[Iterator[tuple[str, np.ndarray]], float | None]:
    """Frames `[H, W, 3]` of 8 bits with their names, and the frames per second if they come from a video.

    Args:
      source: "first.png,second.png" (or more), a folder of pictures in the order of their names, or a video.

    Raises:
      DataError: there is no such video or folder, or two pictures have the same name.
    """
    path = pathlib.Path(source)
    if path.suffix.lower() in VIDEOS and "," not in source:
        frames, rate = video_frames(path)
        return ((f"frame_{k:05d}", frame) for k, frame in enumerate(frames, start=1)), rate
    paths = image_files(path) if path.is_dir() else [pathlib.Path(part.strip()) for part in source.split(",")]
    if len({p.stem for p in paths[:-1]}) < len(paths) - 1:
        raise DataError(f"{source}: two frames have the same name, and so would their pictures.")
    return ((p.stem, read_frame(p)) for p in paths), None


def draw_frames(source: str, folder, estimate: Estimator, *, warm_start=False, fixed_point_reuse=False) -> list[pathlib.Path]:
    """Flow from every frame to the next: colours and warp errors, as pictures, or as one video if the source is one.

    A video shows the frame, the flow and the error side by side. Colours are as full as the longest vector so far; vectors
    that are not finite are black.

    Returns:
      The files written.

    Raises:
      DataError: fewer than two frames, or frames of different sizes.
    """
    frames, rate = frames_of(source)
    folder, start, longest, written = pathlib.Path(folder), None, 0.0, []
    folder.mkdir(parents=True, exist_ok=True)
    writer = None if rate is None else VideoWriter(folder / f"{pathlib.Path(source).stem}_flow.mp4", rate)
    with writer or contextlib.nullcontext():
        for (name, image1), (other, image2) in itertools.pairwise(frames):
            if image1.shape != image2.shape:
                sizes = " and ".join(f"{n} is {x.shape[1]} x {x.shape[0]}" for n, x in ((name, image1), (other, image2)))
                raise DataError(f"{source}: all frames must have one size, but {sizes}.")
            found = estimate(image1, image2, start)
            start = carried_on(found.z, warm_start, fixed_point_reuse)
            flow = np.asarray(found.flow[0])
            lengths = np.linalg.norm(flow, axis=-1)
            longest = max(longest, float(np.max(lengths, where=np.isfinite(lengths), initial=0)))
            colors, error = flow_to_image(flow, longest=longest), warp_error(image1, image2, flow)
            if writer is not None:
                writer.add(np.concatenate([image1, colors, error], axis=1))
                written = [writer.path]
                continue
            for kind, picture in (("flow", colors), ("warp_error", error)):
                written.append(folder / f"{name}_{kind}.png")
                pillow().fromarray(picture).save(written[-1])
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
