"""Options may be traced, wherever a solve stands, and get no gradient where the solution does not depend on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import DEQ, SHINE, Anderson, Broyden, Implicit, NewtonKrylov, Picard, Reversible, Solver, Unrolled, fixed_point
from deqjax.core import batched
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeping(Solver):
    """A solver of a user's: given the share of z to keep, it stores in a dictionary what moves."""

    keep: Any = 0.5
    names: Any = dataclasses.field(default_factory=lambda: {1: "one", "b": "two"})  # keys that JAX cannot sort
    moving: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "keep", 1 - self.keep)
        object.__setattr__(self, "moving", {"share": self.keep})

    def init(self, z):
        return ()

    def step(self, f, z, f_z, state):
        return batched.mix(z, f_z, self.moving["share"]), state


def test_a_users_solver_is_taken_as_it_was_made(problem):
    W, x = problem

    def value(W, keep):
        solver = Keeping(max_steps=90, tol=1e-12, keep=keep)
        return fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=Implicit(solver=solver))

    steps = fixed_point(cell, jnp.zeros_like(x), W, x, solver=Picard(max_steps=90, tol=1e-12, damping=0.7)).stats.steps
    np.testing.assert_array_equal(value(W, 0.3).stats.steps, steps)
    gradient = jax.grad(jax.jit(lambda W, keep: jnp.sum(value(W, keep).value ** 2)), argnums=(0, 1))
    expected = jax.grad(lambda W: jnp.sum(value(W, 0.3).value ** 2))(W)
    of_W, of_keep = gradient(W, jnp.asarray(0.3))
    np.testing.assert_allclose(of_W, expected, rtol=1e-9)
    assert of_keep == 0


@pytest.mark.parametrize("train", [True, False])
def test_the_damping_of_the_preset_may_be_traced(train):
    def loss(tau):
        deq = DEQ(preset="torchdeq", f_solver="fixed_point_iter", ift=True, f_options={"damping": tau})
        return jnp.sum(deq(lambda z: 0.5 * jnp.cos(z), jnp.zeros((2, 3)), train=train).states[-1])

    assert jax.grad(loss)(0.9) == 0


def test_a_share_of_double_precision_leaves_the_state_in_its_own():
    z = jnp.zeros((2, 3), jnp.bfloat16)
    f = lambda z, w: (w * jnp.cos(z.astype(jnp.float32))).astype(z.dtype)
    value = lambda w, beta: fixed_point(f, z, w, solver=Picard(max_steps=8), gradient=Reversible(beta=beta)).value
    gradient = lambda beta: jax.grad(lambda w: jnp.sum(value(w, beta).astype(jnp.float32)))(jnp.float32(0.5))
    np.testing.assert_array_equal(gradient(np.float64(0.5)), gradient(0.5))
