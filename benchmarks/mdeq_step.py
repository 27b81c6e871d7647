"""One training step of a published multiscale recipe: parameters, compile time, time per step, memory, input pipeline.

    python -m benchmarks.mdeq_step --config configs/mdeq_cifar10.py:small --batch 8
    python -m benchmarks.mdeq_step --config configs/mdeq_imagenet.py:small --batch 1 --gradient implicit --solver-steps 4 26
    python -m benchmarks.mdeq_step --config configs/mdeq_cityscapes.py:small --batch 1 --size 256 512

The model has its published size; the images are random, so no data is needed. `--gradient implicit` solves with plain steps in
both directions, and the implicit gradient, whose memory does not depend on the number of steps; by default the recipe's own.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks.lm_step import peak_memory
from deqjax.cli import load_config
from deqjax.data.image_set import ImageArrays
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import count_parameters
from deqjax.training.step import prepare, step_function
from experiments.image_training import architecture
from experiments.mdeq_classify import ClassificationTask
from experiments.mdeq_segment import SegmentationTask

IMPLICIT = {"preset": None, "ift": False, "hook_ift": True, "f_solver": "picard", "b_solver": "picard"}


class RandomScenes:
    """Images and labels of noise."""

    palette = ((0, 0, 0),) * 19

    def __init__(self, n: int, size: tuple[int, int], n_classes: int):
        random = np.random.default_rng(0)
        self.classes = tuple(map(str, range(n_classes)))
        self._images = random.integers(0, 256, (n, *size, 3), np.uint8)
        self._labels = random.integers(0, n_classes, (n, *size), np.uint8)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i], self._labels[i]


def make_task(config, size: tuple[int, int]):
    """The recipe's task on random images of a size."""
    sizes, n = architecture(config.model), 2 * config.data.batch_size
    config.data.augment = "none"
    if sizes.head == "segmentation":
        config.data.crop = config.data.eval_size = size
        scenes = RandomScenes(n, size, sizes.n_classes)
        return SegmentationTask(config, dict.fromkeys(("train", "valid", "test"), scenes))
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (n, *size, 3), np.uint8)
    labels = random.integers(0, sizes.n_classes, n).astype(np.int32)
    noise = ImageArrays(images, labels, tuple(map(str, range(sizes.n_classes))))
    return ClassificationTask(config, dict.fromkeys(("train", "valid", "test"), noise))


def measure(config, size: tuple[int, int], steps: int = 2) -> dict[str, float]:
    """Compiles the training step and runs it so many times after a first one; with steps=0 it is compiled only.

    Returns:
      parameters, compile_s, temporary_gib (what the compiled step needs beside state and batch), and, if it ran, step_s (the
      median), cpu_s (of all cores), loss, peak_gib (of the process so far).
    """
    task = make_task(config, size)
    mesh = make_mesh(config.get("mesh"))
    # The unrolled phase is left out: it is short, and its memory grows with its steps.
    task.training["pretrain_steps"] = 0
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, config, mesh, batch)
    update = jax.jit(step_function(task, config, program, 1), donate_argnums=0, out_shardings=(program.shardings, None, None))
    start = time.perf_counter()
    compiled = update.lower(program.shapes, batch).compile()
    result = {
        "parameters": count_parameters(program.shapes.params),
        "compile_s": time.perf_counter() - start,
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }
    if not steps:
        return result
    state, times = program.init(), []
    state, sums, _ = jax.block_until_ready(compiled(state, batch))
    cpu = time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        state, sums, _ = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - start)
    vitals = {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}
    cpu_s = (time.process_time() - cpu) / steps
    return result | vitals | {"step_s": float(np.median(times)), "cpu_s": cpu_s, "peak_gib": peak_memory() / 2**30}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mdeq_cifar10.py:small", help="FILE.py or FILE.py:variant")
    parser.add_argument("--batch", type=int, default=8, help="images in all")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images; default the recipe's")
    parser.add_argument("--gradient", choices=("recipe", "implicit"), default="recipe")
    parser.add_argument("--solver-steps", type=int, nargs="+", help="one measurement for each; default the recipe's number")
    parser.add_argument("--dtype", help="of the convolutions, e.g. bfloat16")
    parser.add_argument("--steps", type=int, default=2, help="of training; 0 compiles only")
    options = parser.parse_args()
    for solver_steps in options.solver_steps or [None]:
        config = load_config(options.config)
        config.data.batch_size, config.model.dtype = options.batch, options.dtype
        if options.gradient == "implicit":
            config.deq.update(IMPLICIT)
        if solver_steps:
            config.deq.f_max_iter = config.deq.b_max_iter = solver_steps
        segments = "crop" in config.data
        size = tuple(options.size or (config.data.crop if segments else (config.data.image_size,) * 2))
        result = measure(config, size, options.steps)
        device = jax.devices()[0].device_kind
        print(
            f"{options.config}, {options.gradient} gradient, {config.deq.f_solver} {config.deq.f_max_iter}, "
            f"batch {options.batch} x {size[0]} x {size[1]}, {options.dtype or 'float32'}, on {device}: "
            f"parameters {result['parameters']:,} | compiled in {result['compile_s']:.1f} s | "
            f"temporary memory {result['temporary_gib']:.3f} GiB"
        )
        if options.steps:
            print(
                f"  {result['step_s']:.2f} s per step ({options.batch / result['step_s']:.2f} images/s), "
                f"{result['cpu_s']:.2f} s of all cores | loss {result['loss']:.3f} | "
                f"solver steps {result['forward/steps']:.1f} | relative residual {result['forward/rel']:.1e} | "
                f"peak memory {result['peak_gib']:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
