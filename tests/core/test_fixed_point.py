"""What a fixed-point solver and its gradients must satisfy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax import (
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Reversible,
    Status,
    Unrolled,
    fixed_point,
)
from deqjax.core.solve import solve

# Unrolled past convergence, Anderson would differentiate rounding: 22 steps reach it.
SOLVERS = [Picard(max_steps=120, tol=1e-13), Anderson(max_steps=22, tol=1e-13), Broyden(max_steps=60, tol=1e-13)]
TIGHT = Implicit(solver=Anderson(max_steps=80, tol=1e-13))


def cell(z, W, x):
    return jnp.tanh(z @ W + x)


def named(solver):
    return type(solver).__name__


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_finds_the_fixed_point(solver, problem):
    solution = fixed_point(cell, jnp.zeros_like(problem[1]), *problem, solver=solver)
    np.testing.assert_allclose(cell(solution.value, *problem), solution.value, atol=1e-12)
    assert np.all(solution.stats.converged)
    assert "converged" in solution.stats.explain()


@pytest.mark.parametrize("solver", SOLVERS, ids=named)
def test_implicit_gradient_equals_the_unrolled_one(solver, problem):
    def gradient(rule):
        def loss(W, x):
            return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=rule).value ** 3)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*problem)

    implicit = gradient(Implicit(solver=dataclasses.replace(solver, tol=1e-14)))
    for a, b in zip(implicit, gradient(Unrolled()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    for a, b in zip(implicit, gradient(Phantom(steps=80)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_one_step_is_the_first_phantom_step(problem):
    def loss(W, rule):
        return jnp.sum(fixed_point(cell, jnp.zeros_like(problem[1]), W, problem[1], gradient=rule).value)

    np.testing.assert_array_equal(jax.grad(loss)(problem[0], OneStep()), jax.grad(loss)(problem[0], Phantom(steps=1)))


@pytest.mark.parametrize("rule", [Phantom(steps=1), Phantom(steps=5), Phantom(steps=6, sample_every=2), Unrolled()], ids=repr)
def test_recomputing_activations_changes_no_gradient(rule, problem):
    def gradient(rule):
        solver = Anderson(max_steps=8)

        def loss(W):
            states = fixed_point(cell, jnp.zeros_like(problem[1]), W, problem[1], solver=solver, gradient=rule).states
            return sum(jnp.sum(z**2) for z in states)

        return jax.jit(jax.grad(loss))(problem[0])

    again = dataclasses.replace(rule, remat=True)
    np.testing.assert_allclose(gradient(again), gradient(rule), rtol=1e-12)


def test_second_derivatives_through_the_implicit_rule(problem):
    W, x = problem

    def loss(t):
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), t * W, x, solver=SOLVERS[1], gradient=TIGHT).value ** 2)

    e = 1e-4
    numerical = (jax.grad(loss)(1 + e) - jax.grad(loss)(1 - e)) / (2 * e)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(loss)))(1.0), numerical, rtol=1e-6)


@pytest.mark.parametrize("rule", [TIGHT, Phantom(steps=60), Unrolled()], ids=named)
def test_f_may_close_over_anything(rule, problem):
    """Traced parameters, booleans, integers and random keys, inside jit, scan and checkpoint."""
    W, x = problem
    table, key = jnp.arange(8), jax.random.key(3)

    def loss(W, mask, key):
        noise = jax.random.normal(key, x.shape, x.dtype)

        def f(z):
            return jnp.where(mask[None], cell(z, W, x), 0.1 * z[:, table]) + 0.01 * noise

        return jnp.sum(fixed_point(f, jnp.zeros_like(x), solver=SOLVERS[0], gradient=rule).value ** 2)

    mask = jnp.arange(8) > 2
    reference = jax.grad(loss)(W, mask, key)
    body = lambda total, _: (total + jax.checkpoint(jax.grad(loss))(W, mask, key), None)
    scanned = jax.jit(lambda: jax.lax.scan(body, jnp.zeros_like(W), length=2)[0])()
    np.testing.assert_allclose(scanned, 2 * reference, atol=1e-10)


def test_a_start_of_weak_type_keeps_its_dtype():
    """`jnp.full` with a Python number gives in to any other dtype."""
    low = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert fixed_point(lambda z: 0.5 * z + low, jnp.full((2, 3), 1.0)).value.dtype == jnp.float64


def test_a_state_may_be_any_pytree(problem):
    W, x = problem

    def f(state):
        a, b = state["a"], state["b"]
        return {"a": jnp.tanh(a @ W + x + b[:, None]), "b": 0.3 * jnp.mean(a, axis=1)}

    def loss(solver, rule):
        start = {"a": jnp.zeros_like(x), "b": jnp.zeros((4,), x.dtype)}
        return fixed_point(f, start, solver=solver, gradient=rule)

    values = [loss(solver, TIGHT).value for solver in SOLVERS]
    for value in values[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), value, values[0])


def test_the_whole_state_as_one_problem_and_vmap(problem):
    W, x = problem
    solved = fixed_point(cell, jnp.zeros_like(x), W, x, solver=SOLVERS[1]).value
    one = lambda x: fixed_point(lambda z: jnp.tanh(z @ W + x), jnp.zeros_like(x), solver=SOLVERS[1], batch_axis=None).value
    np.testing.assert_allclose(jax.vmap(one)(x), solved, atol=1e-11)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_batch_may_lie_along_another_axis(axis, problem):
    W, x = problem
    solve = lambda x, f, axis: fixed_point(f, jnp.zeros_like(x), solver=SOLVERS[1], batch_axis=axis)
    expected = solve(x, lambda z: cell(z, W, x), 0)
    got = solve(x.T, lambda z: cell(z.T, W, x).T, axis)
    np.testing.assert_allclose(got.value.T, expected.value, atol=1e-12)
    np.testing.assert_array_equal(got.stats.steps, expected.stats.steps)


def test_a_batch_of_nothing_is_solved_at_once():
    solution = fixed_point(lambda z: 0.5 * z, jnp.zeros((0, 3)))
    assert solution.value.shape == (0, 3) and solution.stats.steps.shape == (0,)
    empty = fixed_point(lambda z: (0.5 * z[0] + 1, z[1]), (jnp.zeros((2, 3)), jnp.zeros((2, 0)))).value
    np.testing.assert_allclose(empty[0], 2, rtol=1e-2)
    assert empty[1].shape == (2, 0)


@pytest.mark.parametrize("solver", [Picard(tol=1e-6), Anderson(tol=1e-6), Broyden(tol=1e-6)], ids=named)
def test_shard_map_stops_every_shard_on_its_own(solver):
    """No collective at all: each device iterates until its own samples are done."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    rates = jnp.repeat(jnp.asarray([0.1, 0.9, 0.5, 0.8]), 2)

    def run(rates):
        solution = fixed_point(lambda z: rates[:, None] * z + 1.0, jnp.zeros((2, 3)) * rates[:, None], solver=solver)
        return solution.value, solution.stats.steps

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    value, steps = sharded(rates)
    for i in range(4):
        alone_value, alone_steps = run(rates[2 * i : 2 * i + 2])
        np.testing.assert_allclose(value[2 * i : 2 * i + 2], alone_value, atol=1e-12)
        np.testing.assert_array_equal(steps[2 * i : 2 * i + 2], alone_steps)
    text = sharded.lower(rates).compile().as_text()
    assert "all-reduce" not in text and "all-gather" not in text


