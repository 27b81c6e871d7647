"""How gradients get from a fixed point to whatever f depends on.

Each rule takes the detached solution and returns differentiable states in its place. The forward solve itself is never
differentiated, except by `Unrolled`. The implicit rule has a file of its own, `implicit.py`; so has `reversible.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, State
from deqjax.core.hoist import Hoisted
from deqjax.core.solve import Solved, check_samples, residuals, solve, statistics_of_traces
from deqjax.core.solvers.base import Solver, require_count
from deqjax.core.stats import SolverStats


def damped(f: Callable[[State], State], damping: float | Array) -> Callable[[State], State]:
    """z -> (1 - damping) z + damping f(z)."""
    return lambda z: batched.mix(z, f(z), damping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """A rule; subclass and write `attach`."""

    @property
    def n_states(self) -> int:
        """How many states `attach` returns."""
        return 1

    def solve(self, f: Hoisted, z_init: State, solver: Solver, sample_at: Sequence[int] = ()) -> Solved:
        """The forward solve, without gradients."""
        return solve(f.detached(), jax.lax.stop_gradient(z_init), solver, sample_at)

    def attach(
        self, f: Hoisted, z_hat: State, probe: Float[Array, " 6"] | None = None, method: Any = None
    ) -> tuple[State, ...]:
        """Differentiable states at the solution; the last one is the result, earlier ones are for supervision.

        Args:
          f: the map.
          z_hat: the detached solution.
          probe: see `adjoint_probe`.
          method: what the forward solver knows at the end, for rules that use it.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantom(Gradient):
    """Backpropagation through a few damped steps taken from the detached solution (Geng et al. 2021).

    Attributes:
      steps: differentiable applications k.
      damping: z <- (1 - damping) z + damping f(z); TorchDEQ's tau.
      sample_every: return the states after every so many steps, for supervision (`sup_gap`; 0: only the last state).
      sample_at: return the states after these steps, then the last one (`sup_loc`).
      remat: recompute each application in the backward pass instead of storing its activations.
    """

    steps: int = 1
    damping: float = 1.0
    sample_every: int = 0
    sample_at: Sequence[int] = ()
    remat: bool = False

    def __post_init__(self):
        require_count("steps", self.steps, 1)  # with none, nothing gets a gradient
        if any(not 1 <= k <= self.steps for k in self.sample_at):
            raise ValueError(f"Phantom(steps={self.steps}, sample_at={tuple(self.sample_at)}): steps outside 1..{self.steps}.")

    @property
    def n_states(self) -> int:
        return len(self._supervised())

    def attach(self, f, z_hat, probe=None, method=None):
        if self.remat:
            # Inside a scan nothing could undo the recomputation, so its guard is left out there.
            again = jax.checkpoint(f.function, prevent_cse=self.steps == 1)
            f = Hoisted(again, f.constants)
        step = damped(f, self.damping)
        wanted = self._supervised()
        if wanted == (1,):
            return (step(z_hat),)
        if len(wanted) == 1:
            last, _ = jax.lax.scan(lambda z, _: (step(z), None), z_hat, length=wanted[0])
            return (last,)

        def keep(z, _):
            z = step(z)
            return z, z

        _, states = jax.lax.scan(keep, z_hat, length=wanted[-1])
        return tuple(jax.tree.map(lambda s, k=k: s[k - 1], states) for k in wanted)

    def _supervised(self) -> tuple[int, ...]:
        """The steps whose states are returned."""
        if self.sample_every > 0:
            return tuple(range(self.sample_every, self.steps + 1, self.sample_every)) or (self.steps,)
        return (*sorted(self.sample_at), self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(Phantom):
    """The Jacobian-free gradient: one differentiable application at the solution (Fung et al. 2022)."""

    steps: int = dataclasses.field(default=1, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Backpropagation through every step of the solver, all `max_steps` of them: exact for the computation as it is, except
    that a line search's step length counts as a constant, and Newton's inner linear solves as exact.

    Attributes:
      remat: recompute each step in the backward pass; memory is then one state per step.
    """

    remat: bool = False

    def solve(self, f, z_init, solver, sample_at=()):
        def step(carry, _):
            z, method = carry
            f_z = f(z)
            carry = solver.step(f, z, f_z, method)
            return carry, (f_z if solver.candidate == "image" else z, residuals(*jax.lax.stop_gradient((z, f_z))))

        check_samples(sample_at, solver.max_steps)
        if solver.max_steps == 0:
            return solve(f, z_init, solver)
        step = jax.checkpoint(step) if self.remat else step
        carry = (z_init, solver.init(z_init))
        (_, method), (states, traces) = jax.lax.scan(step, carry, length=solver.max_steps)
        samples = tuple(jax.tree.map(lambda s, k=k: jax.lax.stop_gradient(s[k - 1]), states) for k in sample_at)
        stats = statistics_of_traces(*(jnp.moveaxis(trace, 0, 1) for trace in traces), solver)
        return Solved(jax.tree.map(lambda s: s[-1], states), samples, stats, method)

    def attach(self, f, z_hat, probe=None, method=None):
        return (z_hat,)


# The order of entries in an adjoint probe.
PROBE_ENTRIES = ("abs", "rel", "steps", "converged", "non_finite", "samples")


def adjoint_probe(dtype=jnp.float32) -> Float[Array, " 6"]:
    """Zeros to pass as `fixed_point(..., adjoint_probe=...)`.

    Statistics of the backward solve exist only while a gradient is being computed. The "gradient" with respect to this
    array is defined to be those statistics, summed over samples and solves, in the order of `PROBE_ENTRIES`.
    """
    return jnp.zeros((len(PROBE_ENTRIES),), dtype)


def measured(stats: SolverStats) -> Float[Array, " 6"]:
    """The statistics of one backward solve as the gradient of a probe."""
    sums = stats.sums()
    return jnp.stack([sums[entry] for entry in PROBE_ENTRIES]).astype(jnp.float32)
