"""A traced bound on the steps of a solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax.nn.deq import DEQ

F, START = (lambda z: jnp.cos(z) + 0.1), jnp.zeros((3, 4))


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_limit_gives_what_so_small_a_budget_gives(check_every):
    settings = {"f_solver": "anderson", "f_tol": 0.0, "f_options": {"check_every": check_every}}
    run = jax.jit(lambda limit: DEQ(f_max_iter=9, **settings)(F, START, train=True, solver_options={"f_limit": limit}))
    for limit in (5, 9, 20):
        states, stats, _ = run(limit)
        expected = DEQ(f_max_iter=min(limit, 9), **settings)(F, START, train=True)
        np.testing.assert_allclose(states[-1], expected.states[-1], rtol=1e-14)
        np.testing.assert_array_equal(stats.steps, min(limit, 9))
        assert stats.abs_trace.shape[1] == 9


@pytest.mark.parametrize("settings", [{"eval_factor": 2.0}, {"eval_f_max_iter": 30}, {}], ids=str)
def test_the_budget_of_a_call_is_its_own_in_evaluation_too(settings):
    """As in TorchDEQ, whatever the settings make of theirs."""
    deq = DEQ(f_max_iter=40, f_tol=0.0, preset="torchdeq", **settings)
    for options, steps in (({"f_max_iter": 5}, 5), ({"f_max_iter": 5, "eval_f_max_iter": 3}, 3)):
        np.testing.assert_array_equal(deq(F, START, train=False, solver_options=options).stats.steps, steps)
    np.testing.assert_array_equal(deq(F, START, train=True, solver_options={"f_max_iter": 5}).stats.steps, 5)
    with pytest.raises(ValueError, match="f_max_iter=0"):
        deq(F, START, train=False, solver_options={"f_max_iter": 0})
    # 0 stands for eval_factor times f_max_iter, in a call as in a config.
    steps = deq(F, START, train=False, solver_options={"eval_f_max_iter": 0}).stats.steps
    np.testing.assert_array_equal(steps, 40 * settings.get("eval_factor", 1))


def test_the_options_of_a_call_hold_for_every_slice():
    deq = DEQ(f_max_iter=20, n_states=2, f_tol=0.0)
    _, stats, _ = deq(F, START, train=True, solver_options={"f_tol": 1e9})
    np.testing.assert_array_equal(stats.steps, 2)
    _, stats, _ = deq(F, START, train=False, solver_options={"eval_f_max_iter": 3})
    np.testing.assert_array_equal(stats.steps, 3)


def test_a_solve_without_residuals_has_no_limit():
    with pytest.raises(ValueError, match="without residuals"):
        DEQ(no_stat=True)(F, START, train=True, solver_options={"f_limit": 3})


@pytest.mark.parametrize(
    "settings",
    [
        {"f_solver": "fixed_point_iter", "preset": "torchdeq", "f_options": {"tau": 0.3}},
        {"f_solver": "simple_fixed_point_iter", "preset": "torchdeq"},
        {"f_solver": "fixed_point_iter", "no_stat": True},
    ],
)
def test_a_trajectory_ends_where_evaluation_does_and_has_a_residual_for_every_step(settings):
    deq = DEQ(f_max_iter=4, f_tol=0.0, **settings)
    states, stats = deq.trajectory(F, START, (2, 4))
    evaluated = deq(F, START, train=False)
    np.testing.assert_allclose(states[-1], evaluated.states[-1], rtol=1e-14)
    np.testing.assert_allclose(stats.rel_lowest, evaluated.stats.rel_lowest, rtol=1e-12)
    assert stats.rel_trace.shape == (3, 4) and np.all(np.diff(stats.rel_trace) < 0)


def test_the_result_of_evaluation_has_the_implicit_gradient():
    deq = DEQ(f_max_iter=60, f_tol=1e-13, b_tol=1e-12)
    run = lambda w: jnp.sum(deq(lambda z: w * jnp.cos(z) + 0.1, START, train=False).states[-1] ** 2)
    run = jax.jit(jax.value_and_grad(run))
    np.testing.assert_allclose(run(0.5)[1], (run(0.5 + 1e-5)[0] - run(0.5 - 1e-5)[0]) / 2e-5, rtol=1e-6)


def test_evaluation_may_have_a_tolerance_of_its_own_and_a_trajectory_heeds_none():
    deq = DEQ(f_max_iter=20, f_tol=1e9, eval_f_tol=0.0)
    steps = [deq(F, START, train=train).stats.steps for train in (True, False)]
    np.testing.assert_array_equal(jnp.stack([*steps, deq.trajectory(F, START, (2, 5))[1].steps])[:, 0], [1, 20, 5])
