"""Optical flow of a published size: compile time, and time and memory of a training step or of an inference.

    python -m benchmarks.flow_step --config configs/flow_chairs.py --batch 1 --size 368 496 --solver-steps 12 --states 2
    python -m benchmarks.flow_step --config configs/flow_things.py --infer --size 440 1024 --solver-steps 60
    python -m benchmarks.flow_step --infer --size 1088 1920 --lookups volume on_demand --compile-only

The frames are random, so no data is needed. Memory is the compiler's own account of temporary arrays, so `--compile-only` shows
what would not fit. `--lookups` compares both forms of the correlation.
"""

import argparse
import time

import jax
import numpy as np
from flax import nnx

from deqjax.cli import load_config
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.step import prepare, step_function
from experiments.deq_flow import FlowTask


def frames(batch: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Noise as a batch of training."""
    random, (H, W) = np.random.default_rng(0), size
    image1, image2 = (random.integers(0, 256, (batch, H, W, 3)).astype(np.float32) for _ in range(2))
    flow = random.normal(0, 5, (batch, H, W, 2)).astype(np.float32)
    return {"image1": image1, "image2": image2, "flow": flow, "valid": np.ones((batch, H, W), np.float32)}


def training(task, batch):
    """The compiled step with its arguments."""
    mesh = make_mesh(None)
    placed = place_batch(mesh, batch)
    program = prepare(task, task.config, mesh, placed)
    update = jax.jit(step_function(task, task.config, program, 1), out_shardings=(program.shardings, None, None))
    return update.lower(program.shapes, placed).compile(), lambda: (program.init(), placed)


def inference(task, batch):
    """The compiled estimate with its arguments."""

    def new_model():
        return task.model(nnx.Rngs(0))

    graph, shapes = nnx.split(nnx.eval_shape(new_model))
    run = jax.jit(lambda state, image1, image2: nnx.merge(graph, state)(image1, image2).flow)
    images = batch["image1"], batch["image2"]
    compiled = run.lower(shapes, *images).compile()
    return compiled, lambda: (jax.jit(lambda: nnx.state(new_model()))(), *images)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/flow_chairs.py")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(368, 496), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--solver-steps", type=int, nargs="+", default=[12])
    parser.add_argument("--states", type=int, default=2)
    parser.add_argument("--lookups", nargs="+", default=["volume"])
    parser.add_argument("--infer", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    for lookup in args.lookups:
        for steps in args.solver_steps:
            config = load_config(args.config)
            config.data.batch_size, config.data.crop = args.batch, tuple(args.size)
            config.model.correlation = lookup
            config.deq.f_max_iter, config.deq.n_states, config.deq.eval_f_max_iter = steps, args.states, steps
            began = time.perf_counter()
            compiled, arguments = (inference if args.infer else training)(FlowTask(config), frames(args.batch, args.size))
            compile_s = time.perf_counter() - began
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
            line = f"{lookup}, {steps} solver steps: compiled in {compile_s:.1f} s, {memory:.2f} GiB of temporary arrays"
            if not args.compile_only:
                given, times = arguments(), []
                for _ in range(args.repeats + 1):
                    began = time.perf_counter()
                    jax.block_until_ready(compiled(*given))
                    times.append(time.perf_counter() - began)
                line += f", {min(times[1:]):.3f} s a run ({args.batch} pairs of {args.size[0]} x {args.size[1]})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
