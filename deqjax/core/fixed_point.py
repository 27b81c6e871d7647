"""fixed_point: solve z = f(z) and attach a gradient to the solution."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from deqjax.core import hoist as hoisting
from deqjax.core.annotations import Array, Float, PyTree
from deqjax.core.gradients import Gradient
from deqjax.core.implicit import Implicit
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import Solver
from deqjax.core.stats import SolverStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """A fixed point.

    Attributes:
      value: state like `z_init`, differentiable in everything that f depends on.
      states: states to supervise, earliest first; the last is `value` (more than one only with a sampling `Phantom`).
      samples: detached best iterates at the steps asked for by `sample_at`.
      stats: how the solve went, per sample.
    """

    value: PyTree
    states: tuple
    samples: tuple
    stats: SolverStats


def fixed_point(
    f: Callable[..., PyTree],
    z_init: PyTree,
    *args: Any,
    solver: Solver = Anderson(),
    gradient: Gradient = Implicit(),
    batch_axis: int | None = 0,
    sample_at: Sequence[int] = (),
    adjoint_probe: Float[Array, " 6"] | None = None,
) -> Solution:
    """Solves z = f(z, *args) for a batch of states and makes the solution differentiable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from deqjax import fixed_point
      >>> W = 0.05 * jax.random.normal(jax.random.key(0), (16, 16))
      >>> x = jnp.ones((4, 16))
      >>> loss = lambda W: fixed_point(lambda z: jnp.tanh(z @ W + x), jnp.zeros_like(x)).value.sum()
      >>> jax.grad(loss)(W).shape
      (16, 16)

    Args:
      f: `f(z, *args) -> z`, keeping structure, shapes and dtypes of the state. It may close over anything, parameters
        being differentiated, integer arrays and random keys included.
      z_init: where to start: any pytree of floating point leaves.
      *args: further arguments of f; gradients flow to them.
      solver: of the forward problem.
      gradient: the rule that gives the value its gradient. No rule but `Unrolled` gives one to `z_init`.
      batch_axis: 0 if every leaf is `[B, ...]` and samples are independent; None if the whole state is one problem.
      sample_at: steps at which to record the best iterate.
      adjoint_probe: see `deqjax.core.gradients.adjoint_probe`.

    Returns:
      A `Solution`. With `Implicit()` its value is f(z) at the solver's result z (see `Implicit.polish`).

    Raises:
      TypeError: f does not map states to states, or a leaf is not floating point. Numbers never raise: see
        `Solution.stats`.
      ValueError: leaves do not share the batch axis, or `sample_at` does not fit the solver's budget.
    """
    if batch_axis not in (0, None):
        raise ValueError(f"batch_axis={batch_axis!r}: must be 0 (samples along the leading axis) or None (one problem).")
    z_init = hoisting.as_state(z_init)
    if batch_axis is None:
        # A leading axis of one sample; every operation below is then the same.
        batched_f = lambda z: _add_axis(f(_drop_axis(z), *args))  # noqa: E731
        z_init = _add_axis(z_init)
    else:
        _check_batch(z_init)
        batched_f = lambda z: f(z, *args)  # noqa: E731

    hoisted = hoisting.hoist(batched_f, z_init)
    solved = gradient.solve(hoisted, z_init, solver, sample_at)
    states, samples = gradient.attach(hoisted, solved.value, adjoint_probe, solved.method), solved.samples
    if batch_axis is None:
        states, samples = _drop_axis(states), _drop_axis(samples)
    return Solution(value=states[-1], states=states, samples=samples, stats=solved.stats)


def _add_axis(tree):
    return jax.tree.map(lambda x: x[None], tree)


def _drop_axis(tree):
    return jax.tree.map(lambda x: x[0], tree)


def _check_batch(z):
    leaves = jax.tree_util.tree_leaves_with_path(z)
    if not leaves:
        raise ValueError("z_init has no leaves: there is nothing to solve for.")
    sizes = {jax.tree_util.keystr(path): (x.shape[0] if x.ndim else None) for path, x in leaves}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        raise ValueError(
            f"every leaf of z_init needs the same leading batch axis, but their lengths are {sizes}. "
            "If the whole state is one problem, pass batch_axis=None."
        )
