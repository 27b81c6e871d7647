"""How gradients get from a fixed point to whatever f depends on.

Each rule takes the detached solution and returns differentiable states in its place. The forward solve itself is never
differentiated, except by `Unrolled`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, State
from deqjax.core.hoist import Hoisted
from deqjax.core.solve import solve
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import Solver
from deqjax.core.stats import SolverStats


def damped(f: Callable[[State], State], damping: float | Array) -> Callable[[State], State]:
    """z -> (1 - damping) z + damping f(z)."""
    return lambda z: batched.mix(z, f(z), damping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """A rule; subclass and write `attach`."""

    def solve(
        self, f: Hoisted, z_init: State, solver: Solver, sample_at: Sequence[int] = ()
    ) -> tuple[State, tuple[State, ...], SolverStats]:
        """The forward solve, without gradients."""
        return solve(f.detached(), jax.lax.stop_gradient(z_init), solver, sample_at)

    def attach(self, f: Hoisted, z_hat: State, probe: Float[Array, " 6"] | None = None) -> tuple[State, ...]:
        """Differentiable states at the solution `z_hat`; the last one is the result, earlier ones are for supervision."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Gradient):
    """The implicit function theorem: with cotangent c at z*, solve u = J^T u + c and return u^T df/dtheta.

    Exact at convergence, with memory independent of the number of steps (Bai et al. 2019, section 3.2). The adjoint
    system is linear and is solved as a fixed point by any solver, in relative tolerance by default, so that the
    gradient does not depend on the scale of the loss. Differentiable again in reverse mode.

    Attributes:
      solver: of the adjoint system.
      polish: return f(z*), one application past the solver's result; it costs nothing when differentiating.
      jacobian_at: "point" takes J at z* ("hook_ift" in TorchDEQ), "image" at f(z*) with one more evaluation of f (its
        "ift"). They agree at convergence.
    """

    solver: Solver = Anderson(max_steps=40, tol=1e-6)
    polish: bool = True
    jacobian_at: str = "point"

    def attach(self, f, z_hat, probe=None):
        function, captured = f
        floating = [jnp.issubdtype(c.dtype, jnp.inexact) for c in captured]
        smooth = [c for c, is_float in zip(captured, floating, strict=True) if is_float]
        fixed = [c for c, is_float in zip(captured, floating, strict=True) if not is_float]

        def rebuild(smooth, fixed) -> Hoisted:
            remaining = (iter(fixed), iter(smooth))
            return Hoisted(function, [next(remaining[is_float]) for is_float in floating])

        @jax.custom_vjp
        def state(smooth, fixed, z, probe):
            return rebuild(smooth, fixed)(z) if self.polish else z

        def forward(smooth, fixed, z, probe):
            # The identity in value. Differentiating this rule again, z moves with the parameters as it should.
            z = dataclasses.replace(self, polish=False).attach(rebuild(smooth, fixed), z)[-1]
            image, pullback = jax.vjp(lambda smooth, z: rebuild(smooth, fixed)(z), smooth, z)
            at_image = (smooth, fixed, image) if self.jacobian_at == "image" else None
            return (image if self.polish else z), (pullback, at_image, probe)

        def backward(residuals, cotangent):
            pullback, at_image, probe = residuals
            jacobian_transposed = lambda u: pullback(u)[1]  # noqa: E731
            if at_image is not None:
                smooth, fixed, image = at_image
                vjp_at_image = jax.vjp(rebuild(smooth, fixed), image)[1]
                jacobian_transposed = lambda u: vjp_at_image(u)[0]  # noqa: E731
            u, stats = self._solve_adjoint(jacobian_transposed, cotangent)
            return pullback(u)[0], None, None, None if probe is None else _measured(stats)

        state.defvjp(forward, backward)
        return (state(smooth, fixed, z_hat, probe),)

    def _solve_adjoint(self, jacobian_transposed, cotangent):
        from deqjax.core.fixed_point import fixed_point

        solution = fixed_point(
            lambda u: jax.tree.map(jnp.add, jacobian_transposed(u), cotangent),
            jax.tree.map(jnp.zeros_like, cotangent),
            solver=self.solver,
            gradient=dataclasses.replace(self, polish=False),
        )
        return solution.value, solution.stats


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

    def attach(self, f, z_hat, probe=None):
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
        if any(not 1 <= k <= self.steps for k in self.sample_at):
            raise ValueError(f"Phantom(steps={self.steps}, sample_at={tuple(self.sample_at)}): steps outside 1..{self.steps}.")
        return (*sorted(self.sample_at), self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStep(Phantom):
    """The Jacobian-free gradient: one differentiable application at the solution (Fung et al. 2022)."""

    steps: int = dataclasses.field(default=1, init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Backpropagation through every step of the solver, all `max_steps` of them: exact for the computation as it is.

    Attributes:
      remat: recompute each step in the backward pass; memory is then one state per step.
    """

    remat: bool = False

    def solve(self, f, z_init, solver, sample_at=()):
        def step(carry, _):
            z, method = carry
            f_z = f(z)
            # The f that a line search evaluates carries no gradients: a step length is a constant of the computation.
            return solver.step(f.detached(), z, f_z, method), f_z if solver.candidate == "image" else z

        if solver.max_steps == 0:
            return solve(f, z_init, solver)
        step = jax.checkpoint(step) if self.remat else step
        carry = (z_init, solver.init(z_init))
        _, states = jax.lax.scan(step, carry, length=solver.max_steps)
        samples = tuple(jax.tree.map(lambda s, k=k: s[k - 1], states) for k in sample_at)
        # The statistics are those of the same solve run without gradients; equal subexpressions cost nothing extra.
        fixed_budget = dataclasses.replace(solver, return_final=True)
        _, _, stats = solve(f.detached(), jax.lax.stop_gradient(z_init), fixed_budget)
        return jax.tree.map(lambda s: s[-1], states), samples, stats

    def attach(self, f, z_hat, probe=None):
        return (z_hat,)


# The order of entries in an adjoint probe.
PROBE_ENTRIES = ("abs", "rel", "steps", "converged", "non_finite", "samples")


def adjoint_probe(dtype=jnp.float32) -> Float[Array, " 6"]:
    """Zeros to pass as `fixed_point(..., adjoint_probe=...)`.

    Statistics of the backward solve exist only while a gradient is being computed. The "gradient" with respect to this
    array is defined to be those statistics, summed over samples and solves, in the order of `PROBE_ENTRIES`.
    """
    return jnp.zeros((len(PROBE_ENTRIES),), dtype)


def _measured(stats: SolverStats):
    sums = stats.sums()
    return jnp.stack([sums[entry] for entry in PROBE_ENTRIES]).astype(jnp.float32)
