"""Parallel sampling: the joint equilibrium solved in a window that slides over the trajectory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float
from deqjax.core.hoist import hoist
from deqjax.core.solve import solve
from deqjax.core.solvers import Picard, Solver, TriangularAnderson
from deqjax.core.stats import SolverStats, Status
from deqjax.models.ddim.joint import JointSystem, over_images

_EPSILON = 1e-9
# What the options of a solver must be where slots stop by themselves.
_IN_WINDOW = {"stop": "each", "check_every": 1, "return_final": False, "burn_in": 0, "monitor": True}


class Record(NamedTuple):
    """What happened at every iteration: residuals `[N, B, T]` of the slots (NaN outside the window, and once a sample is done),
    and the furthest states so far, `[N, B, H, W, C]`: those at the window's end, which is the image once the window is there.
    """

    residuals: jax.Array
    images: jax.Array


class JointSolution(NamedTuple):
    """A trajectory that was solved for.

    Attributes:
      image: `[B, H, W, C]`, its last slot.
      trajectory: `[B, T, H, W, C]`.
      stats: per sample; a step is one call of the network on all slots of the window, and the residual of a step is that of
        the window's worst slot.
      calls: calls of the network in sequence, those of the slowest sample; products with its Jacobian, and what a line search
        tries, are not counted.
      evaluations: images that the network has seen in these.
      failed_at: `[B]` the first step of the chain at which the network's output was not finite; -1: none.
      record: if asked for.
    """

    image: jax.Array
    trajectory: jax.Array
    stats: SolverStats
    calls: jax.Array
    evaluations: jax.Array
    failed_at: jax.Array
    record: Record | None


class _Carry(NamedTuple):
    step: jax.Array
    start: jax.Array  # [B] first slot of the window
    base: jax.Array  # [B, ...] the state before it, which is final
    z: jax.Array  # [B, W, ...]
    method: Any
    trajectory: jax.Array  # [B, T, ...]
    steps: jax.Array  # [B]
    failed_at: jax.Array  # [B]
    abs_trace: jax.Array  # [B, N]
    rel_trace: jax.Array
    record: Record | None


def solve_joint(
    system: JointSystem,
    x_T: Float[Array, "B H W C"],
    noise: Float[Array, "B T H W C"] | None = None,
    *,
    solver: Solver = TriangularAnderson(),
    window: int = 0,
    z_init: Float[Array, "B T H W C"] | None = None,
    record: bool = False,
) -> JointSolution:
    """Samples a chain in parallel. Not differentiable: see `attach`.

    `TriangularAnderson` and `Picard` iterate on a window of slots. After every iteration its first slot is exact. The leading
    slots whose residuals are all below the tolerance are final: they leave the window and are not computed again, and as many
    enter at its end. So T iterations always suffice. Any other solver of the core takes the trajectory as a whole.

    Args:
      system: the chain and its network.
      x_T: latents.
      noise: standard normal for each step, where the chain has eta > 0.
      solver: method, tolerance and budget `max_steps`. The tolerance applies to every slot, |F(z)_k - z_k| or its ratio to
        |F(z)_k|; with a solver that takes the trajectory as a whole, to the trajectory.
      window: slots that are iterated on at a time; 0: all of them. Rounded up to what the devices share evenly.
      z_init: a trajectory to begin with, such as that of a similar latent; None: the latent in every slot.
      record: keep what happened at every iteration.

    Raises:
      ValueError: the chain needs noise and got none, or the solver cannot work in a window, or not with its options.
    """
    if noise is None and system.chain.sigma.any():
        raise ValueError("a chain with eta > 0 needs noise `[B, T, H, W, C]`, one for each step.")
    if window < 0:
        raise ValueError(f"window={window}: must be 0 (the whole trajectory) or more.")
    start_anew = jnp.repeat(x_T[:, None], len(system.chain), axis=1)
    trajectory = start_anew if z_init is None else z_init
    if check_slot_by_slot(solver):
        return _in_window(system, x_T, noise, solver, window, trajectory, z_init is not None, record)
    if window or record:
        raise ValueError(
            f"{type(solver).__name__} mixes all slots of a trajectory, so it takes neither a window nor a record: use "
            "TriangularAnderson or Picard for these."
        )
    return _as_a_whole(system, x_T, noise, solver, trajectory)


def check_slot_by_slot(solver: Solver) -> bool:
    """Whether a solver works slot by slot, in the order of time; any other takes the trajectory as a whole.

    Raises:
      ValueError: it does, and has an option that has no meaning there.
    """
    if not isinstance(solver, (Picard, TriangularAnderson)) or getattr(solver, "reverse", False):
        return False
    for name, needed in _IN_WINDOW.items():
        if getattr(solver, name) != needed:
            given = f"{type(solver).__name__}({name}={getattr(solver, name)!r})"
            raise ValueError(f"{given}: must be {needed!r} here, where the slots of a trajectory stop one by one.")
    return True


def _as_a_whole(system, x_T, noise, solver, trajectory) -> JointSolution:
    f = system.map(x_T, noise)
    solved = solve(hoist(f, trajectory), trajectory, solver)
    stats, z = solved.stats, solved.value
    inputs = jnp.concatenate([x_T[:, None], z[:, :-1]], axis=1)
    start = jnp.zeros_like(stats.steps)

    def locate():
        finite = system.window(inputs, x_T, start, noise)[1]
        return jnp.where(jnp.all(finite, axis=1), -1, jnp.argmin(finite, axis=1).astype(jnp.int32))

    any_failed = jnp.any(stats.status == Status.NON_FINITE)
    failed_at = jax.lax.cond(any_failed, locate, lambda: jnp.full_like(start, -1))
    calls = jnp.max(stats.steps)
    return JointSolution(z[:, -1], z, stats, calls, calls * z.shape[0] * z.shape[1], failed_at, None)


def _in_window(system, x_T, noise, solver, window, trajectory, warm, record) -> JointSolution:
    B, T = trajectory.shape[:2]
    W = min(window or T, T)
    W = -(-W // system.n_parts) * system.n_parts
    N = min(solver.max_steps, T)

    def iterate(c: _Carry) -> _Carry:
        slots = c.start[:, None] + jnp.arange(W, dtype=jnp.int32)[None]
        within = slots < T
        inputs = jnp.concatenate([c.base[:, None], c.z[:, :-1]], axis=1)
        image, finite = system.window(inputs, c.base, c.start, noise)
        # A slot counts as long as it and all before it are finite; the others stay where they are.
        good = jnp.cumprod((finite & within).astype(jnp.int32), axis=1) > 0
        image = jnp.where(over_images(good), image, c.z)

        absolute, relative = _residuals(c.z, image)
        residual = absolute if solver.stop_mode == "abs" else relative
        active = (c.start < T) & (c.failed_at < 0)
        failed = active & ~good[:, 0]
        is_first = jnp.arange(W)[None] == 0
        final = good & ((residual < solver.tol) | is_first)
        moves = jnp.where(active, jnp.sum(jnp.cumprod(final.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32), 0)

        rows = jnp.arange(B)[:, None]
        # What is written past the end is dropped.
        written = c.trajectory.at[rows, jnp.where(active[:, None] & good, slots, T)].set(image, mode="drop")
        z, method = solver.step(lambda z: image, c.z, image, c.method)
        base, z = _advance(c.base, image, z, moves, written if warm else None, c.start)
        if isinstance(solver, TriangularAnderson):
            method = solver.shift(method, moves)

        seen = active[:, None] & within
        column = lambda trace, r: trace.at[:, c.step].set(jnp.max(jnp.where(seen, r, 0), axis=1))  # noqa: E731
        history = c.record
        if record:
            per_slot = jnp.full((B, T), jnp.nan, residual.dtype).at[rows, jnp.where(seen, slots, T)].set(residual, mode="drop")
            furthest = jnp.minimum(c.start + W, T) - 1
            history = Record(
                history.residuals.at[c.step].set(per_slot), history.images.at[c.step].set(written[rows[:, 0], furthest])
            )
        return _Carry(
            step=c.step + 1,
            start=c.start + moves,
            base=base,
            z=z,
            method=method,
            trajectory=written,
            steps=c.steps + active,
            failed_at=jnp.where(failed, c.start, c.failed_at),
            abs_trace=column(c.abs_trace, absolute),
            rel_trace=column(c.rel_trace, relative),
            record=history,
        )

    def unfinished(c: _Carry):
        return (c.step < N) & jnp.any((c.start < T) & (c.failed_at < 0))

    counts = jnp.zeros_like(x_T[:, 0, 0, 0], jnp.int32)
    z = jnp.concatenate([trajectory, jnp.repeat(trajectory[:, -1:], max(W - T, 0), axis=1)], axis=1)[:, :W]
    traces = jnp.repeat(jnp.zeros_like(x_T[:, 0, 0, 0], batched.accumulation_dtype(x_T))[:, None], N, axis=1)
    empty = None
    if record:
        empty = Record(jnp.full((N, B, T), jnp.nan, traces.dtype), jnp.repeat(jnp.zeros_like(x_T)[None], N, axis=0))
    zero, none = jnp.zeros((), jnp.int32), counts - 1
    begin = _Carry(zero, counts, x_T, z, solver.init(z), trajectory, counts, none, traces, traces, empty)
    c = jax.lax.while_loop(unfinished, iterate, begin)
    return JointSolution(c.trajectory[:, -1], c.trajectory, _statistics(c, T, N), c.step, c.step * B * W, c.failed_at, c.record)


def _advance(base, image, z, moves, known, start):
    """The state before the window, and the window's slots, after it has moved by so many slots.

    Slots that enter begin at what is known of them, or else at the state that was the window's last.
    """
    W = z.shape[1]
    base = jnp.take_along_axis(jnp.concatenate([base[:, None], image], axis=1), over_images(moves[:, None]), axis=1)[:, 0]
    index = jnp.arange(W, dtype=jnp.int32)[None] + moves[:, None]
    kept = jnp.take_along_axis(z, over_images(jnp.minimum(index, W - 1)), axis=1)
    entering = image[:, -1:]
    if known is not None:
        entering = jnp.take_along_axis(known, over_images(jnp.minimum(start[:, None] + index, known.shape[1] - 1)), axis=1)
    return base, jnp.where(over_images(index < W), kept, entering)


def _residuals(z, image):
    """|F(z)_k - z_k| of every slot, `[B, W]`, and its ratio to |F(z)_k|."""
    dtype = batched.accumulation_dtype(z)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(dtype)), axis=(2, 3, 4)))  # noqa: E731
    absolute = norm(image - z)
    return absolute, absolute / (norm(image) + _EPSILON)


def _statistics(c: _Carry, T: int, N: int) -> SolverStats:
    done = c.start >= T
    status = jnp.where(done, Status.CONVERGED, Status.STEP_LIMIT)
    status = jnp.where(c.failed_at >= 0, Status.NON_FINITE, status).astype(jnp.int32)
    last = lambda trace: jnp.take_along_axis(trace, jnp.maximum(c.steps - 1, 0)[:, None], axis=1)[:, 0]  # noqa: E731
    unused = jnp.arange(N, dtype=jnp.int32)[None] >= c.steps[:, None]
    padded = lambda trace: jnp.where(unused, last(trace)[:, None], trace)  # noqa: E731
    absolute, relative = padded(c.abs_trace), padded(c.rel_trace)
    return SolverStats(last(c.abs_trace), last(c.rel_trace), c.steps, c.steps, absolute, relative, status)
