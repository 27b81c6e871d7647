"""Implicit neural representations: a picture, a sound, a video or a shape as the weights of a network.

    python -m experiments.deq_inr --config configs/inr_camera.py
    python -m experiments.deq_inr --config configs/inr_camera.py --mode export --config.export_dtype=int8
    python -m experiments.deq_inr --config configs/inr_camera.py --mode render --config.render.scale=4

Modes: train (and resume), eval, export (the weights to `config.export_path`: a small file of 32, 16 or 8 bits, or a PyTorch
state dict), render (such a file at any resolution; the signal itself is not needed).
"""

import sys

from experiments.inr_shapes import OccupancyTask, SDFTask
from experiments.inr_signals import SignalTask
from experiments.inr_task import RepresentationTask

TASKS = {"image": SignalTask, "audio": SignalTask, "video": SignalTask, "occupancy": OccupancyTask, "sdf": SDFTask}


def make_task(config) -> RepresentationTask:
    """The task of the config's kind of data."""
    if config.data.kind not in TASKS:
        raise ValueError(f"data.kind={config.data.kind!r}: must be one of {', '.join(TASKS)}.")
    return TASKS[config.data.kind](config)


make_task.modes = RepresentationTask.modes


def main(argv=None):
    from deqjax.cli import run

    return run(make_task, argv)


if __name__ == "__main__":
    sys.exit(main())
