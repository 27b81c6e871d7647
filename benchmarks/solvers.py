"""Solvers beside a bare loop over f, and beside other libraries, on equal terms.

    python -m benchmarks.solvers [--threads 1] [--only tanh] [--json FILE]

Two comparisons, both in float32, compilation apart. At equal steps, every solve takes the same number of evaluations of the
same f (the tolerance is 0, so nothing stops early); `overhead` is its time over that of a compiled loop which does nothing
but evaluate f as often. At equal accuracy, each library solves with its own defaults until a relative residual of 1e-5,
measured here on the worst sample; one that stops before, because it measures something else, is given a smaller tolerance.
Times are medians of interleaved repeats after a warm-up. The maps are in `benchmarks.problems`, the libraries in
`benchmarks.peers`.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time

ACCURACY = 1e-5
TOLERANCES = tuple(ACCURACY * share for share in (1, 0.7, 0.5, 0.35, 0.25, 0.125))  # given to a library until it is reached
MODES = ("forward", "forward + adjoint")


def equal_steps(problem, threads):
    """(library, method, mode) -> a call that returns when it is done; and the seconds that compiling took."""
    import jax
    import jax.numpy as jnp

    from benchmarks.peers import Budget, jax_solvers, torchdeq_solvers

    weights, start = _in_jax(problem)
    budget = Budget(problem.steps, batch_axis=None if problem.samples == "one" else 0)

    def bare(weights):
        f = problem.in_jax(weights)
        return jax.lax.fori_loop(0, problem.steps, lambda _, z: f(z), start)

    runs = {("bare f", "", "forward"): bare}
    for (library, method), solve in jax_solvers(budget).items():
        apart = problem.samples == "each" and library != "deqjax"
        forward = functools.partial(_vmapped if apart else _whole, problem, solve, start)
        runs[library, method, "forward"] = forward
        if library == "deqjax":
            loss = lambda weights, forward=forward: sum(jnp.sum(z) for z in forward(weights))  # noqa: E731
            runs[library, method, "forward + adjoint"] = jax.grad(loss)

    calls, compile_seconds = {}, {}
    for key, run in runs.items():
        began = time.perf_counter()
        compiled = jax.jit(run).lower(weights).compile()
        compile_seconds[key] = time.perf_counter() - began
        calls[key] = lambda compiled=compiled: jax.block_until_ready(compiled(weights))
    # It has no other way than sample by sample.
    theirs = torchdeq_solvers(budget) if problem.samples != "one" else {}
    weights_there, start_there = _in_torch(problem, threads) if theirs else (None, None)
    for method, solve in theirs.items():

        def call(differentiate, solve=solve):
            z = solve(problem.in_torch(weights_there), start_there, differentiate)
            if differentiate:
                sum(x.sum() for x in z).backward()

        for mode in MODES:
            calls["torchdeq", method, mode] = lambda call=call, mode=mode: call(mode == MODES[1])
    return calls, compile_seconds


def _whole(problem, solve, start, weights):
    return solve(problem.in_jax(weights), start)


def _vmapped(problem, solve, start, weights):
    """Every sample a problem of its own, for libraries that know only one."""
    import jax

    own = lambda z, x: solve(problem.in_jax(weights | {"x": x[None]}), [z[None]])[0][0]  # noqa: E731
    return [jax.vmap(own)(start[0], weights["x"])]


def equal_accuracy(problem, threads):
    """(library, method) -> a call, for those that reach the accuracy; and of all the residual with the last tolerance tried."""
    import numpy as np

    from benchmarks.peers import Budget, jax_solvers, torchdeq_solvers

    weights, start = _in_jax(problem)

    def in_jax(solve):
        import jax

        compiled = jax.jit(lambda weights: solve(problem.in_jax(weights), start)).lower(weights).compile()
        return lambda: jax.block_until_ready(compiled(weights))

    def in_torch(solve):
        weights_there, start_there = _in_torch(problem, threads)
        return lambda: solve(problem.in_torch(weights_there), start_there, False)

    def residual(z):
        # Of the worst sample, in float64.
        z = [np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in z]
        f_z = problem.in_numpy({name: w.astype(np.float64) for name, w in problem.weights.items()})(z)
        return max(np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)) for a, b in zip(z, f_z, strict=True))

    calls, reached = {}, {}
    for tol in TOLERANCES:
        budget = Budget(problem.steps, tol, memory=None)
        solvers = {key: (in_jax, solve) for key, solve in jax_solvers(budget).items() if "," not in key[1]}
        solvers |= {("torchdeq", method): (in_torch, solve) for method, solve in torchdeq_solvers(budget).items()}
        for key in solvers.keys() - calls.keys():
            make, solve = solvers[key]
            call = make(solve)
            reached[key] = residual(call())
            if reached[key] <= ACCURACY:
                calls[key] = call
    return calls, reached


def _in_jax(problem):
    import jax.numpy as jnp

    return {name: jnp.asarray(w) for name, w in problem.weights.items()}, [jnp.zeros(shape) for shape in problem.shapes]


def _in_torch(problem, threads):
    import torch

    torch.set_num_threads(threads)
    shapes = [(s[0], s[3], s[1], s[2]) if len(s) == 4 else s for s in problem.shapes]
    return {name: torch.tensor(w, requires_grad=True) for name, w in problem.weights.items()}, [torch.zeros(s) for s in shapes]


def medians(calls, repeats):
    """Seconds of each call, taken in turns so that a slow moment of the machine hits all alike."""
    for call in calls.values():
        call()
    times = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - began)
    return {key: statistics.median(t) for key, t in times.items()}


def table_of_equal_steps(name, problem, options):
    """Prints the table of one problem and returns its rows."""
    calls, compile_seconds = equal_steps(problem, options.threads)
    seconds = medians(calls, options.repeats)
    bare = seconds.pop(("bare f", "", "forward"))
    print(f"\n{name}: {problem.steps} evaluations, {1e3 * bare:.2f} ms bare")
    print(f"  {'method':22}{'mode':20}{'library':12}{'ms':>9}{'overhead':>10}{'torchdeq / it':>15}{'compile s':>11}")
    rows = []
    for key in sorted(seconds, key=lambda key: (key[1], key[2], key[0])):
        library, method, mode = key
        theirs = seconds.get(("torchdeq", method.partition(",")[0], mode))
        row = {"problem": name, "library": library, "method": method, "mode": mode, "seconds": seconds[key]}
        row |= {"overhead": seconds[key] / bare if mode == "forward" else None}
        row |= {"torchdeq_ratio": theirs / seconds[key] if theirs and library != "torchdeq" else None}
        row |= {"compile_seconds": compile_seconds.get(key)}
        rows.append(row)
        shown = [f"{row[c]:.2f}" if row[c] else "" for c in ("overhead", "torchdeq_ratio", "compile_seconds")]
        print(f"  {method:22}{mode:20}{library:12}{1e3 * seconds[key]:9.2f}{shown[0]:>10}{shown[1]:>15}{shown[2]:>11}")
    return rows


def table_of_equal_accuracy(name, problem, options):
    """The same for time to the accuracy."""
    calls, reached = equal_accuracy(problem, options.threads)
    seconds = medians(calls, options.repeats)
    print(f"\n{name}: time to a relative residual of {ACCURACY:g}, at most {problem.steps} evaluations, own defaults")
    print(f"  {'method':12}{'library':12}{'ms':>9}{'residual':>11}")
    rows = []
    for library, method in sorted(reached, key=lambda key: (key[1], key[0])):
        key = (library, method)
        rows.append({"problem": name, "library": library, "method": method, "seconds": seconds.get(key)})
        rows[-1]["residual"] = float(reached[key])
        shown = f"{1e3 * seconds[key]:.2f}" if key in seconds else "-"
        print(f"  {method:12}{library:12}{shown:>9}{reached[key]:11.1e}")
    best = {library: min((t for (lib, _), t in seconds.items() if lib == library), default=None) for library, _ in reached}
    if best.get("torchdeq"):
        print(f"  the fastest of torchdeq over the fastest of deqjax: {best['torchdeq'] / best['deqjax']:.1f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", default="runs/solvers.json", help="the rows are written there as well")
    options = parser.parse_args()
    # Before JAX starts: it takes as many threads as it has cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import jax

    from benchmarks.problems import linear_problems, problems

    print(f"{jax.devices()[0].device_kind}, {options.threads} thread(s), jax {jax.__version__}, float32")
    rows = {"equal steps": [], "equal accuracy": []}
    for name, problem in problems().items():
        if options.only in name:
            rows["equal steps"] += table_of_equal_steps(name, problem, options)
    for name, problem in linear_problems().items():
        if options.only in name:
            rows["equal accuracy"] += table_of_equal_accuracy(name, problem, options)
    path = pathlib.Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
