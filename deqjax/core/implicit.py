"""Gradients by the implicit function theorem."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import State
from deqjax.core.gradients import Gradient, measured
from deqjax.core.hoist import Hoisted, hoist
from deqjax.core.solve import solve
from deqjax.core.solvers.anderson import Anderson
from deqjax.core.solvers.base import Solver, require, split_options
from deqjax.core.solvers.krylov import LinearSolver
from deqjax.core.solvers.picard import Picard
from deqjax.core.solvers.shine import SHINE
from deqjax.core.stats import SolverStats, Status


def Neumann(terms: int) -> Picard:
    """The first terms c + J^T c + (J^T)^2 c + ... of the adjoint solution, as `Implicit(solver=Neumann(terms))`."""
    return Picard(max_steps=terms, monitor=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit(Gradient):
    """The implicit function theorem: with cotangent c at z*, solve u = J^T u + c and return u^T df/dtheta.

    Exact at convergence, with memory independent of the number of steps (Bai et al. 2019, section 3.2). The adjoint
    system is linear: any solver of fixed points does it, a `Neumann` series, a Krylov method (`GMRES`, `BiCGSTAB`,
    `NormalCG`), or `SHINE`. Tolerances are relative by default, so that the gradient does not
    depend on the scale of the loss. Differentiable again, in reverse mode.

    Attributes:
      solver: of the adjoint system.
      polish: return f(z*), one application past the solver's result, where it is finite; it costs nothing when
        differentiating.
      jacobian_at: "point" takes J at z* ("hook_ift" in TorchDEQ), "image" at f(z*) with one more evaluation of f (its
        "ift"). They agree at convergence.
      forward_mode: give `jvp`, `hessian` and forward-over-reverse as well, at the cost of the adjoint statistics: there is
        then no probe.
    """

    solver: Solver | LinearSolver | SHINE = Anderson(max_steps=40, tol=1e-6)
    polish: bool = True
    jacobian_at: str = "point"
    forward_mode: bool = False

    def __post_init__(self):
        kinds = (Solver, LinearSolver, SHINE)
        require(isinstance(self.solver, kinds), "solver", self.solver, "a solver such as Anderson(max_steps=40) or GMRES()")
        if isinstance(self.solver, Solver):
            require(self.solver.max_steps >= 1, "max_steps", self.solver.max_steps, "1 or more, or nothing gets a gradient")
        require(self.jacobian_at in ("point", "image"), "jacobian_at", self.jacobian_at, '"point" or "image"')
        if self.forward_mode and (self.jacobian_at == "image" or isinstance(self.solver, SHINE)):
            raise ValueError('forward_mode needs jacobian_at="point" and a solver that is not SHINE.')

    def attach(self, f, z_hat, probe=None, method=None):
        smooth, fixed, rebuild = f.split()
        if self.forward_mode:
            return (self._with_tangents(rebuild, smooth, fixed, z_hat),)
        return (self._with_adjoint(rebuild, smooth, fixed, z_hat, probe, jax.lax.stop_gradient(method)),)

    def _value(self, z: State, f: Callable[[State], State]) -> State:
        if not self.polish:
            return z
        image = f(z)
        # The image of a sample that ended in NaN may be that very NaN; z is finite.
        return batched.select(jnp.isfinite(batched.norm(image)), image, z)

    # Reverse mode ----------------------------------------------------------------------------------------------------

    def _with_adjoint(self, rebuild, smooth, fixed, z_hat, probe, method):
        options, with_options = split_options(self)

        @jax.custom_vjp
        def state(smooth, fixed, options, z, probe, method):
            return self._value(z, rebuild(smooth, fixed))

        def forward(smooth, fixed, options, z, probe, method):
            # The identity in value. Differentiating this rule again, z moves with the parameters as it should.
            again = dataclasses.replace(with_options(options), polish=False)
            z = again.attach(rebuild(smooth, fixed), z, None, method)[-1]
            image, pullback = jax.vjp(lambda smooth, z: rebuild(smooth, fixed)(z), smooth, z)
            at_image = (smooth, fixed, image) if self.jacobian_at == "image" else None
            return self._value(z, lambda _: image), (pullback, at_image, options, probe, method)

        def backward(residuals, cotangent):
            pullback, at_image, options, probe, method = residuals
            jacobian_transposed = lambda u: pullback(u)[1]  # noqa: E731
            if at_image is not None:
                smooth, fixed, image = at_image
                vjp_at_image = jax.vjp(rebuild(smooth, fixed), image)[1]
                jacobian_transposed = lambda u: vjp_at_image(u)[0]  # noqa: E731
            u, stats = with_options(options)._solve_adjoint(jacobian_transposed, cotangent, method)
            return pullback(u)[0], None, None, None, None if probe is None else measured(stats), None

        state.defvjp(forward, backward)
        return state(smooth, fixed, jax.lax.stop_gradient(options), z_hat, probe, method)

    def _solve_adjoint(self, jacobian_transposed, cotangent, method) -> tuple:
        """u = J^T u + c, itself differentiable, and the statistics of the solve."""
        linear = hoist(jacobian_transposed, cotangent)
        u, stats = self._solve_linear(linear, cotangent, method)
        if isinstance(self.solver, SHINE):
            # The adjoint of this system has the Jacobian itself.
            method = self.solver.transposed(method)
        return dataclasses.replace(self, polish=False).attach(linear.plus(cotangent), u, None, method)[-1], stats

    def _solve_linear(self, linear: Hoisted, c: State, method=None) -> tuple[State, SolverStats]:
        """u = A u + c without gradients."""
        linear, c = linear.detached(), jax.lax.stop_gradient(c)
        solver = self.solver.solver if isinstance(self.solver, SHINE) else self.solver
        if isinstance(solver, Solver) and solver.stop_mode == "abs":
            return self._solve_as_it_is(linear, c, method)
        # The system is linear, so its size is free. Squares of numbers much smaller or larger than 1 would leave the dtype's
        # range, and relative residuals have a floor.
        size = batched.largest(c)
        extreme = ((size < 1e-8) | (size > 1e8)) & (size > 0) & jnp.isfinite(size)
        size = jnp.where(extreme, size, 1)
        by_sample = lambda operation, tree: jax.tree.map(  # noqa: E731
            lambda x: operation(x.astype(size.dtype), batched.per_sample(size, x)).astype(x.dtype), tree
        )
        u, stats = self._solve_as_it_is(linear, by_sample(jnp.divide, c), method)
        absolute = {"abs_lowest": stats.abs_lowest * size, "abs_trace": stats.abs_trace * size[:, None]}
        return by_sample(jnp.multiply, u), dataclasses.replace(stats, **absolute)

    def _solve_as_it_is(self, linear, c, method):
        if not isinstance(self.solver, Solver):
            return self.solver.solve(linear, c, method)
        solved = solve(linear.plus(c), jax.tree.map(jnp.zeros_like, c), self.solver)
        # Where c is not finite nothing is, and the zeros of the start would hide that.
        nothing = (solved.stats.status == Status.NON_FINITE) & (solved.stats.best_step == 0)
        return batched.select(nothing, c, solved.value), solved.stats

    # Forward mode ----------------------------------------------------------------------------------------------------

    def _with_tangents(self, rebuild, smooth, fixed, z_hat):
        options, with_options = split_options(self)

        @jax.custom_jvp
        def state(smooth, fixed, options, z):
            return self._value(z, rebuild(smooth, fixed))

        @state.defjvp
        def tangent(primals, tangents):
            smooth, fixed, options, z = primals
            rule = with_options(options)
            z = dataclasses.replace(rule, polish=False).attach(rebuild(smooth, fixed), z)[-1]
            image, pushforward = jax.linearize(lambda smooth, z: rebuild(smooth, fixed)(z), smooth, z)
            still = jax.tree.map(jnp.zeros_like, smooth)
            # dz = J dz + (df/dtheta) dtheta.
            explicit = pushforward(tangents[0], jax.tree.map(jnp.zeros_like, z))
            # A leaf that no parameter moves is a constant here, and a linear solve has no transpose in some leaves alone.
            explicit = batched.interdependent(explicit)
            residual_map = lambda dz: batched.subtract(dz, pushforward(still, dz))  # noqa: E731

            def solve_residual(residual_map, b):
                return rule._solve_linear(hoist(lambda u: batched.subtract(u, residual_map(u)), b), b)[0]

            dz = jax.lax.custom_linear_solve(residual_map, explicit, solve_residual, solve_residual)
            return self._value(z, lambda _: image), dz

        return state(smooth, fixed, jax.lax.stop_gradient(options), z_hat)
