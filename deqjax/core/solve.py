"""The one solver loop: residuals, stopping, best iterate, statistics, sampled iterates.

Each trip evaluates f once, at the current point z. The residual `f(z) - z` is measured there, a finished sample is
frozen, the best state of every sample is kept, and the solver says where to look next.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, ArrayLike, Float, Int, State
from deqjax.core.hoist import Hoisted, as_image, as_state, check_batch
from deqjax.core.solvers.base import Solver, require_count, require_solver, without_gradients
from deqjax.core.stats import DIVERGENCE_FACTOR, SolverStats, Status

# Keeps the relative residual finite when f(z) = 0.
_EPSILON = 1e-9


class Solved(NamedTuple):
    """What a solve leaves behind."""

    value: Any  # the best state
    samples: tuple  # the best state at each sampled step
    stats: SolverStats
    method: Any = None  # the solver's own state at the end


class _Carry(NamedTuple):
    step: jax.Array  # evaluations so far
    z: Any
    method: Any  # the solver's own state
    best: Any
    samples: Any  # [S, B, ...]: the best iterate at each sampled step
    abs_lowest: jax.Array  # [B]
    rel_lowest: jax.Array
    best_step: jax.Array
    steps: jax.Array
    finite: jax.Array
    finished: jax.Array
    abs_trace: jax.Array  # [N, B]: a step writes one row, not a column of as many cache lines as samples
    rel_trace: jax.Array


def solve(
    f: Callable[[State], State],
    z_init: State,
    solver: Solver,
    sample_at: Sequence[int] = (),
    limit: Int[ArrayLike, ""] | None = None,
) -> Solved:
    """Iterates from `z_init` until every sample's residual is below the solver's tolerance or its budget is spent.

    Never raises on account of the numbers: a sample that turns non-finite stops there and returns its best finite
    iterate. Not differentiable in reverse mode; `fixed_point` attaches the gradient.

    Args:
      f: maps states to states.
      z_init: state, every leaf `[B, ...]`.
      solver: method and hyper-parameters.
      sample_at: increasing evaluation counts at which the best iterate so far is recorded; steps that the solve does
        not reach repeat its result.
      limit: stop after so many evaluations, where they are fewer than `solver.max_steps`; unlike that it may be traced.

    Returns:
      The best state, the recorded states, the statistics and the state of the method.

    Raises:
      TypeError: f does not map states to states, a leaf is not floating point, or the solver is none.
      ValueError: leaves do not share the batch axis, or `sample_at` or `limit` does not fit the solver.
    """
    require_solver(solver)
    # A fixed point does not depend on how it was found.
    solver = without_gradients(solver)
    if not isinstance(f, Hoisted):
        # A hoisted map has been checked.
        z_init, f = as_state(z_init), lambda z, f=f: as_image(z, f(z))
        check_batch(z_init)
    check_samples(sample_at, solver.max_steps)
    if solver.max_steps == 0:
        return Solved(z_init, (), _unsolved(z_init), solver.init(z_init))
    if not solver.monitor:
        if limit is not None:
            raise ValueError("limit: a solve without residuals (monitor=False) takes all of its steps.")
        return _solve_unmonitored(f, z_init, solver, sample_at)

    most = solver.max_steps if limit is None else jnp.minimum(limit, solver.max_steps)
    sample_steps = jnp.asarray(sample_at, jnp.int32)

    def iterate(carry: _Carry) -> _Carry:
        f_z = f(carry.z)
        z_next, method = solver.step(f, carry.z, f_z, carry.method)
        carry, finished = _record(carry, f_z, solver)
        if sample_at:
            row = jnp.sum(carry.step > sample_steps)
            write = lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, row, 0)  # noqa: E731
            # Rewritten at every step until its time has come, so a row never reached holds the last best.
            samples = jax.tree.map(write, carry.samples, carry.best)
            carry = carry._replace(samples=samples)
        return carry._replace(z=batched.select(finished, carry.z, z_next), method=method, finished=finished)

    def unfinished(carry: _Carry):
        return (carry.step < most) & ~jnp.all(carry.finished)

    def trip(carry: _Carry) -> _Carry:
        if solver.check_every == 1:
            return iterate(carry)
        # Past the budget, or once all are finished, the remaining iterations of a trip change nothing.
        step = lambda _, c: jax.lax.cond(c.step < most, iterate, lambda c: c, c)  # noqa: E731
        return jax.lax.fori_loop(0, solver.check_every, step, carry)

    # One more row takes the writes of steps past the last sampled one.
    n_rows = len(sample_at) + (sample_at[-1] < solver.max_steps) if sample_at else 0
    carry = jax.lax.while_loop(unfinished, trip, _initial(z_init, solver, n_rows))
    samples = tuple(_sample(carry, sample_steps, i) for i in range(len(sample_at)))
    return Solved(carry.best, samples, _statistics(carry, solver), carry.method)


def _initial(z_init, solver, n_rows) -> _Carry:
    leaf = jax.tree.leaves(z_init)[0]
    # Everything per sample derives from the state, so that it is sharded (and, under shard_map, varies) like it.
    one_per_sample = jnp.sum(jnp.zeros_like(leaf), axis=tuple(range(1, leaf.ndim)))
    zeros = jnp.zeros_like(one_per_sample, batched.accumulation_dtype(z_init))
    infinite = zeros + jnp.inf
    counts = jnp.zeros_like(one_per_sample, jnp.int32)
    trace = jnp.repeat(zeros[None], solver.max_steps, axis=0)
    samples = jax.tree.map(lambda x: jnp.repeat(jnp.zeros_like(x)[None], n_rows, axis=0), z_init) if n_rows else ()
    return _Carry(
        step=jnp.zeros((), jnp.int32),
        z=z_init,
        method=solver.init(z_init),
        best=z_init,
        samples=samples,
        abs_lowest=infinite,
        rel_lowest=infinite,
        best_step=counts,
        steps=counts,
        finite=counts == 0,
        finished=counts != 0,
        abs_trace=trace,
        rel_trace=trace,
    )


def _record(carry: _Carry, f_z, solver: Solver) -> tuple[_Carry, jax.Array]:
    """Measures the residual at carry.z; returns the carry with it booked, and who is finished."""
    absolute, relative = residuals(carry.z, f_z)
    residual, lowest = (absolute, carry.abs_lowest) if solver.stop_mode == "abs" else (relative, carry.rel_lowest)

    active = ~carry.finished
    finite = jnp.isfinite(absolute)  # then the relative one is finite, too; so it costs nothing where nobody reads it
    eligible = active & finite & (carry.step >= solver.burn_in)
    improved = eligible & ((residual < lowest) | solver.return_final)
    candidate = f_z if solver.candidate == "image" else carry.z

    def keep_lowest(new, old):
        return jnp.where(eligible & ((new < old) | solver.return_final), new, old)

    step = carry.step + 1
    below = eligible & (residual < solver.tol) & (not solver.return_final)
    dead = carry.finished | (active & ~finite)
    finished = dead | (below if solver.stop == "each" else jnp.all(below | dead))
    row = lambda trace, new: trace.at[carry.step].set(jnp.where(active, new, 0))  # noqa: E731
    carry = carry._replace(
        step=step,
        best=batched.select(improved, candidate, carry.best),
        abs_lowest=keep_lowest(absolute, carry.abs_lowest),
        rel_lowest=keep_lowest(relative, carry.rel_lowest),
        best_step=jnp.where(improved, step, carry.best_step),
        steps=jnp.where(active, step, carry.steps),
        finite=carry.finite & (finite | ~active),
        abs_trace=row(carry.abs_trace, absolute),
        rel_trace=row(carry.rel_trace, relative),
    )
    return carry, finished


def _sample(carry: _Carry, sample_steps, i: int):
    """The i-th recorded state; the result itself when the solve ended before that step."""
    reached = carry.step >= sample_steps[i]
    return jax.tree.map(lambda s, best: jnp.where(reached, s[i], best), carry.samples, carry.best)


def _statistics(carry: _Carry, solver: Solver) -> SolverStats:
    lowest = carry.abs_lowest if solver.stop_mode == "abs" else carry.rel_lowest
    end = jnp.maximum(carry.steps - 1, 0)[None]
    absolute, relative = (jnp.take_along_axis(trace, end, axis=0)[0] for trace in (carry.abs_trace, carry.rel_trace))
    status = _unfinished(carry.abs_trace[0], absolute, relative, carry.steps)
    status = jnp.where(lowest < solver.tol, Status.CONVERGED, status)
    status = jnp.where(carry.finite, status, Status.NON_FINITE)

    unused = jnp.arange(solver.max_steps, dtype=jnp.int32)[None] >= carry.steps[:, None]
    return SolverStats(
        abs_lowest=carry.abs_lowest,
        rel_lowest=carry.rel_lowest,
        best_step=carry.best_step,
        steps=carry.steps,
        abs_trace=jnp.where(unused, carry.abs_lowest[:, None], carry.abs_trace.T),
        rel_trace=jnp.where(unused, carry.rel_lowest[:, None], carry.rel_trace.T),
        status=status.astype(jnp.int32),
    )


def _solve_unmonitored(f, z_init, solver, sample_at):
    """`max_steps` steps in one fused loop; only the last residual is measured, samples are the current iterates."""

    def iterate(_, carry):
        z, method = carry
        return solver.step(f, z, f(z), method)

    carry, done, samples = (z_init, solver.init(z_init)), 0, []
    for stop in [*sample_at, solver.max_steps]:
        # The last step is taken apart from the loop: its residual is the one to report.
        carry = jax.lax.fori_loop(done, min(stop, solver.max_steps - 1), iterate, carry)
        done = max(done, min(stop, solver.max_steps - 1))
        samples.append(carry[0])
    z, method = carry
    f_z = f(z)
    last, _ = solver.step(f, z, f_z, method)
    samples = [last if at == solver.max_steps else sample for at, sample in zip(sample_at, samples[:-1], strict=True)]

    stats = statistics_of_traces(*(residual[:, None] for residual in residuals(z, f_z)), solver)
    return Solved(last, tuple(samples), stats, method)


def statistics_of_traces(abs_trace: Float[Array, "B N"], rel_trace: Float[Array, "B N"], solver: Solver) -> SolverStats:
    """Statistics of a solve that took its whole budget and returns its last state, from the residuals that it recorded."""
    trace = abs_trace if solver.stop_mode == "abs" else rel_trace
    status = _unfinished(abs_trace[:, 0], abs_trace[:, -1], rel_trace[:, -1], solver.max_steps)
    status = jnp.where(trace[:, -1] < solver.tol, Status.CONVERGED, status)
    status = jnp.where(jnp.all(jnp.isfinite(trace), axis=1), status, Status.NON_FINITE).astype(jnp.int32)
    steps = jnp.full_like(status, solver.max_steps)
    return SolverStats(abs_trace[:, -1], rel_trace[:, -1], steps, steps, abs_trace, rel_trace, status)


def _unfinished(first, last, relative, steps):
    """Diverged or not, by the first and the last absolute residual, and the last relative one, of a solve of so many steps."""
    # Relative to a state that grows with it, a residual does not grow. But growth by the factor within n steps moves the
    # state by more than 1/n of itself a step; with less, the residual is large because the solution is.
    diverged = (last > DIVERGENCE_FACTOR * first) & (relative * jnp.asarray(steps, relative.dtype) > 1)
    return jnp.where(diverged, Status.DIVERGED, Status.STEP_LIMIT)


def residuals(z: State, f_z: State) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """|f(z) - z| and |f(z) - z| / |f(z)| of every sample."""
    absolute = batched.norm(batched.subtract(f_z, z))
    return absolute, absolute / (batched.norm(f_z) + _EPSILON)


def _unsolved(z_init) -> SolverStats:
    """Statistics of a budget of no evaluations at all."""
    infinite = jnp.full_like(batched.norm(z_init), jnp.inf)
    none = jnp.zeros_like(infinite, jnp.int32)
    empty = jnp.repeat(infinite[:, None], 0, axis=1)
    return SolverStats(infinite, infinite, none, none, empty, empty, jnp.full_like(none, Status.STEP_LIMIT))


def check_samples(sample_at, max_steps):
    """Raises ValueError unless `sample_at` increases within the budget."""
    for step in sample_at:
        require_count("sample_at", step, 0)
    ordered = all(a < b for a, b in itertools.pairwise(sample_at))
    if not ordered or any(not 1 <= s <= max_steps for s in sample_at):
        raise ValueError(f"sample_at={tuple(sample_at)}: must increase and lie between 1 and max_steps={max_steps}.")
