"""Options may be traced, wherever a solve stands, and get no gradient where the solution does not depend on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import SHINE, Anderson, Broyden, Implicit, NewtonKrylov, Picard, Reversible, Unrolled, fixed_point
from tests.core.test_fixed_point import cell

# (solver, rule) of a tolerance and a damping.
RULES = {
    "implicit": lambda tol, tau: (
        Anderson(max_steps=60, tol=tol, damping=tau),
        Implicit(solver=Picard(max_steps=90, tol=tol, damping=tau)),
    ),
    "forward_mode": lambda tol, tau: (
        Picard(max_steps=90, tol=tol, damping=tau),
        Implicit(solver=NewtonKrylov(tol=tol), forward_mode=True),
    ),
    "shine": lambda tol, tau: (
        Broyden(max_steps=60, tol=tol, memory=None),
        Implicit(solver=SHINE(refine=20, solver=Anderson(tol=tol, damping=tau))),
    ),
    "reversible": lambda tol, tau: (Picard(max_steps=40, tol=tol, damping=tau), Reversible()),
}
TRANSFORMATIONS = {
    "jit inside": lambda loss: lambda W, tol: jax.grad(jax.jit(loss))(W, tol),
    "jit on both sides": lambda loss: lambda W, tol: jax.jit(jax.grad(jax.jit(loss)))(W, tol),
    "remat": lambda loss: lambda W, tol: jax.grad(jax.checkpoint(loss))(W, tol),
    "scan": lambda loss: (
        lambda W, tol: jax.grad(
            lambda W: jax.lax.scan(lambda total, tol: (total + loss(W, tol), None), jnp.zeros(()), tol[None])[0]
        )(W)
    ),
    "vmap": lambda loss: lambda W, tol: jax.grad(lambda W: jnp.sum(jax.vmap(loss, (None, 0))(W, tol[None])))(W),
}


@pytest.mark.parametrize("name", RULES)
def test_a_traced_tolerance_under_nested_transformations(name, problem):
    W, x = problem

    def loss(W, tol):
        solver, rule = RULES[name](tol, 0.9)
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=rule).value ** 2)

    expected = jax.grad(loss)(W, 1e-10)
    for transformed in TRANSFORMATIONS.values():
        np.testing.assert_allclose(transformed(loss)(W, jnp.asarray(1e-10)), expected, rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_solution_has_no_gradient_in_how_it_was_found(name, problem):
    W, x = problem

    def loss(options):
        solver, rule = RULES[name](*options)
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=rule).value ** 2)

    assert jax.grad(loss)((jnp.asarray(1e-8), jnp.asarray(0.9))) == (0, 0)


def test_an_unrolled_solve_has_a_gradient_in_its_damping(problem):
    W, x = problem

    def value(tau):
        solver = Picard(max_steps=3, damping=tau)
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=Unrolled()).value ** 2)

    numerical = (value(0.7 + 1e-6) - value(0.7 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(value)(0.7), numerical, rtol=1e-7)