def test_inside_shard_map_a_rule_or_solver_runs_or_says_why_not():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def trace(**options):
        run = lambda x: fixed_point(lambda z: 0.5 * z + x, jnp.zeros_like(x), **options).value
        return jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones((8, 3)))

    trace(gradient=Reversible())
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        trace(solver=NewtonKrylov())


@pytest.mark.parametrize("solver", [Picard(tol=1e-6), Anderson(tol=1e-6), Broyden(tol=1e-6)], ids=named)
def test_a_sample_does_not_depend_on_its_batch_mates(solver):
    rates = jnp.asarray([0.1, 0.9, 0.5])
    f = lambda z, r: r[:, None] * z + 1.0
    together = fixed_point(f, jnp.zeros((3, 4)), rates, solver=solver)
    for i in range(3):
        alone = fixed_point(f, jnp.zeros((1, 4)), rates[i : i + 1], solver=solver)
        np.testing.assert_array_equal(alone.value[0], together.value[i])
        assert alone.stats.steps[0] == together.stats.steps[i]


def test_a_finished_sample_stays_where_it_is():
    """Seen by one that looks at it: the first is close enough at once, and the second goes to twice where the first is."""
    f = lambda z: jnp.stack([0.9 * z[0], 0.5 * z[1] + z[0]])
    solved = solve(f, jnp.ones((2, 1)), Picard(max_steps=60, tol=0.11, stop_mode="abs"))
    assert solved.stats.steps[0] == 1 and abs(solved.value[1, 0] - 2) < 0.11


