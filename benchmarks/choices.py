"""The tables of docs/choosing.md: evaluations, residuals, gradient errors and memory of solvers and gradient rules.

    python -m benchmarks.choices
    python -m benchmarks.choices --picture docs/choosing.png

Nothing is timed, so the tables are the same on every machine but for rounding. Maps are z = A z + x of `benchmarks.problems`,
`[8, 256]` in float32, and for the gradients z = tanh(z W + x), `[32, 256]`, whose Jacobian has the spectral radius printed.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import linear_problems
from deqjax import (
    GMRES,
    SHINE,
    Anderson,
    BiCGSTAB,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    NormalCG,
    OneStep,
    Phantom,
    Picard,
    Reversible,
    Unrolled,
    fixed_point,
    spectral_radius,
)

ACCURACY = 1e-5
STEPS = (40, 160)


def solvers():
    """The solvers of the table, by what one writes."""
    budget = {"max_steps": 300, "tol": ACCURACY}
    return {
        "`Picard()`": Picard(**budget),
        "`Anderson()`": Anderson(**budget),
        "`Anderson(memory=15)`": Anderson(memory=15, **budget),
        "`Broyden()`": Broyden(**budget),
        "`Broyden(memory=None)`": Broyden(memory=None, **budget),
        "`NewtonKrylov()`": NewtonKrylov(**budget),
    }


def solve(problem, solver):
    """Statistics of one of `linear_problems`."""
    weights = {name: jnp.asarray(w) for name, w in problem.weights.items()}
    start = [jnp.zeros(shape) for shape in problem.shapes]
    return jax.jit(lambda weights: fixed_point(problem.in_jax(weights), start, solver=solver).stats)(weights)


def evaluations(problem, solver):
    """Mean over the samples, or a dash where the accuracy was not reached."""
    stats = solve(problem, solver)
    return f"{np.mean(stats.steps):.0f}" if bool(jnp.all(stats.converged)) else "-"


def rules():
    """The gradient rules of the table, by what one writes; `Unrolled` and `Reversible` bring their own forward iteration."""
    return {
        "`Implicit()`": Implicit(),
        "`Implicit(solver=GMRES())`": Implicit(solver=GMRES()),
        "`Implicit(solver=BiCGSTAB())`": Implicit(solver=BiCGSTAB()),
        "`Implicit(solver=NormalCG(max_steps=80))`": Implicit(solver=NormalCG(max_steps=80)),
        "`Implicit(solver=Neumann(20))`": Implicit(solver=Neumann(20)),
        "`Implicit(solver=Neumann(5))`": Implicit(solver=Neumann(5)),
        "`Implicit(solver=SHINE())`": Implicit(solver=SHINE()),
        "`Implicit(solver=SHINE(refine=5))`": Implicit(solver=SHINE(refine=5)),
        "`Phantom(steps=20)`": Phantom(steps=20),
        "`Phantom(steps=5)`": Phantom(steps=5),
        "`Phantom(steps=5, damping=0.5)`": Phantom(steps=5, damping=0.5),
        "`OneStep()`": OneStep(),
        "`Unrolled()`": Unrolled(),
        "`Unrolled(remat=True)`": Unrolled(remat=True),
        "`Reversible()`": Reversible(),
    }


def gradients():
    """Rows `[rule, relative error, MiB at fewer and at more solver steps]`, and the radius of the map."""
    W, x = _weights(256, 32)
    target = jax.random.normal(jax.random.key(2), x.shape)

    def gradient_of(rule, solver):
        def loss(W):
            z = fixed_point(lambda z: jnp.tanh(z @ W + x), jnp.zeros_like(x), solver=solver, gradient=rule).value
            return jnp.mean(jnp.square(z - target))

        return jax.jit(jax.grad(loss))

    exact = gradient_of(Implicit(solver=Broyden(max_steps=200, tol=1e-7)), Broyden(max_steps=200, tol=1e-7))(W)
    rows = []
    for name, rule in rules().items():
        compiled = []
        for steps in STEPS:
            picks = Broyden(max_steps=steps, tol=1e-6, memory=None) if "SHINE" in name else Picard(max_steps=steps, tol=1e-6)
            compiled.append(gradient_of(rule, picks).lower(W).compile())
        # Reversing amplifies rounding with every step, so the few steps are the ones to judge it by.
        error = jnp.linalg.norm(compiled[0](W) - exact) / jnp.linalg.norm(exact)
        memory = [f"{c.memory_analysis().temp_size_in_bytes / 2**20:.1f}" for c in compiled]
        rows.append([name, f"{error:.0e}", *memory])
    z = fixed_point(lambda z: jnp.tanh(z @ W + x), jnp.zeros_like(x), solver=Broyden(max_steps=200, tol=1e-7)).value
    radius = spectral_radius(lambda z: jnp.tanh(z @ W + x), z, jax.random.key(3), steps=30, method="arnoldi")
    return rows, float(jnp.max(radius))


def _weights(width, batch):
    W = 0.9 * jax.random.normal(jax.random.key(0), (width, width)) / width**0.5
    return W, 0.3 * jax.random.normal(jax.random.key(1), (batch, width))


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def draw(file):
    """Residuals of one sample against evaluations, a panel for every map."""
    import matplotlib.pyplot as plt

    problems = linear_problems()
    figure, panels = plt.subplots(1, len(problems), figsize=(14, 3.6), sharey=True, layout="constrained")
    for (name, problem), panel in zip(problems.items(), panels, strict=True):
        for label, solver in solvers().items():
            stats = solve(problem, solver)
            steps = int(stats.steps[0])
            panel.plot(np.arange(1, steps + 1), stats.rel_trace[0, :steps], label=label.strip("`"), linewidth=1.2)
        panel.set(title=name, xlabel="evaluations of f", yscale="log", xlim=(0, 150), ylim=(ACCURACY / 3, 3))
    panels[0].set_ylabel("|f(z) - z| / |f(z)|")
    panels[0].legend(fontsize="small")
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", metavar="FILE", help="draw the residuals of the solvers instead of printing the tables")
    picture = parser.parse_args().picture
    if picture:
        return draw(picture)
    print(f"Evaluations of f to a relative residual of {ACCURACY:g}, mean of 8 samples; - where 300 did not do it\n")
    counts = [[name, *(evaluations(p, solver) for p in linear_problems().values())] for name, solver in solvers().items()]
    table(["solver", *linear_problems()], counts)
    rows, radius = gradients()
    print(f"\nGradients at a map of spectral radius {radius:.2f}\n")
    memory = [f"MiB, {steps} solver steps" for steps in STEPS]
    table(["gradient", "relative error", *memory], rows)


if __name__ == "__main__":
    main()
