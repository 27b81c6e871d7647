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
    """The model as a function of one pair of frames, compiled once for every size.

    Args:
      mode: where frames are padded, see `deqjax.models.flow.padding`.
    """
    graph, state = nnx.split(model)
    mesh, C = make_mesh(mesh_sizes), model.config.widths.hidden

    @jax.jit
    def run(state, image1, image2, start):
        return nnx.merge(graph, state)(image1, image2, start=start, mode=mode)

    def estimate(image1, image2, start=None):
        if start is None:
            h, w = (-(-n // SCALE) for n in image1.shape[:2])
            start = State(
                **place_whole(mesh, {"h": np.zeros((1, h, w, C), np.float32), "flow": np.zeros((1, h, w, 2), np.float32)})
            )
        frames = place_whole(mesh, {"image1": image1[None], "image2": image2[None]})
        return run(state, frames["image1"], frames["image2"], start)

    return estimate


@functools.partial(jax.jit, static_argnames=("warm_start", "fixed_point_reuse"))
def carried_on(z, warm_start, fixed_point_reuse):
    """`next_start`, compiled."""
    return next_start(z, warm_start=warm_start, fixed_point_reuse=fixed_point_reuse)


def estimates(
    pairs: FlowSet, estimate: Estimator, *, warm_start: bool = False, fixed_point_reuse: bool = False
) -> Iterator[tuple[int, Estimate]]:
    """Number and estimate of every pair, in order; each sequence begins from nothing."""
    start = None
    for number, pair in enumerate(pairs.pairs):
        found = estimate(*pairs.frames(number), None if pair.begins else start)
        yield number, found
        start = carried_on(found.z, warm_start, fixed_point_reuse)


# Scores --------------------------------------------------------------------------------------------------------------


def evaluate_set(pairs: FlowSet, estimate: Estimator, **video) -> dict[str, float]:
    """EPE in pixels, and in percent the pixels with an error below 1, 3 and 5 and those that count as outliers (F1-all).

    They are over all valid pixels of all pairs, occluded ones included; only the EPE of a sparse set is, as KITTI has it, the
    mean over its pairs. For FlyingThings3D there is also the mean without vectors of 400 pixels and more.

    Args:
      video: `warm_start` and `fixed_point_reuse`.
    """
    sums, steps = np.zeros(len(WITHIN) + 5), 0.0
    for number, found in estimates(pairs, estimate, **video):
        sample = pairs.read(number)
        sums += _sums(np.asarray(found.flow[0], np.float64), sample.flow, sample.valid, pairs.sparse)
        steps += float(np.mean(np.asarray(found.stats.steps))) if found.stats is not None else 0.0
    n, epe, of_images, short, *right, wrong = sums
    result = {"epe": of_images / len(pairs) if pairs.sparse else epe / n}
    result |= {f"{k}px": 100 * count / n for k, count in zip(WITHIN, right, strict=True)} | {"f1": 100 * wrong / n}
    if pairs.name.startswith("things"):
        result["epe_below_400"] = short / n
    return result | {"steps": steps / len(pairs)}


def _sums(flow, truth, valid, sparse):
    """Valid pixels, their errors, the mean error, errors where the truth is below 400, ones below 1, 3, 5, outliers."""
    known = valid >= 0.5
    error = np.linalg.norm(flow - truth, axis=-1)[known]
    length = np.linalg.norm(truth.astype(np.float64), axis=-1)[known]
    # A true vector of length zero is missed by any error above 3.
    wrong = (error > 3) & (error > 0.05 * length)
    below = [np.sum(error < k) for k in WITHIN]
    return np.array([error.size, error.sum(), error.mean(), error[length < LONGEST].sum(), *below, wrong.sum()])


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
        for number, found in estimates(pairs, one, **video):
            path = Path(folder) / part / pairs.pairs[number].name
            flow = np.asarray(found.flow[0])
            write_flow(path, flow, "pictures" if pictures else which)
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