def test_anderson_solves_a_linear_system_in_as_many_steps_as_dimensions():
    A = jnp.diag(jnp.asarray([0.9, -0.5, 0.3, 0.95]))
    f = lambda z: z @ A + 1.0
    solver = Anderson(max_steps=7, memory=6, ridge=1e-15, tol=1e-10)
    solution = fixed_point(f, jnp.zeros((1, 4)), solver=solver)
    np.testing.assert_allclose(solution.value[0], 1 / (1 - jnp.diag(A)), rtol=1e-6)


@pytest.mark.parametrize("memory", [10, 20])
def test_broyden_converges_with_less_memory_than_steps(memory):
    eigenvalues = jnp.linspace(-0.3, 0.99, 64)
    f = lambda z: z * eigenvalues[None] + 1.0
    stats = fixed_point(f, jnp.zeros((1, 64)), solver=Broyden(max_steps=300, memory=memory, tol=1e-5)).stats
    assert stats.converged[0] and stats.steps[0] < 150


def test_non_finite_samples_stop_with_their_best_iterate_and_leave_others_alone():
    growth = jnp.asarray([0.5, 1e200])
    f = lambda z: growth[:, None] * z + 1.0
    solution = fixed_point(f, jnp.zeros((2, 3)), solver=Picard(max_steps=60, tol=1e-12))
    assert list(map(int, solution.stats.status)) == [Status.CONVERGED, Status.NON_FINITE]
    assert np.all(np.isfinite(solution.stats.rel_lowest))
    np.testing.assert_allclose(solution.value[0], 2.0)


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("gradient", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_divergence_is_reported(stop_mode, gradient):
    solver = Picard(max_steps=5, stop_mode=stop_mode)  # the last residual is 16 times the first, the one before it 8 times
    stats = fixed_point(lambda z: 2 * z + 1, jnp.zeros((1, 3)), solver=solver, gradient=gradient).stats
    assert stats.status[0] == Status.DIVERGED
    assert "does not contract" in stats.explain()


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled()], ids=named)
def test_a_residual_that_grew_with_the_state_alone_is_no_divergence(gradient):
    """Far from normal: states of 1e10 from a start at 0, with a relative residual that falls all the while."""
    A = 0.5 * jnp.eye(24) + 2 * jnp.eye(24, k=-1)
    stats = [
        fixed_point(lambda z: z @ A + 1, jnp.zeros((1, 24)), solver=Picard(max_steps=n, tol=1e-8), gradient=gradient).stats
        for n in (95, 120)
    ]
    assert stats[0].abs_trace[0, -1] > 100 * stats[0].abs_trace[0, 0] and stats[0].rel_lowest[0] < 1e-6
    assert [int(s.status[0]) for s in stats] == [Status.STEP_LIMIT, Status.CONVERGED]
    # Slow growth is divergence all the same.
    slow = fixed_point(lambda z: 1.01 * z + 1, jnp.zeros((1, 2)), solver=Picard(max_steps=300), gradient=gradient).stats
    assert slow.status[0] == Status.DIVERGED


def test_every_sampled_step_is_returned_even_after_an_early_stop():
    solver = Picard(max_steps=40, tol=1e-6)
    best, samples, stats, _ = solve(lambda z: 0.1 * z + 1, jnp.zeros((1, 2)), solver, (1, 3, 40))
    np.testing.assert_allclose(samples[0], 1.0)
    np.testing.assert_allclose(samples[1], 1.11)
    np.testing.assert_array_equal(samples[2], best)
    assert stats.steps[0] < 40


def test_checking_less_often_changes_nothing_but_the_check():
    f = lambda z: 0.5 * z + 1
    often, seldom = (solve(f, jnp.zeros((2, 3)), Picard(max_steps=50, tol=1e-6, check_every=k))[0] for k in (1, 7))
    np.testing.assert_array_equal(often, seldom)


