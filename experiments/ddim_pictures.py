"""Pictures of diffusion models. Images are `[H, W, C]` numbers from -1 to 1."""

from pathlib import Path

import numpy as np

from deqjax.data.images import write_image

_GAP = 2  # pixels between images


def tiled(images, columns: int = 0) -> np.ndarray:
    """Images `[N, H, W, C]` in rows of so many (0: as near a square as it gets), as one from 0 to 1."""
    images = np.clip((np.asarray(images, np.float64) + 1) / 2, 0, 1)
    N, H, W, C = images.shape
    columns = columns or int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    page = np.ones((rows * (H + _GAP) + _GAP, columns * (W + _GAP) + _GAP, C))
    for n, image in enumerate(images):
        top, left = (_GAP + i * (size + _GAP) for i, size in zip(divmod(n, columns), (H, W), strict=True))
        page[top : top + H, left : left + W] = image
    return page


def write_grid(path: Path, images, columns: int = 0, scale: int = 0) -> Path:
    """A grid of images; small ones are enlarged, each pixel to a square (scale 0: such that an image has 64 or more)."""
    scale = scale or max(1, 64 // np.shape(images)[1])
    write_image(path, tiled(images, columns).repeat(scale, axis=0).repeat(scale, axis=1))
    return path


def write_filmstrip(path: Path, images, steps: int, frames: int = 16) -> Path:
    """The image of each sample as it was after some of the solver's iterations: a row per sample.

    Args:
      images: `[N, B, H, W, C]`, after every iteration.
      steps: iterations that were taken.
      frames: at most so many, evenly spread, the first and the last included.
    """
    chosen = np.unique(np.linspace(0, max(steps - 1, 0), frames).astype(int))
    strip = np.moveaxis(np.asarray(images)[chosen], 0, 1)
    return write_grid(path, strip.reshape(-1, *strip.shape[2:]), columns=len(chosen))


def write_heat_map(path: Path, residuals, timesteps, tol: float) -> Path:
    """Residual of every timestep at every iteration `[N, T]`; timesteps that are not iterated on (NaN) are white."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs Matplotlib: pip install "deqjax[viz]"') from error
    shown = np.ma.masked_invalid(np.asarray(residuals, np.float64).T)
    shown = np.ma.masked_less_equal(shown, 0)
    figure = Figure(figsize=(7, 4.5))
    ax = figure.add_subplot()
    low = max(min(tol / 10, shown.min() if shown.count() else tol), 1e-9)
    high = max(shown.max() if shown.count() else 1, 10 * low)
    extent = (0.5, shown.shape[1] + 0.5, shown.shape[0] - 0.5, -0.5)
    mesh = ax.imshow(shown, aspect="auto", norm=LogNorm(low, high), interpolation="nearest", extent=extent)
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, 9).astype(int))
    ax.set_yticks(ticks, [str(timesteps[k]) for k in ticks])
    ax.set_xlabel("iteration, each one call of the network on all timesteps")
    ax.set_ylabel("timestep")
    figure.colorbar(mesh, label="residual of the state after this timestep")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path
