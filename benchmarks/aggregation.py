"""Sums over neighbours, A^T Z, by every method: the measurements behind `aggregation="auto"`.

    python -m benchmarks.aggregation

Milliseconds per product, and per product with its gradient, on random graphs of the sizes that the recipes have.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.models.ignn.aggregation import METHODS, adjacency

# Graphs, nodes and edges of each, features.
SHAPES = {
    "molecules (MUTAG)": (128, 32, 80, 64),
    "chains of length 100": (40, 101, 199, 16),
    "proteins": (128, 128, 500, 64),
    "PPI, first layer": (1, 2400, 64_000, 1024),
    "PPI, third layer": (1, 2400, 64_000, 512),
}


def measure(shape, method: str, repeats: int = 10) -> tuple[float, float]:
    """Seconds of one product, and of one with its gradient; the median of `repeats`."""
    G, N, E, D = shape
    random = np.random.default_rng(0)
    ends = jnp.asarray(random.integers(0, N, (2, G, E)), jnp.int32)
    weights = jnp.asarray(random.random((G, E)), jnp.float32)
    z = jnp.asarray(random.standard_normal((G, N, D)), jnp.float32)
    A = jax.jit(lambda senders, receivers, weights: adjacency(senders, receivers, weights, N, method))(*ends, weights)
    product = jax.jit(lambda A, z: A.aggregate(z))
    gradient = jax.jit(lambda A, z: jax.vjp(A.aggregate, z)[1](A.aggregate(z)))
    return seconds(product, A, z, repeats=repeats), seconds(gradient, A, z, repeats=repeats)


def seconds(f, *args, repeats: int) -> float:
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    methods = [method for method in METHODS if method != "auto"]
    print(f"on {jax.device_count()} x {jax.devices()[0].device_kind}; ms per product / with its gradient")
    print(f"| graphs x nodes, edges, features | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for name, shape in SHAPES.items():
        cells = ["{:.2f} / {:.2f}".format(*(1e3 * t for t in measure(shape, m, options.repeats))) for m in methods]
        print(f"| {name}: {shape[0]} x {shape[1]}, {shape[2]}, {shape[3]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