def test_evaluations_that_burn_in_neither_end_the_solve_nor_count():
    halved = lambda z: 0.5 * z
    solver = Picard(max_steps=9, tol=0.1, stop_mode="abs", burn_in=3)
    stats = solve(halved, jnp.zeros((1, 2)), solver).stats  # the start is the solution
    assert (stats.steps[0], stats.best_step[0]) == (4, 4)
    assert solve(halved, jnp.ones((1, 2)), dataclasses.replace(solver, max_steps=3)).value[0, 0] == 1


def test_bfloat16_state_keeps_its_dtype_and_float32_residuals():
    W = 0.1 * jnp.ones((4, 4), jnp.bfloat16)
    for solver in (Picard(), Anderson(), Broyden()):
        solution = fixed_point(lambda z: jnp.tanh(z @ W + jnp.bfloat16(1)), jnp.zeros((2, 4), jnp.bfloat16), solver=solver)
        assert solution.value.dtype == jnp.bfloat16
        assert solution.stats.rel_lowest.dtype == jnp.float32


def test_adjoint_statistics_arrive_as_a_gradient(problem):
    W, x = problem

    def loss(probe, scale):
        rule = Implicit(solver=Picard(max_steps=50, tol=1e-6))
        return scale * jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, gradient=rule, adjoint_probe=probe).value)

    measured, tiny = (np.asarray(jax.grad(loss)(deqjax.adjoint_probe(), scale)) for scale in (1.0, 1e-12))
    _, rel, steps, converged, _, samples = measured
    assert samples == 4 and converged == 4 and 0 < steps / samples < 50 and rel / samples < 1e-6
    np.testing.assert_allclose(tiny, measured * np.array([1e-12, 1, 1, 1, 1, 1]), rtol=1e-4)  # at whatever size it is solved


def test_sharding_over_the_batch_needs_one_reduction_per_step(problem):
    W, _ = problem
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.random.normal(jax.random.key(4), (16, 8), jnp.float64)
    run = jax.jit(lambda x: fixed_point(cell, jnp.zeros_like(x), W, x, solver=Anderson()).value)
    expected = run(x)
    sharded = jax.device_put(x, sharding)
    np.testing.assert_allclose(run(sharded), expected, atol=1e-12)
    text = run.lower(sharded).compile().as_text()
    assert text.count(" all-reduce(") <= 1 and "all-gather" not in text


def test_statistics_of_many_solves_count_all_of_their_samples():
    stats = jax.vmap(lambda x: fixed_point(lambda z: 0.5 * z + x, jnp.zeros_like(x)))(jnp.ones((3, 2, 4))).stats
    assert stats.explain().startswith("6 of 6 samples")
    assert stats.sums()["samples"] == stats.sums()["converged"] == 6


@pytest.mark.parametrize("solver", [Picard(damping=0.3), Anderson(), Broyden()], ids=named)
def test_without_monitoring_the_one_residual_is_the_last_that_monitoring_measures(solver):
    f = lambda z: jnp.cos(z) + 0.1 * z[:, ::-1]
    residuals = []
    for monitor in (False, True):
        solver = dataclasses.replace(solver, max_steps=3, tol=0.0, monitor=monitor)
        stats = solve(f, jnp.linspace(0, 1, 6).reshape(2, 3), solver).stats
        residuals.append((stats.abs_trace[:, -1], stats.rel_trace[:, -1]))
    np.testing.assert_allclose(*residuals, rtol=1e-12)


def test_without_monitoring_a_sample_is_where_the_solve_then_is():
    value, samples, _, _ = solve(lambda z: z + 1, jnp.zeros((1, 1)), Picard(max_steps=5, monitor=False), (2, 5))
    assert (samples[0], samples[1], value) == (2, 5, 5)


def test_a_registered_solver_is_known_by_name(problem):
    class Half(Picard):
        pass

    with pytest.raises(TypeError, match="must be a subclass"):
        inspect.unwrap(deqjax.register_solver)("half_test", Half())
    deqjax.register_solver("half_test", Half)
    assert isinstance(deqjax.get_solver("half_test", damping=0.5), Half)
