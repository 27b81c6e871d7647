"""A training step of the PPI recipe on a graph of its size: compile time, time per step, solver steps, residual, compilations.

    python -m benchmarks.ignn_step
    python -m benchmarks.ignn_step --config configs/ignn_ppi.py:ift --aggregation segment_sum

The graph is random (2,400 nodes, about 32,000 links, each in both directions), so no data is needed.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks.lm_step import peak_memory
from deqjax.cli import load_config
from deqjax.data.ppi import SPLITS, synthetic_ppi
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import count_parameters
from deqjax.training.step import prepare, step_function
from experiments.ignn_nodes import Example, NodeTask, as_single


def measure(config, n_nodes: int = 2400, n_links: int = 32_000, graphs: int = 3, steps: int = 3) -> dict[str, float]:
    """Builds the recipe, compiles its training step and runs it on `graphs` graphs in turn, their sizes spread by a third.

    Returns:
      parameters, n_edge (directed, of the first graph), compile_s, step_s (the median), cpu_s (of all cores, which tells more
      on a machine shared with others), forward and backward solver steps per layer and their relative residuals, compilations,
      peak_gib.
    """
    config.data.name = "ppi_synthetic"
    examples = []
    for k in range(graphs):
        size = int(n_nodes * (1 - k / (3 * max(graphs - 1, 1))))
        # Links drawn twice, and loops, are dropped: draw some more.
        made = synthetic_ppi({"train": 1}, size, 2.05 * n_links / n_nodes, seed=k)["train"][0]
        examples.append(Example(as_single(made), made.labels, np.ones(made.n_nodes, bool)))
    task = NodeTask(config, {split: examples for split in SPLITS})
    mesh = make_mesh(config.mesh)
    batches = [place_batch(mesh, task.collate([example])) for example in examples]
    program = prepare(task, config, mesh, batches[0])
    step = step_function(task, config, program, 1)
    update = jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, None, None))
    state, times, start = program.init(), [], time.perf_counter()
    state, sums, _ = jax.block_until_ready(update(state, batches[0]))
    compile_s = time.perf_counter() - start
    cpu = time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        state, sums, _ = jax.block_until_ready(update(state, batches[0]))
        times.append(time.perf_counter() - start)
    cpu_s = (time.process_time() - cpu) / steps
    vitals = {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count)}
    for batch in batches[1:]:
        state, _, _ = update(state, batch)
    return {
        "parameters": count_parameters(program.shapes.params),
        "n_edge": int(examples[0].graph.n_edge.sum()),
        "compile_s": compile_s - float(np.median(times)),
        "step_s": float(np.median(times)),
        "cpu_s": cpu_s,
        "compilations": update._cache_size(),
        "peak_gib": peak_memory() / 2**30,
    } | vitals


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/ignn_ppi.py", help="FILE.py or FILE.py:variant")
    parser.add_argument("--aggregation", default="auto")
    parser.add_argument("--hidden", type=int, help="features of the narrowest hidden layer; default the config's")
    parser.add_argument("--nodes", type=int, default=2400)
    parser.add_argument("--links", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    try:
        config = load_config(options.config)
    except UserError as error:
        parser.error(str(error))
    config.model.aggregation = options.aggregation
    config.model.n_hidden = options.hidden or config.model.n_hidden
    config.data.buckets = 2
    result = measure(config, options.nodes, options.links, steps=options.steps)
    device = jax.devices()[0].device_kind
    print(f"{options.config}, {options.nodes} nodes, {result['n_edge']:,} directed edges, {options.aggregation}, on {device}")
    print(
        f"parameters {result['parameters']:,} | compiled in {result['compile_s']:.1f} s | {result['step_s']:.2f} s per step, "
        f"{result['cpu_s']:.2f} s of all cores | "
        f"solver steps {result['forward/steps']:.1f} forward, {result.get('backward/steps', 0):.1f} backward, per layer | "
        f"relative residual {result['forward/rel']:.1e} | {result['compilations']} compilations for 3 graphs | "
        f"peak memory {result['peak_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
