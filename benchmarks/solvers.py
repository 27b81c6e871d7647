"""Solvers beside a bare loop over f, and beside other libraries, on equal terms.

    python -m benchmarks.solvers [--threads 1] [--only tanh] [--json FILE]

Every solve takes the same number of evaluations of the same f with the same float32 weights (the tolerance is 0, so nothing
stops early). Times are medians of interleaved repeats after a warm-up; compilation is not in them. `overhead` is the time
over that of a compiled loop which does nothing but evaluate f as often. Peers that are not installed are left out:
`pip install torch torchdeq jaxopt optimistix`.
"""

import argparse
import json
import os
import statistics
import time


def jax_candidates(problem):
    """name -> (method, mode, a call that returns when it is done)."""
    import jax
    import jax.numpy as jnp

    import deqjax

    weights = {name: jnp.asarray(w) for name, w in problem.weights.items()}
    start = [jnp.zeros(shape) for shape in problem.shapes]
    n = problem.steps
    settings = {"max_steps": n, "tol": 0.0}
    solvers = {
        "picard": deqjax.Picard(**settings),
        "picard, unmonitored": deqjax.Picard(**settings, monitor=False),
        "anderson": deqjax.Anderson(**settings, memory=6),
        "broyden": deqjax.Broyden(**settings, memory=6),
    }

    def bare(weights):
        f = problem.in_jax(weights)
        return jax.lax.fori_loop(0, n, lambda _, z: f(z), start)

    def ours(solver):
        def run(weights):
            f = problem.in_jax(weights)
            return deqjax.fixed_point(f, start, solver=solver, gradient=deqjax.Implicit(solver=solver, polish=False)).value

        return run

    def with_gradient(run):
        return jax.grad(lambda weights: sum(jnp.sum(z) for z in run(weights)))

    runs = {("bare f", "forward"): bare}
    for name, solver in solvers.items():
        runs["deqjax", name, "forward"] = ours(solver)
        runs["deqjax", name, "forward + adjoint"] = with_gradient(ours(solver))
    for library, name, run in _jax_peers(problem, start, n):
        runs[library, name, "forward"] = run

    def call(run):
        compiled = jax.jit(run).lower(weights).compile()
        return lambda: jax.block_until_ready(compiled(weights))

    return {key: call(run) for key, run in runs.items()}


def _jax_peers(problem, start, n):
    """What jaxopt and optimistix have of these methods, for the whole state as one problem, as they see it."""
    try:
        import jaxopt
    except ImportError:
        pass
    else:
        for name, solver in (("picard", jaxopt.FixedPointIteration), ("anderson", jaxopt.AndersonAcceleration)):
            options = {"maxiter": n, "tol": 0.0, "implicit_diff": True, "jit": True}
            if name == "anderson":
                options["history_size"] = 6

            def run(weights, solver=solver, options=options):
                f = problem.in_jax(weights)
                return solver(lambda z: f(z), **options).run(start).params

            yield "jaxopt", name, run
    try:
        import optimistix
    except ImportError:
        pass
    else:

        def run(weights):
            f = problem.in_jax(weights)
            solver = optimistix.FixedPointIteration(rtol=0.0, atol=0.0)
            return optimistix.fixed_point(lambda z, _: f(z), solver, start, max_steps=n, throw=False).value

        yield "optimistix", "picard", run


def torch_candidates(problem, threads):
    """The same for TorchDEQ."""
    try:
        import torch
        import torchdeq
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    weights = {name: torch.tensor(w, requires_grad=True) for name, w in problem.weights.items()}
    channels_first = len(problem.shapes) == 2
    shapes = [(s[0], s[3], s[1], s[2]) for s in problem.shapes] if channels_first else problem.shapes
    start = [torch.zeros(s) for s in shapes]
    n, calls = problem.steps, {}
    names = {"picard": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}
    for name, theirs in names.items():
        options = {"f_solver": theirs, "b_solver": theirs, "f_max_iter": n, "b_max_iter": n, "f_tol": 0.0, "b_tol": 0.0}
        if name == "broyden":
            # Its iterations begin after one evaluation.
            options |= {"f_max_iter": n - 1, "b_max_iter": n - 1}
        deq = torchdeq.get_deq(**options, ift=True)
        keep = {"LBFGS_thres": 6} if name == "broyden" else {}

        def solve(deq=deq, keep=keep):
            f = problem.in_torch(weights)
            g = (lambda *z: f(list(z))) if channels_first else (lambda z: f([z])[0])
            return deq(g, start if channels_first else start[0], solver_kwargs=keep)[0][-1]

        def forward(solve=solve, deq=deq):
            deq.eval()
            with torch.no_grad():
                solve()

        def both(solve=solve, deq=deq):
            deq.train()
            z = solve()
            sum(x.sum() for x in (z if isinstance(z, (list, tuple)) else [z])).backward()

        calls["torchdeq", name, "forward"] = forward
        calls["torchdeq", name, "forward + adjoint"] = both
    return calls


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write the table there as well")
    options = parser.parse_args()
    # Before JAX starts: it takes as many threads as it has cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import jax

    from benchmarks.problems import problems

    print(f"{jax.devices()[0].device_kind}, {options.threads} thread(s), jax {jax.__version__}, float32")
    rows = []
    for name, problem in problems().items():
        if options.only not in name:
            continue
        seconds = medians(jax_candidates(problem) | torch_candidates(problem, options.threads), options.repeats)
        bare = seconds.pop(("bare f", "forward"))
        print(f"\n{name}: {problem.steps} evaluations, {1e3 * bare:.2f} ms bare")
        print(f"  {'method':22}{'mode':20}{'library':12}{'ms':>9}{'overhead':>10}{'torchdeq / it':>15}")
        for key in sorted(seconds, key=lambda key: (key[1], key[2], key[0])):
            library, method, mode = key
            theirs = seconds.get(("torchdeq", method.partition(",")[0], mode))
            row = {"problem": name, "library": library, "method": method, "mode": mode, "seconds": seconds[key]}
            row |= {"overhead": seconds[key] / bare if mode == "forward" else None}
            row |= {"torchdeq_ratio": theirs / seconds[key] if theirs and library != "torchdeq" else None}
            rows.append(row)
            shown = [f"{row[c]:.2f}" if row[c] else "" for c in ("overhead", "torchdeq_ratio")]
            print(f"  {method:22}{mode:20}{library:12}{1e3 * seconds[key]:9.2f}{shown[0]:>10}{shown[1]:>15}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
