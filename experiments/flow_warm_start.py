"""How many solver steps a pair of a video needs from nothing, and from what is known of the pair before.

    python -m experiments.flow_warm_start --config configs/flow_warped_photos.py --workdir runs/flow_warped_photos

The video is a folder or a file, `config.viz.input`; without one, a window that glides over a photograph, turning slowly. Every
pair but the first is solved in four ways, each to `max(config.viz.steps)` evaluations of f, and the table says after how many
the residual |f(z) - z| first fell below each level, on average over pairs (those that never did count in full).
"""

import itertools
import sys

import jax
import numpy as np
from flax import nnx

from deqjax.data.errors import DataError
from deqjax.data.photographs import photograph
from deqjax.data.warped_photos import TRAINING, cubic
from deqjax.models.flow import pad, padding_of
from experiments.deq_flow import FlowTask
from experiments.flow_evaluation import carried_on
from experiments.flow_pictures import frames_of

WAYS = {
    "cold": {},
    "warm_start": {"warm_start": True},
    "fixed_point_reuse": {"fixed_point_reuse": True},
    "both": {"warm_start": True, "fixed_point_reuse": True},
}
# Residuals, as parts of the first one of a cold start.
LEVELS = (0.3, 0.2, 0.1, 0.05, 0.03)


class WarmStartTask(FlowTask):
    """The flow task with the table in the place of its evaluation."""

    def report(self, model) -> str:
        """The table."""
        frames = glide() if not self.config.viz.input else [image for _, image in frames_of(self.config.viz.input)[0]]
        if len(frames) < 3:
            raise DataError("a warm start needs a video of three frames or more.")
        if len({frame.shape for frame in frames}) > 1:
            raise DataError(f"{self.config.viz.input}: all frames must have one size.")
        return table(residuals(model, frames, max(self.config.viz.steps)))


def residuals(model, frames, steps: int) -> dict[str, np.ndarray]:
    """Residuals `[T - 2, steps]` of every pair but the first, by the way it was begun."""
    graph, state = nnx.split(model)

    @jax.jit
    def solve(state, image1, image2, start):
        model = nnx.merge(graph, state)
        padding = padding_of(*image1.shape[1:3])
        injection = model.encode(pad(image1, padding), pad(image2, padding))
        states, stats = model.trajectory(injection, (steps,), model.initial_state(injection) if start is None else start)
        return states[0], stats.abs_trace[0]

    found = {}
    for way, flags in WAYS.items():
        start, traces = None, []
        for image1, image2 in itertools.pairwise(frames):
            z, trace = solve(state, *(np.asarray(image[None], np.float32) for image in (image1, image2)), start)
            start = carried_on(z, flags.get("warm_start", False), flags.get("fixed_point_reuse", False)) if flags else None
            traces.append(np.asarray(trace))
        found[way] = np.array(traces[1:])
    return found


def table(found: dict[str, np.ndarray]) -> str:
    """Mean steps to each level, as a table in Markdown."""
    first = float(np.mean(found["cold"][:, 0]))
    lines = [f"| residual | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for level in LEVELS:
        needed = [f"{np.mean([steps_to(trace, level * first) for trace in traces]):.1f}" for traces in found.values()]
        lines.append(f"| {level * first:.3g} | {' | '.join(needed)} |")
    return "\n".join(lines)


def steps_to(trace: np.ndarray, level: float) -> int:
    """Evaluations until the residual is first below the level; all of them if it never is."""
    below = np.flatnonzero(trace < level)
    return int(below[0]) + 1 if len(below) else len(trace)


def glide(n_frames: int = 10, size: tuple[int, int] = (112, 144), motion: float = 5.0) -> list[np.ndarray]:
    """A window that moves over a photograph by `motion` pixels a frame, turning by half a degree."""
    photo = photograph(TRAINING[0]).astype(np.float64)
    (H, W), (h, w) = photo.shape[:2], size
    y, x = np.meshgrid(np.arange(h) - h / 2, np.arange(w) - w / 2, indexing="ij")
    frames = []
    for k in range(n_frames):
        angle, shift = np.deg2rad(k / 2), motion * (k - n_frames / 2)
        at_x = W / 2 + 0.9 * shift + np.cos(angle) * x - np.sin(angle) * y
        at_y = H / 2 + 0.4 * shift + np.sin(angle) * x + np.cos(angle) * y
        frames.append(np.rint(np.clip(cubic(photo, at_y, at_x), 0, 255)).astype(np.uint8))
    return frames


def main(argv=None):
    from deqjax.cli import run

    return run(WarmStartTask, [*(sys.argv if argv is None else argv), "--mode=eval"])


if __name__ == "__main__":
    sys.exit(main())
