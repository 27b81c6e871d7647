"""A reversible solve: the exact gradient of the computation in the memory of one state."""

import dataclasses

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.gradients import Gradient
from deqjax.core.hoist import Hoisted
from deqjax.core.solve import Solved, residuals, statistics_of_traces
from deqjax.core.solvers.base import require, split_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversible(Gradient):
    """Backpropagation through every step, each recomputed from the one after it (RevDEQ, McCallum, Arora and Foster 2025).

    Two states y and z take turns: y <- (1 - beta) y + beta f(z), then z <- (1 - beta) z + beta f(y). Either line can be
    solved for what it overwrote, so nothing is stored. This is the forward iteration too: of the solver only `max_steps`
    (two evaluations of f a step), `tol` and `stop_mode` are used, and the whole batch stops at once, by the residuals at y.
    Gives a gradient to `z_init` as well. Not differentiable twice.

    Going back divides by 1 - beta, which multiplies rounding as often as there are steps: in float32 stay below about 20
    steps at 0.5, or 10 at 0.8.

    Attributes:
      beta: between 0 and 1; larger converges faster and reverses less exactly.
    """

    beta: float = 0.5

    def __post_init__(self):
        require(0 < self.beta < 1, "beta", self.beta, "between 0 and 1")

    def solve(self, f, z_init, solver, sample_at=()):
        if sample_at:
            raise ValueError("Reversible keeps no states on its way, so there are none to sample (sample_at).")
        require(solver.max_steps >= 2, "max_steps", solver.max_steps, "2 or more; Reversible evaluates f twice in every step")
        n_steps = solver.max_steps // 2
        smooth, fixed, rebuild = f.split()
        options, with_options = split_options(solver)
        mixed = lambda a, b: batched.mix(a, b, self.beta)  # noqa: E731

        def unmixed(new, b):
            beta = lambda x: jnp.asarray(self.beta, x.dtype)  # noqa: E731
            return jax.tree.map(lambda n, x: (n - beta(x) * x) / (1 - beta(x)), new, b)

        @jax.custom_vjp
        def iterate(smooth, fixed, options, z_init):
            return forward(smooth, fixed, options, z_init)[0]

        def forward(smooth, fixed, options, z_init):
            f, solver = rebuild(smooth, fixed), with_options(options)
            zero = jnp.zeros_like(batched.norm(z_init))
            trace = jnp.repeat(zero[:, None], 2 * n_steps, axis=1)

            def unfinished(carry):
                step, _, _, done, _, _ = carry
                return (step < n_steps) & ~done

            def advance(carry):
                step, y, z, _, *traces = carry
                f_z = f(z)
                at_z = residuals(z, f_z)
                y = mixed(y, f_z)
                f_y = f(y)
                at_y = residuals(y, f_y)
                z = mixed(z, f_y)
                done = jnp.all((at_y[0] if solver.stop_mode == "abs" else at_y[1]) < solver.tol)
                evaluation = jnp.arange(2 * n_steps, dtype=jnp.int32)[None]
                for first, measured in ((2 * step, at_z), (2 * step + 1, at_y)):
                    # The last one stands for all that do not take place.
                    pairs = zip(traces, measured, strict=True)
                    traces = [jnp.where(evaluation >= first, new[:, None], trace) for trace, new in pairs]
                return step + 1, y, z, done, *traces

            start = (jnp.zeros((), jnp.int32), z_init, z_init, jnp.any(zero != 0), trace, trace)
            step, y, z, _, abs_trace, rel_trace = jax.lax.while_loop(unfinished, advance, start)
            stats = statistics_of_traces(abs_trace, rel_trace, solver)
            taken = jnp.full_like(stats.steps, 2 * step)
            return (z, dataclasses.replace(stats, steps=taken, best_step=taken)), (smooth, fixed, y, z, step)

        def backward(saved, cotangents):
            smooth, fixed, y, z, step = saved
            apply = lambda smooth, z: rebuild(smooth, fixed)(z)  # noqa: E731
            z_bar, _ = cotangents
            nothing = jax.tree.map(jnp.zeros_like, (smooth, y))
            scaled = lambda tree, by: jax.tree.map(lambda x: x * jnp.asarray(by, x.dtype), tree)  # noqa: E731
            add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731

            def retreat(_, carry):
                y, z, y_bar, z_bar, smooth_bar = carry
                f_y, pullback = jax.vjp(apply, smooth, y)
                z = unmixed(z, f_y)
                to_smooth, to_y = pullback(scaled(z_bar, self.beta))
                y_bar, z_bar, smooth_bar = add(y_bar, to_y), scaled(z_bar, 1 - self.beta), add(smooth_bar, to_smooth)
                f_z, pullback = jax.vjp(apply, smooth, z)
                y = unmixed(y, f_z)
                to_smooth, to_z = pullback(scaled(y_bar, self.beta))
                z_bar, y_bar, smooth_bar = add(z_bar, to_z), scaled(y_bar, 1 - self.beta), add(smooth_bar, to_smooth)
                return y, z, y_bar, z_bar, smooth_bar

            carry = (y, z, nothing[1], z_bar, nothing[0])
            _, _, y_bar, z_bar, smooth_bar = jax.lax.fori_loop(0, step, retreat, carry)
            return smooth_bar, None, None, add(y_bar, z_bar)

        iterate.defvjp(forward, backward)
        z, stats = iterate(smooth, fixed, options, z_init)
        return Solved(z, (), jax.lax.stop_gradient(stats))

    def attach(self, f: Hoisted, z_hat, probe=None, method=None):
        return (z_hat,)
