"""fixed_point: solve z = f(z) and attach a gradient to the solution."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deqjax.core import hoist as hoisting
from deqjax.core.annotations import Array, Float, PyTree
from deqjax.core.gradients import PROBE_ENTRIES, Gradient
from deqjax.core.implicit import Implicit
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import Solver, require_solver
from deqjax.core.stats import SolverStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """A fixed point.

    Attributes:
      value: state like `z_init`, differentiable in everything that f depends on.
      states: states to supervise, earliest first; the last is `value` (more than one only with a sampling `Phantom`).
      samples: detached iterates at the steps asked for by `sample_at`: the best so far, or with `Unrolled` and
        `monitor=False`, which do not look for it, the last.
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
      gradient: the rule that gives the value its gradient. No rule but `Unrolled` and `Reversible` gives one to
        `z_init`.
      batch_axis: which axis of every leaf counts independent samples; None if the whole state is one problem. The solver
        works with that axis first, so any but 0 costs a transposition in every step unless the compiler can fold it away.
      sample_at: steps at which to record the best iterate.
      adjoint_probe: see `deqjax.core.gradients.adjoint_probe`.

    Returns:
      A `Solution`. With `Implicit()` its value is f(z) at the solver's result z (see `Implicit.polish`).

    Raises:
      TypeError: f does not map states to states, or a leaf is not floating point. Numbers never raise: see
        `Solution.stats`.
      ValueError: leaves do not share the batch axis, `sample_at` does not fit the solver's budget, or the probe is none.
    """
    require_solver(solver)
    if not isinstance(gradient, Gradient):
        raise TypeError(f"gradient={gradient!r}: must be a Gradient such as Implicit().")
    if adjoint_probe is not None and getattr(adjoint_probe, "shape", None) != (len(PROBE_ENTRIES),):
        raise ValueError(f"adjoint_probe={adjoint_probe!r}: must be the array that deqjax.adjoint_probe() makes.")
    z_init = hoisting.as_state(z_init)
    inward, outward = _to_batch_first(z_init, batch_axis)
    z_init = inward(z_init)
    # Checked in the caller's layout, of which the error speaks.
    image = lambda z: hoisting.as_image(z, f(z, *args))  # noqa: E731
    hoisted = hoisting.hoist(lambda z: inward(image(outward(z))), z_init)
    solved = gradient.solve(hoisted, z_init, solver, sample_at)
    states, samples = gradient.attach(hoisted, solved.value, adjoint_probe, solved.method), solved.samples
    states, samples = outward(states), outward(samples)
    return Solution(value=states[-1], states=states, samples=samples, stats=solved.stats)


def _to_batch_first(z, batch_axis):
    """The maps from the caller's layout to one with the samples along axis 0, and back."""
    if batch_axis is None:
        # One sample; every operation is then the same.
        inward, outward = (lambda tree, i=i: jax.tree.map(lambda x: x[i], tree) for i in (None, 0))
        hoisting.check_batch(inward(z))
        return inward, outward
    hoisting.check_batch(z, batch_axis)
    if batch_axis == 0:
        return lambda tree: tree, lambda tree: tree

    def moved(source, destination):
        return lambda tree: jax.tree.map(lambda x: jnp.moveaxis(x, source, destination), tree)

    return moved(batch_axis, 0), moved(0, batch_axis)
