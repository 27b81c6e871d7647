"""What representations write: pictures, sound, video, surfaces and curves."""

from pathlib import Path

import numpy as np

from deqjax.data.audio import write_audio
from deqjax.data.errors import DataError
from deqjax.data.images import write_image
from deqjax.data.meshes import level_set, write_mesh
from deqjax.data.video import write_video
from deqjax.training.metrics import read_log
from experiments.pyplot import pyplot


def displayed(values, kind: str):
    """Values as they are shown and measured: pictures from 0 to 1 and clipped, sound as it is."""
    if kind in ("image", "video"):
        return ((values + 1) / 2).clip(0, 1)
    return values


def write_values(path: Path, values: np.ndarray, kind: str, rate: float = 0) -> Path:
    """Writes one signal on its grid in the file format of its kind.

    Raises:
      DataError: the ending is not that of a format for this kind, or there is nothing to see.
    """
    endings = {"image": (".png", ".jpg", ".bmp", ".tif"), "audio": (".wav",), "video": (".mp4",)}.get(kind, (".ply",))
    if path.suffix.lower() not in endings:
        raise DataError(f"{path}: the ending of {kind} must be one of {', '.join(endings)} (config.render.output).")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "image":
        write_image(path, displayed(values, kind))
    elif kind == "audio":
        write_audio(path, values[:, 0], round(rate))
    elif kind == "video":
        write_video(path, colours(displayed(values, kind)), rate)
    else:
        surface = level_set(values[..., 0])
        if surface is None:
            raise DataError("the represented function has one sign in the whole cube: there is no surface to draw.")
        write_mesh(path, *surface)
    return path


def colours(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def comparison(original: np.ndarray, reconstruction: np.ndarray, gain: float = 4.0) -> np.ndarray:
    """Original, reconstruction and their difference (times `gain`) side by side; pictures `[H, W, C]` from 0 to 1."""
    error = np.clip(gain * np.abs(original - reconstruction), 0, 1)
    gap = np.ones((original.shape[0], 4, original.shape[2]))
    return np.concatenate([original, gap, reconstruction, gap, error], axis=1)


def sheet(frames: np.ndarray, count: int = 10) -> np.ndarray:
    """Some pictures of many in a row, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    return np.concatenate(list(frames[chosen]), axis=1)


def draw_waves(path: Path, original: np.ndarray, reconstruction: np.ndarray, rate: float) -> None:
    """The waves of the original, of the reconstruction, and their difference."""
    plt = pyplot()
    seconds = np.arange(len(original)) / rate
    figure, axes = plt.subplots(3, 1, figsize=(8, 5), sharex=True, sharey=True)
    for ax, wave, label in zip(
        axes, (original, reconstruction, original - reconstruction), ("original", "reconstruction", "difference"), strict=True
    ):
        ax.plot(seconds, wave, linewidth=0.5)
        ax.set_ylabel(label)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_slices(path: Path, values: np.ndarray, level: float = 0.0, count: int = 5) -> None:
    """Slices of values `[X, Y, Z]` across z, with the line where they cross a level."""
    plt = pyplot()
    chosen = np.linspace(0, values.shape[2] - 1, count + 2).round().astype(int)[1:-1]
    figure, axes = plt.subplots(1, count, figsize=(2.2 * count, 2.4))
    bound = np.max(np.abs(values - level)) or 1.0
    for ax, k in zip(np.atleast_1d(axes), chosen, strict=True):
        ax.imshow(values[:, :, k].T, origin="lower", extent=(-1, 1, -1, 1), cmap="RdBu", vmin=level - bound, vmax=level + bound)
        if values[:, :, k].min() < level < values[:, :, k].max():
            ax.contour(np.linspace(-1, 1, values.shape[0]), np.linspace(-1, 1, values.shape[1]), values[:, :, k].T, [level])
        ax.set_title(f"z = {2 * k / (values.shape[2] - 1) - 1:.2f}", fontsize="small")
        ax.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_curve(workdir: Path, metric: str) -> None:
    """A validation metric against steps, from the run's log, to `<metric>.png` (slashes are hyphens)."""
    entries = [
        (step, values[f"valid/{metric}"]) for step, values in read_log(workdir / "metrics.jsonl") if f"valid/{metric}" in values
    ]
    if not entries:
        return
    plt = pyplot()
    figure = plt.figure(figsize=(5, 3.5))
    ax = figure.add_subplot()
    ax.plot(*zip(*entries, strict=True), marker=".")
    ax.set_xlabel("steps")
    ax.set_ylabel(f"{metric} (dB)" if metric == "psnr" else metric)
    figure.savefig(workdir / f"{metric.replace('/', '-')}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
