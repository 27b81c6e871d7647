"""Running a flow network over a set of pairs: scores, submissions, and videos that begin where the last pair ended."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from deqjax.data.errors import DataError
from deqjax.data.flow_colors import flow_to_image
from deqjax.data.flow_files import write_flo, write_kitti
from deqjax.data.flow_sets import FlowSet, kitti, sintel
from deqjax.data.images import pillow
from deqjax.models.flow import DEQFlow, Estimate, State, next_start
from deqjax.models.flow.upsampling import SCALE
from deqjax.training.mesh import make_mesh, place_whole
from experiments.flow_metrics import LONGEST, WITHIN

# From frames `[H, W, 3]` and a state to begin with, or None, to the flow `[1, H, W, 2]` and its state.
Estimator = Callable[[np.ndarray, np.ndarray, State | None], Estimate]


def estimator(model: DEQFlow, mode: str, mesh_sizes=None) -> Estimator:
    """The model as a function of one pair of frames, compiled once for every size, whatever the weights.

    Args:
      mode: where frames are padded, see `deqjax.models.flow.padding`.
    """
    graph, state = nnx.split(model)
    mesh, C = make_mesh(mesh_sizes), model.config.widths.hidden

    def estimate(image1, image2, start=None):
        if start is None:
            h, w = (-(-n // SCALE) for n in image1.shape[:2])
            start = State(
                **place_whole(mesh, {"h": np.zeros((1, h, w, C), np.float32), "flow": np.zeros((1, h, w, 2), np.float32)})
            )
        frames = place_whole(mesh, {"image1": image1[None], "image2": image2[None]})
        return _estimate(graph, state, frames["image1"], frames["image2"], start, mode)

    return estimate


# Not inside `estimator`, where every evaluation of a training run would compile it anew.
@functools.partial(jax.jit, static_argnames=("graph", "mode"))
def _estimate(graph, state, image1, image2, start, mode):
    return nnx.merge(graph, state)(image1, image2, start=start, mode=mode)


@functools.partial(jax.jit, static_argnames=("warm_start", "fixed_point_reuse"))
def carried_on(z, warm_start, fixed_point_reuse):
    """`next_start`, compiled."""
    return next_start(z, warm_start=warm_start, fixed_point_reuse=fixed_point_reuse)


def estimates(
    pairs: FlowSet,
    read: Callable[[int], tuple],
    estimate: Estimator,
    *,
    warm_start: bool = False,
    fixed_point_reuse: bool = False,
) -> Iterator[tuple[tuple, Estimate]]:
    """What `read` says of every pair, with its estimate, in order; each sequence begins from nothing.

    Args:
      read: `pairs.frames`, or `pairs.read` where the flow is known.
    """
    start = None
    for number, pair in enumerate(pairs.pairs):
        sample = read(number)
        found = estimate(*sample[:2], None if pair.begins else start)
        yield sample, found
        start = carried_on(found.z, warm_start, fixed_point_reuse)


# Scores --------------------------------------------------------------------------------------------------------------


def evaluate_set(pairs: FlowSet, estimate: Estimator, **video) -> dict[str, float]:
    """EPE in pixels, and in percent the pixels with an error below 1, 3 and 5 and those that count as outliers (F1-all).

    They are over all valid pixels of all pairs, occluded ones included; only the EPE of a sparse set is, as KITTI has it, the
    mean over its pairs. `zero_flow` is the EPE of saying that nothing moves; for FlyingThings3D there is also the EPE without
    vectors of 400 pixels and more. Solver steps, and the spectral radius with `sradius_mode`, are means over pairs.

    Args:
      video: `warm_start` and `fixed_point_reuse`.
    """
    rows = []
    for sample, found in estimates(pairs, pairs.read, estimate, **video):
        row = _of_pair(np.asarray(found.flow[0], np.float64), sample.flow.astype(np.float64), sample.valid >= 0.5)
        if found.stats is not None:
            row["steps"] = float(np.mean(found.stats.steps))
        if found.spectral_radius is not None:
            row["spectral_radius"] = float(np.mean(found.spectral_radius))
        rows.append(row)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    n = columns["valid"]

    def per_pixel(name):
        return np.sum(columns[name]) / np.sum(n)

    epe = (lambda name: np.mean(columns[name] / n)) if pairs.sparse else per_pixel
    result = {"epe": epe("error"), "zero_flow": epe("length")}
    result |= {name: 100 * per_pixel(name) for name in (*(f"{k}px" for k in WITHIN), "f1")}
    if pairs.name.startswith("things"):
        result["epe_below_400"] = per_pixel("error_below_400")
    result |= {name: np.mean(columns[name]) for name in ("steps", "spectral_radius") if name in columns}
    return {name: float(value) for name, value in result.items()}


def _of_pair(flow, truth, known) -> dict[str, float]:
    """How many pixels are valid, and sums over them."""
    error, length = (np.linalg.norm(vectors, axis=-1)[known] for vectors in (flow - truth, truth))
    # A true vector of length zero is missed by any error above 3, and any vector by one that is not finite.
    wrong = ~((error <= 3) | (error <= 0.05 * length))
    sums = {"valid": error.size, "error": error.sum(), "length": length.sum(), "f1": wrong.sum()}
    sums |= {f"{k}px": np.sum(error < k) for k in WITHIN}
    return sums | {"error_below_400": error[length < LONGEST].sum()}


# Submissions ---------------------------------------------------------------------------------------------------------


def submit(which: str, root, folder, estimate: Callable[[str], Estimator], *, pictures: bool = False, **video) -> int:
    """Writes the flow of a benchmark's test split as its server wants it, or as colours; returns how many files.

    Sintel: `folder/{clean,final}/SCENE/frame0001.flo`, numbers from 1. KITTI: `folder/000000_10.png`.

    Args:
      which: "sintel" or "kitti".
      root: of the data sets.
      estimate: the estimator for a padding mode.
      pictures: write PNG files of colours in the place of vectors.
      video: `warm_start` and `fixed_point_reuse`; for Sintel, since KITTI has no videos.

    Raises:
      ValueError: there is no folder, or no such benchmark.
      DataError: a prediction is not finite.
    """
    if not folder:
        raise ValueError(f"submit.path is empty: name the folder for {which}'s files (--config.submit.path=...).")
    if which == "sintel":
        sets = {rendering: sintel(root, rendering, "test") for rendering in ("clean", "final")}
    elif which == "kitti":
        sets, video = {"": kitti(root, "testing")}, {}
    else:
        raise ValueError(f"submit.set={which!r}: must be 'sintel' or 'kitti'.")
    one, written = estimate(which), 0
    for part, pairs in sets.items():
        for pair, (_, found) in zip(pairs.pairs, estimates(pairs, pairs.frames, one, **video), strict=True):
            write_flow(Path(folder) / part / pair.name, np.asarray(found.flow[0]), "pictures" if pictures else which)
            written += 1
    return written


def write_flow(path: Path, flow: np.ndarray, form: str) -> None:
    """Writes flow with the suffix that belongs to the form: "sintel" (.flo), "kitti" (.png) or "pictures" (.png)."""
    if form == "sintel":
        write_flo(path.with_name(path.name + ".flo"), flow)
    elif form == "kitti":
        write_kitti(path.with_name(path.name + ".png"), flow)
    else:
        if not np.all(np.isfinite(flow)):
            raise DataError(f"{path}: the flow to draw is not finite.")
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow().fromarray(flow_to_image(flow)).save(path.with_name(path.name + ".png"))
