"""A diffusion recipe at its published size: a training step, and an iteration of the joint system beside a sequential call.

    python -m benchmarks.ddim_step
    python -m benchmarks.ddim_step --config configs/ddim_celeba.py --batch 4 --slots 8

Images and weights are random, so no data is needed.
"""

import argparse
import time

import jax
import numpy as np
from flax import nnx

from deqjax.cli import load_config
from deqjax.models.ddim import JointSystem, chain_denoiser, with_dtype
from deqjax.training.console import peak_memory
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import count_parameters
from deqjax.training.step import prepare, step_function
from experiments.ddim_sampling import chain_of
from experiments.deq_ddim import DiffusionTask


def timed(function, *arguments, repeats: int) -> tuple[float, float, object]:
    """Seconds to compile and run it once, the median of further runs, and the last result."""
    began, times = time.perf_counter(), []
    result = jax.block_until_ready(function(*arguments))
    first = time.perf_counter() - began
    for _ in range(repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return first, float(np.median(times)), result


def measure(config, batch: int, slots: int, repeats: int = 3) -> dict[str, float]:
    """Builds the recipe with so many images per step, and with so many timesteps in the window.

    Returns:
      parameters, compile_s and step_s of training, iteration_s of the joint system, call_s of one image, peak_gib.
    """
    size, channels = config.model.image_size, config.model.image_channels
    config.data.batch_size = batch
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, channels), dtype=np.uint8)
    task = DiffusionTask(config, {"train": images, "test": images})
    mesh = make_mesh(config.get("mesh"))
    placed = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, config, mesh, placed)
    state = program.init()
    update = jax.jit(step_function(task, config, program, 1), out_shardings=(program.shardings, None, None))
    compile_s, step_s, _ = timed(update, state, placed, repeats=repeats)

    chain = chain_of(config, task.rates, slots)
    graph, weights = nnx.split(with_dtype(program.model(state), config.dtype))
    x = jax.random.normal(jax.random.key(0), (1, size, size, channels), "float32")

    @jax.jit
    def iteration(weights, z):
        return JointSystem(chain_denoiser(nnx.merge(graph, weights), chain), chain).map(x)(z)

    @jax.jit
    def call(weights, x):
        return nnx.merge(graph, weights)(x, jax.numpy.asarray(chain.t[:1]))

    z = jax.numpy.repeat(x[:, None], len(chain), axis=1)
    return {
        "parameters": count_parameters(program.shapes.params),
        "compile_s": compile_s - step_s,
        "step_s": step_s,
        "slots": len(chain),
        "iteration_s": timed(iteration, weights, z, repeats=repeats)[1],
        "call_s": timed(call, weights, x, repeats=repeats)[1],
        "peak_gib": peak_memory(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/ddim_cifar10.py", help="FILE.py or FILE.py:variant")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--slots", type=int, default=10, help="timesteps that are iterated on at once")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    r = measure(load_config(options.config), options.batch, options.slots, options.repeats)
    print(
        f"{options.config}, {options.batch} images per step, on {jax.devices()[0].device_kind}\n"
        f"parameters {r['parameters']:,} | training compiled in {r['compile_s']:.1f} s, {r['step_s']:.2f} s per step | "
        f"one iteration on {r['slots']} timesteps {r['iteration_s']:.2f} s, one call for one image {r['call_s']:.3f} s: "
        f"an iteration costs {r['iteration_s'] / r['call_s']:.1f} calls | peak memory {r['peak_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
