"""One training step of a published language-model recipe: parameters, compile time, time per step, peak memory.

    python -m benchmarks.lm_step --config configs/wt103.py --batch 1 --length 150

The model has its published size; the tokens are random, so no data is needed.
"""

import argparse
import resource
import time

import jax
import numpy as np

from deqjax.cli import load_config
from deqjax.data.text import EOS, TextCorpus, Vocabulary
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import count_parameters
from deqjax.training.step import prepare, step_function
from experiments.deq_lm import LanguageModelTask

WT103_WORDS = 267_735


def measure(config, steps: int = 3) -> dict[str, float]:
    """Builds the recipe, compiles its training step and runs it.

    Returns:
      parameters, compile_s, step_s (the median), loss (of the last step), peak_gib.
    """
    random = np.random.default_rng(0)
    length = (config.data.length * (steps + 1) + 1) * config.data.batch_size
    # Ranks of Zipf's law, so that every cluster of the vocabulary has its usual share.
    ids = np.minimum((WT103_WORDS ** random.random(length)).astype(np.int32), WT103_WORDS - 1)
    vocabulary = Vocabulary([EOS, *map(str, range(1, WT103_WORDS))])
    task = LanguageModelTask(config, TextCorpus(ids, ids, ids, vocabulary))

    mesh, stream = make_mesh(config.mesh), task.data("train")
    batches = [place_batch(mesh, stream.batch(k)) for k in range(steps + 1)]
    program = prepare(task, config, mesh, batches[0])
    update = jax.jit(step_function(task, config, program, 1), donate_argnums=0, out_shardings=(program.shardings, None, None))
    state = program.init()
    start = time.perf_counter()
    compiled = update.lower(state, batches[0]).compile()
    compile_s, times = time.perf_counter() - start, []
    for batch in batches:
        start = time.perf_counter()
        state, sums, _ = jax.block_until_ready(compiled(state, batch))
        times.append(time.perf_counter() - start)
    total, count = map(float, sums["loss"])
    return {
        "parameters": count_parameters(program.shapes.params),
        "compile_s": compile_s,
        "step_s": float(np.median(times[1:])),
        "loss": total / count,
        "peak_gib": peak_memory() / 2**30,
    }


def peak_memory() -> int:
    """Bytes at the peak so far: of the accelerator where it counts them, else of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/wt103.py", help="FILE.py or FILE.py:variant")
    parser.add_argument("--batch", type=int, default=1, help="streams in all")
    parser.add_argument("--length", type=int, default=150, help="positions per segment")
    parser.add_argument("--dtype", help="of the solve, e.g. bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    try:
        config = load_config(options.config)
    except UserError as error:
        parser.error(str(error))
    config.data.batch_size, config.data.length, config.model.dtype = options.batch, options.length, options.dtype
    config.data.eval_batch_size = 1  # nothing is evaluated
    device = jax.devices()[0]
    print(f"{options.config}, batch {options.batch} x {options.length}, {options.dtype or 'float32'}, on {device.device_kind}")
    result = measure(config, options.steps)
    print(
        f"parameters {result['parameters']:,} | compiled in {result['compile_s']:.1f} s | {result['step_s']:.2f} s per step "
        f"({options.batch * options.length / result['step_s']:.0f} tokens/s) | loss {result['loss']:.3f} | "
        f"peak memory {result['peak_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
