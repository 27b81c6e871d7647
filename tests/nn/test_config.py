"""Settings in TorchDEQ's vocabulary, and what they stand for."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import DEQ, SHINE, DEQConfig, Picard


def test_tolerances_fall_geometrically():
    config = DEQConfig(f_tol=1e-5, f_tol_start=1e-1, f_tol_anneal_steps=100)
    tolerances = [float(config.training_options(step)["f_tol"]) for step in (0, 50, 100, 1000)]
    np.testing.assert_allclose(tolerances, [1e-1, 1e-3, 1e-5, 1e-5], rtol=1e-5)
    assert DEQConfig().training_options(7) == {}


def test_an_annealed_solve_takes_more_steps_later_and_compiles_once():
    config = DEQConfig(f_solver="anderson", f_stop_mode="rel", f_tol=1e-6, f_tol_start=1e-1, f_tol_anneal_steps=10)
    deq, x = DEQ(config), jnp.linspace(-1, 1, 12).reshape(3, 4)

    @jax.jit
    def steps(step):
        f = lambda z: jnp.tanh(0.8 * z + x)
        return deq(f, jnp.zeros_like(x), train=True, solver_options=config.training_options(step)).stats.steps.max()

    assert steps(0) < steps(5) < steps(10)
    assert steps._cache_size() == 1


def test_shine_by_name():
    config = DEQConfig(f_solver="broyden", f_options={"memory": None}, b_solver="shine", b_options={"refine": 30}, ift=True)
    assert isinstance(config.backward_solver(), SHINE)
    deq, x = DEQ(config), jnp.linspace(-1, 1, 12).reshape(3, 4)

    def loss(w):
        f = lambda z: jnp.tanh(w * z + x)
        return jnp.sum(deq(f, jnp.zeros_like(x), train=True, solver_options={"f_tol": 1e-9}).states[-1] ** 2)

    numeric = (loss(0.5 + 1e-3) - loss(0.5 - 1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(loss)(0.5), numeric, rtol=1e-4)


def test_tolerances_of_the_adjoint_are_relative_but_for_the_preset():
    assert [DEQConfig(preset=preset).backward_solver().stop_mode for preset in (None, "torchdeq")] == ["rel", "abs"]


def test_the_options_of_a_call_come_before_those_of_the_config():
    config = DEQConfig(f_options={"damping": 0.5})
    assert [config.forward_solver(7, 1e-3, options).damping for options in (None, {"damping": 0.25})] == [0.5, 0.25]


def test_solves_without_statistics():
    solver = DEQConfig(no_stat=True, f_max_iter=7).forward_solver(7, 1e-3)
    assert isinstance(solver, Picard) and not solver.monitor


@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_the_preset_takes_damping_by_either_name(f_solver):
    """And reports the residual of the damped map, as the original does."""
    outs = [
        DEQ(preset="torchdeq", f_solver=f_solver, f_max_iter=3, f_options={name: 0.3})(jnp.cos, jnp.zeros((1, 2)), train=False)
        for name in ("tau", "damping")
    ]
    jax.tree.map(np.testing.assert_array_equal, *outs)
    z = [0.0]
    for _ in range(3):
        z.append(0.7 * z[-1] + 0.3 * np.cos(z[-1]))
    np.testing.assert_allclose(outs[0].states[-1], z[-1], rtol=1e-12)
    np.testing.assert_allclose(outs[0].stats.abs_lowest, 2**0.5 * (z[-1] - z[-2]), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "sliced", "sampled"),
    [
        ({"n_states": 5}, (8, 4, 4, 4, 4), (8, 12, 16, 20, 24)),
        ({"n_states": 30}, (1,) * 24, tuple(range(1, 25))),
        ({"indexing": (10, 10, 24)}, (10, 14), (10, 24)),
        ({"indexing": (6, 12)}, (6, 6, 12), (6, 12, 24)),
    ],
    ids=str,
)
def test_both_cores_supervise_the_same_steps(settings, sliced, sampled):
    """All of the budget is used, and no slice is empty."""
    budgets = {"sliced": sliced, "indexing": sampled}
    for core, expected in budgets.items():
        assert DEQConfig(core=core, f_max_iter=24, **settings).step_lists(24) == expected


def test_a_call_with_a_smaller_budget_leaves_out_the_steps_past_it():
    for core, expected in (("sliced", (10, 5)), ("indexing", (10, 15))):
        deq = DEQ(core=core, indexing=(10, 20))
        assert deq.config.step_lists(15) == expected
        run = lambda z, deq=deq: deq(lambda z: 0.5 * z + 1, z, train=True, solver_options={"f_max_iter": 15}).states
        assert len(jax.eval_shape(run, jnp.zeros((2, 3)))) == 2


def test_the_last_phantom_state_is_returned_once():
    for preset, n in ((None, 2), ("torchdeq", 3)):
        assert DEQConfig(preset=preset, grad=4, sup_loc=(2, 4)).n_supervised == n


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b_solver": "shine"}, "needs f_solver"),
        ({"b_solver": "shine", "f_solver": "broyden", "preset": "torchdeq"}, "without preset"),
        ({"no_stat": True, "f_solver": "broyden"}, "no_stat"),
        ({"f_tol_start": 0.1}, "needs both"),
        ({"f_tol_start": 0.1, "f_tol_anneal_steps": 5, "f_tol": 0.0}, "positive"),
        ({"f_solvr": "anderson"}, "f_solver"),
        ({"f_solver": "andersen"}, "did you mean 'anderson'"),
        ({"b_solver": "GMRES"}, "'gmres'"),
        ({"b_solver": "gmres", "b_options": {"restrt": 3}}, "did you mean 'restart'"),
        ({"n_states": 0}, "n_states=0: must be a whole number"),
        ({"norm_type": "weightnorm"}, "weight_norm"),
        ({"indexing": (20, 10)}, "must not decrease"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        DEQConfig.from_config(settings)


def test_a_layer_takes_a_config_or_settings():
    with pytest.raises(TypeError, match=r"f_max_iter.*replace"):
        DEQ(DEQConfig(), f_max_iter=3)
    with pytest.raises(TypeError, match="from_config"):
        inspect.unwrap(DEQ.__init__)(DEQ(), {"f_solver": "anderson"})
