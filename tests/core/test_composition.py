"""Fixed points inside what JAX offers: transformations, meshes, donation, other module systems."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deqjax import (
    GMRES,
    SHINE,
    Anderson,
    BiCGSTAB,
    Broyden,
    Implicit,
    NewtonKrylov,
    NormalCG,
    Phantom,
    Picard,
    Reversible,
    Status,
    fixed_point,
)
from deqjax.core.solve import solve
from tests.training.lowering import lowers_everywhere

SOLVERS = [Picard(tol=1e-6), Anderson(tol=1e-6), Broyden(tol=1e-6)]


def named(value):
    return type(value).__name__


def cell(z, W, x):
    return jnp.tanh(z @ W + x)


@pytest.mark.parametrize("rule", [Implicit(), Implicit(forward_mode=True), Phantom(steps=5), Reversible()], ids=named)
def test_under_remat_inside_a_scan_inside_jit(rule, problem):
    """A recurrence whose every step is an equilibrium; recomputing it in the backward pass changes nothing."""
    W, x = problem

    def loss(W, wrap):
        def step(h, x_t):
            f = lambda z: jnp.tanh(z @ W + h + x_t)
            z = fixed_point(f, jnp.zeros_like(h), solver=Anderson(max_steps=30, tol=1e-9), gradient=rule).value
            return 0.5 * z, jnp.sum(z**2)

        return jnp.sum(jax.lax.scan(wrap(step), jnp.zeros_like(x), jnp.stack([x, -x, x]))[1])

    plain = jax.jit(jax.grad(lambda W: loss(W, lambda step: step)))(W)
    again = jax.jit(jax.grad(lambda W: loss(W, jax.checkpoint)))(W)
    assert np.any(plain != 0)
    np.testing.assert_allclose(again, plain, rtol=1e-10)


@pytest.mark.parametrize("rule", [Implicit(), Implicit(forward_mode=True), Phantom(steps=4)], ids=named)
def test_vmap_over_problems_of_different_difficulty(rule):
    """Each of a batch of problems, parameters and all, ends as if it were alone, and so do the gradients."""
    Ws = jnp.asarray([0.1, 0.4, 0.7])[:, None, None] * jnp.eye(4)[None] + 0.05
    xs = jax.random.normal(jax.random.key(0), (3, 2, 4), jnp.float64)

    def total(W, x):
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=Broyden(tol=1e-9), gradient=rule).value ** 2)

    together = jax.jit(jax.vmap(jax.grad(total)))(Ws, xs)
    alone = jnp.stack([jax.jit(jax.grad(total))(W, x) for W, x in zip(Ws, xs, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_hessians_against_finite_differences():
    x = jax.random.normal(jax.random.key(0), (2, 3), jnp.float64)

    def loss(theta, rule):
        f = lambda z: jnp.tanh(theta[0] * z[:, ::-1] + theta[1] * x)
        return jnp.sum(fixed_point(f, jnp.zeros_like(x), solver=Anderson(max_steps=40, tol=1e-13), gradient=rule).value ** 3)

    theta, h = jnp.asarray([0.4, 0.8]), 1e-5
    adjoint = Anderson(max_steps=40, tol=1e-13)
    cases = (
        (Implicit(solver=adjoint), lambda f: jax.jacrev(jax.grad(f))),
        (Implicit(solver=adjoint, forward_mode=True), jax.hessian),
        (Implicit(solver=adjoint, forward_mode=True), lambda f: jax.jacfwd(jax.jacfwd(f))),
    )
    for rule, hessian in cases:
        of_theta = functools.partial(loss, rule=rule)
        gradient = jax.jit(jax.grad(of_theta))
        numeric = jnp.stack([(gradient(theta + h * e) - gradient(theta - h * e)) / (2 * h) for e in jnp.eye(2)])
        np.testing.assert_allclose(jax.jit(hessian(of_theta))(theta), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Auto, P("data", "model")), (AxisType.Auto, P(None, "model")), (AxisType.Explicit, P("data", None))],
    ids=str,
)
def test_meshes_over_samples_and_features(solver, kind, spec, problem):
    """Values and gradients are those of one device, and the result stays where the start was."""
    W, _ = problem
    x = jax.random.normal(jax.random.key(4), (8, 8), jnp.float64)

    @jax.jit
    def value_and_gradient(W, x):
        def loss(W):
            solution = fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver)
            return jnp.sum(solution.value**2), (solution.value, solution.stats.steps)

        return jax.grad(loss, has_aux=True)(W)

    gradient, (value, steps) = value_and_gradient(W, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        layout = NamedSharding(mesh, spec)
        placed = jax.device_put(W, NamedSharding(mesh, P(None, None))), jax.device_put(x, layout)
        gradient_there, (value_there, steps_there) = value_and_gradient(*placed)
    np.testing.assert_allclose(value_there, value, atol=1e-12)
    np.testing.assert_allclose(gradient_there, gradient, atol=1e-11)
    np.testing.assert_array_equal(steps_there, steps)
    assert value_there.sharding.is_equivalent_to(layout, 2)


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_a_warm_start_may_be_donated(solver, problem):
    W, x = problem
    run = functools.partial(jax.jit, donate_argnums=0)(lambda z: fixed_point(cell, z, W, x, solver=solver))
    z = jnp.zeros_like(x)
    first = run(z)
    assert z.is_deleted()
    expected, steps = np.asarray(first.value), np.asarray(first.stats.steps)
    again = run(first.value)
    assert np.all(again.stats.steps < steps)
    np.testing.assert_allclose(again.value, expected, atol=1e-5)


@pytest.mark.parametrize("solver", [*SOLVERS, NewtonKrylov(tol=1e-6)], ids=named)
def test_leaves_of_mixed_dtype_and_rank(solver):
    """Residuals count every leaf; each keeps its dtype; gradients reach through all of them."""

    def solve(w):
        def f(state):
            mean = jnp.mean(state["image"], axis=(1, 2)).astype(jnp.bfloat16)
            image = jnp.tanh(w * state["image"] + state["scalar"].astype(jnp.float32)[:, None, None])
            scalar = (
                state["scalar"] * 0.25 + jnp.sum(mean[:, None] * 0.01, axis=1).astype(jnp.float64) + state["row"][:, 0]
            ) * 0.5
            return {"image": image, "scalar": scalar, "row": 0.5 * state["row"] + 1.0 / (1 + jnp.arange(5.0))[None]}

        start = {"image": jnp.zeros((3, 4, 4), jnp.float32), "scalar": jnp.zeros(3), "row": jnp.zeros((3, 5))}
        return fixed_point(f, start, solver=solver, gradient=Implicit(solver=Anderson(max_steps=60, tol=1e-6)))

    solution = jax.jit(solve)(jnp.float32(0.5))
    assert {name: leaf.dtype.name for name, leaf in solution.value.items()} == {
        "image": "float32",
        "scalar": "float64",
        "row": "float64",
    }
    assert np.all(solution.stats.converged)
    np.testing.assert_allclose(solution.value["row"][:, 0], 2.0, rtol=1e-4)
    total = lambda w: jnp.sum(solve(w).value["image"].astype(jnp.float64))
    total = jax.jit(total)
    numeric = (total(jnp.float32(0.51)) - total(jnp.float32(0.49))) / 0.02
    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.float32(0.5)), numeric, rtol=1e-2)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_nan_at_step_k_returns_the_best_finite_iterate(step):
    rates = jnp.asarray([[0.5], [1.3]])
    limit = (1.3 ** (step - 1) - 1) / 0.3 - 0.1  # between the points of evaluations k - 1 and k of the second sample

    def f(z):
        image = rates * z + 1.0
        return jnp.where((z > limit) & (rates > 1), jnp.nan, image)

    solution = fixed_point(f, jnp.zeros((2, 1)), solver=Picard(tol=1e-9, max_steps=40, stop_mode="abs"), gradient=Phantom())
    assert list(map(int, solution.stats.status)) == [Status.CONVERGED, Status.NON_FINITE]
    assert solution.stats.steps[1] == step
    best = solve(f, jnp.zeros((2, 1)), Picard(tol=1e-9, max_steps=40, stop_mode="abs")).value
    # Its residuals grow, so the first evaluation is the best one; there is none if that was the one that failed.
    np.testing.assert_allclose(best[:, 0], [2.0, 1.0 if step > 1 else 0.0], rtol=1e-8)


def test_a_sample_that_failed_does_not_keep_those_that_wait_for_all_from_stopping():
    f = lambda z: jnp.where(jnp.asarray([[False], [True]]), jnp.nan, 0.5 * z + 1)
    stats = solve(f, jnp.zeros((2, 3)), Picard(stop="all", max_steps=60, tol=1e-6)).stats
    assert list(map(int, stats.status)) == [Status.CONVERGED, Status.NON_FINITE]
    assert stats.steps[0] < 40 and stats.steps[1] == 1


@pytest.mark.parametrize("forward_mode", [False, True])
def test_the_solution_is_finite_where_only_its_image_is_not(forward_mode):
    """f(z) at the best state of a sample that ended in NaN may be that very NaN."""
    f = lambda z: jnp.where(z > 1.9, jnp.nan, z + jnp.asarray([[0.0], [1.0]]))
    rule = Implicit(forward_mode=forward_mode)
    solution = fixed_point(f, jnp.zeros((2, 3)), solver=Picard(max_steps=9), gradient=rule)
    assert list(map(int, solution.stats.status)) == [Status.CONVERGED, Status.NON_FINITE]
    np.testing.assert_array_equal(solution.value, jnp.asarray([[0.0], [2.0]]) * jnp.ones((2, 3)))


@pytest.mark.parametrize("solver", [Anderson(tol=1e-9), Broyden(tol=1e-9), NewtonKrylov(tol=1e-9)], ids=named)
def test_a_step_into_nan_does_not_reach_other_samples(solver):
    def f(z, broken):
        return jnp.where((jnp.abs(z) > 0.7) & broken[:, None], jnp.nan, jnp.cos(z) * 0.9 + 0.1 * z[:, ::-1])

    z = jnp.asarray([[0.0, 0.6], [0.0, 0.6]])
    solution = fixed_point(f, z, jnp.asarray([False, True]), solver=solver)
    alone = fixed_point(f, z[:1], jnp.asarray([False]), solver=solver)
    np.testing.assert_array_equal(solution.value[0], alone.value[0])
    assert solution.stats.status[0] == Status.CONVERGED and solution.stats.status[1] == Status.NON_FINITE
    assert np.all(np.isfinite(solution.stats.rel_lowest))


@pytest.mark.parametrize(
    "solver, rule",
    [
        (Picard(), Phantom(steps=2)),
        (Anderson(), Implicit(solver=GMRES(), forward_mode=True)),
        (Anderson(memory=12), Implicit(solver=BiCGSTAB())),
        (Anderson(kind="I"), Implicit(solver=NormalCG())),
        (Broyden(line_search="sample"), Implicit(solver=SHINE(refine=2))),
        (NewtonKrylov(), Implicit(solver=Anderson())),
    ],
    ids=named,
)
def test_every_method_lowers_for_every_platform(solver, rule, problem):
    def loss(W, x):
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=rule).value ** 2)

    lowers_everywhere(jax.grad(loss), *(jnp.asarray(a, jnp.float32) for a in problem))


def test_parameters_of_a_linen_module():
    """The map may be any pure function of parameters, here a module of another system's variables."""
    block = flax.linen.Dense(4, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (3, 4), jnp.float64)
    variables = jax.tree.map(lambda p: 0.3 * p, block.init(jax.random.key(0), x))

    def loss(variables, rule):
        f = lambda z: jnp.tanh(block.apply(variables, z) + x)
        return jnp.sum(fixed_point(f, jnp.zeros_like(x), solver=Anderson(tol=1e-12), gradient=rule).value ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    implicit = gradient(variables, Implicit(solver=Anderson(max_steps=60, tol=1e-12)))
    phantom = gradient(variables, Phantom(steps=80))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8), implicit, phantom)
