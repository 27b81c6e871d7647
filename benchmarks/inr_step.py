"""A warm training step of an implicit representation beside that of the explicit network with the same weights.

    python -m benchmarks.inr_step --config configs/inr_camera.py

A warm step evaluates f as often as its gradient records it (k times), an explicit step once. The table says what a warm step
costs in explicit steps, and divided by k; "implicit" is the step with the implicit gradient: an evaluation, an adjoint solve.
Times are medians over rounds in which the steps take turns, so that what else the machine does falls on all alike. In each
round a step runs five times in a row, as in training; the first of them, which finds the caches full of another's, is left out.
"""

import argparse
import time

import jax
import numpy as np

from deqjax.cli import load_config
from deqjax.training.console import peak_memory
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import count_parameters
from deqjax.training.step import prepare, step_function
from experiments.deq_inr import make_task

CASES = {"explicit": 0, "k = 1": 1, "k = 2": 2, "k = 3": 3, "implicit": 1}


class Run:
    """A compiled training step with its state, past the first visit to every coordinate."""

    def __init__(self, config, name: str):
        config.model.network = "one_pass" if name == "explicit" else "deq"
        config.warm_start = name != "explicit"
        config.deq.grad = max(CASES[name], 1)
        config.deq.hook_ift = name == "implicit"
        task, mesh = make_task(config), make_mesh(config.mesh)
        self.batch = place_batch(mesh, task.data("train").batch(0))
        program = prepare(task, config, mesh, self.batch)
        self.parameters = count_parameters(program.shapes.params)
        update = step_function(task, config, program, 1)
        update = jax.jit(update, donate_argnums=0, out_shardings=(program.shardings, None, None))
        self.state = program.init()
        began = time.perf_counter()
        self._compiled = update.lower(self.state, self.batch).compile()
        self.compile_s = time.perf_counter() - began
        memory = self._compiled.memory_analysis()
        self.gib = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30 if memory else float("nan")
        self.times = []  # (seconds, seconds of all cores) of the steps that count
        self.step()

    def round(self, repeats: int):
        """Takes so many steps in a row that count, after one that does not."""
        self.step()
        self.times += [self.step() for _ in range(repeats)]

    def step(self) -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        self.state, _, _ = jax.block_until_ready(self._compiled(self.state, self.batch))
        return time.perf_counter() - began, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/inr_camera.py", help="FILE.py or FILE.py:variant")
    parser.add_argument("--step", type=int, help="take every so-manieth sample; default the config's")
    parser.add_argument("--hidden", type=int, help="default the config's")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    runs = {}
    for name in CASES:
        config = load_config(options.config)
        config.data.step = options.step or config.data.step
        config.model.n_hidden = options.hidden or config.model.n_hidden
        runs[name] = Run(config, name)
    for _ in range(options.rounds):
        for run in runs.values():
            run.round(4)
    medians = {name: np.median(run.times, axis=0) for name, run in runs.items()}
    explicit, batch = medians["explicit"][0], runs["explicit"].batch
    print(
        f"{options.config}: {len(batch['x']):,} coordinates, {config.model.filter}, {config.model.n_layers} layer(s) of "
        f"{config.model.n_hidden}, {runs['explicit'].parameters:,} parameters, on {jax.devices()[0].device_kind}"
    )
    print("| step | seconds | of all cores | in explicit steps | per evaluation of f | compiled in | memory |")
    print("|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        seconds, cpu_seconds = medians[name]
        ratio, each = seconds / explicit, seconds / explicit / max(CASES[name], 1)
        print(
            f"| {name} | {seconds:.3f} | {cpu_seconds:.3f} | {ratio:.2f} | {each:.2f} | {run.compile_s:.1f} s | "
            f"{run.gib:.2f} GiB |"
        )
    print(f"peak memory of the process {peak_memory():.2f} GiB")


if __name__ == "__main__":
    main()
