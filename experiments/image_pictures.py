"""Pictures of image models: accuracy against solver steps, confusion of classes, labels in colour over the image."""

from pathlib import Path

import numpy as np

from experiments.pyplot import pyplot


def draw_anytime(rows: list[dict], metric: str, path: Path) -> None:
    """A metric and the relative residual against solver steps; a row per number of steps."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(6, 4))
    steps = [row["steps"] for row in rows]
    ax.plot(steps, [row[metric] for row in rows], marker="o", color="tab:blue")
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel(metric, color="tab:blue")
    right = ax.twinx()
    right.plot(steps, [row["residual"] for row in rows], marker=".", linestyle="--", color="tab:orange")
    right.set_yscale("log")
    right.set_ylabel("relative residual", color="tab:orange")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_confusion(counts: np.ndarray, classes, path: Path) -> None:
    """How often each class (a row) was taken for each other (a column), in percent of the row."""
    plt = pyplot()
    counts = np.asarray(counts, np.float64)
    percent = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    n = len(classes)
    figure, ax = plt.subplots(figsize=(1.5 + 0.42 * n, 1 + 0.42 * n))
    ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for i in range(n):
        for j in range(n):
            if percent[i, j] >= 0.5:
                color = "white" if percent[i, j] > 50 else "black"
                ax.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(n), classes, rotation=90, fontsize=8)
    ax.set_yticks(range(n), classes, fontsize=8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true, percent of the row")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Labels in colour over an image: `[H, W, 3]` from 0 to 1. Labels without a colour leave the image as it is.

    Args:
      image: `[H, W, 1 or 3]`, from 0 to 1.
      labels: `[H, W]` integers.
      palette: `[C, 3]` colours of 8 bits.
    """
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    known = (labels >= 0) & (labels < len(palette))
    colours = np.asarray(palette)[np.where(known, labels, 0)] / 255
    return np.where(known[..., None], (1 - alpha) * image + alpha * colours, image)


def voc_palette(n: int) -> np.ndarray:
    """The colour map of PASCAL VOC, `[n, 3]` of 8 bits: bits of the label, spread over red, green and blue."""
    colours = np.zeros((n, 3), np.uint8)
    for label in range(n):
        rest = label
        for bit in range(7, -1, -1):
            for channel in range(3):
                colours[label, channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
    return colours
