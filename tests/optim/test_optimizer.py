import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deqjax.optim.optimizer import build_optimizer, clip_by_global_norm, tie_updates
from deqjax.optim.schedules import learning_rate
from deqjax.training.errors import UserError

COSINE = {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 4, "max_steps": 100, "lr_min": 1e-4}


def rates(config, steps):
    schedule = learning_rate(config)
    return [float(schedule(k)) for k in steps]


def half_cosine(k):
    return 1e-4 + (2e-3 - 1e-4) / 2 * (1 + math.cos(math.pi * k / 100))


def test_cosine_as_in_the_deq_lm_script():
    expected = [2e-3, 2e-3 / 4, 2e-3 * 2 / 4, 2e-3 * 3 / 4, half_cosine(4), half_cosine(50), 1e-4]
    got = rates(COSINE | {"first_update_full_lr": True}, [0, 1, 2, 3, 4, 50, 100])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_warm_up_by_default_starts_low_and_ends_at_the_full_rate():
    np.testing.assert_allclose(rates(COSINE, range(5)), [5e-4, 1e-3, 1.5e-3, 2e-3, half_cosine(4)], rtol=1e-6)
    np.testing.assert_allclose(rates({"learning_rate": 0.1}, [0, 7]), [0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates({"learning_rate": 0.1, "warmup_steps": 2}, range(3)), [0.05, 0.1, 0.1], rtol=1e-6)


def test_inverse_square_root_is_continuous_at_the_end_of_the_warm_up():
    config = {"learning_rate": 1.0, "schedule": "inv_sqrt", "warmup_steps": 4, "first_update_full_lr": True}
    np.testing.assert_allclose(rates(config, [0, 2, 4, 16]), [0, 2 / 8, 0.5, 0.25], rtol=1e-6)


def test_clipping_is_pytorchs():
    gradient = {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    clipped, _ = clip_by_global_norm(1.0).update(gradient, None)
    np.testing.assert_allclose(clipped["b"], 4 / (5 + 1e-6), rtol=1e-12)
    untouched, _ = clip_by_global_norm(10.0).update(gradient, None)
    assert untouched["b"] == 4.0


def test_tied_leaves_get_the_sum_of_their_updates():
    updates = {"a": {0: jnp.asarray([1.0])}, "b": jnp.asarray([2.0]), "c": jnp.asarray([5.0]), "d": jnp.asarray([4.0])}
    tied, _ = tie_updates([(("a", "0"), ("b",), ("d",))]).update(updates, None)
    assert [float(x[0]) for x in (tied["a"][0], tied["b"], tied["c"], tied["d"])] == [7.0, 7.0, 5.0, 7.0]
    with pytest.raises(ValueError, match="no parameter x to tie"):
        tie_updates([(("x",), ("b",))]).update(updates, None)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_parameter_without_a_gradient_is_left_alone(name):
    """Its moments and its clock too: what follows is as if the step had not been, for it alone."""
    settings = {"name": name, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer, params = build_optimizer(settings), {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([1.0, 2.0])}
    seen, unseen = jnp.asarray([0.0, 0.5]), jnp.zeros(2)

    def run(gradients):
        state, current = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, current)
            current = optax.apply_updates(current, updates)
        return current

    skipped = run([{"a": seen, "b": seen}, {"a": seen, "b": unseen}, {"a": seen, "b": 3 * seen}])
    without = run([{"a": seen, "b": seen}, {"a": seen, "b": 3 * seen}])
    np.testing.assert_array_equal(skipped["b"], without["b"])
    always = run([{"a": seen, "b": seen}] * 3)
    np.testing.assert_array_equal(skipped["a"], always["a"])


def test_weight_decay_is_part_of_adams_gradient_as_in_pytorch():
    config = {"name": "adam", "learning_rate": 0.1, "weight_decay": 0.5}
    optimizer, params = build_optimizer(config), {"w": jnp.asarray([2.0])}
    updates, _ = optimizer.update({"w": jnp.asarray([-1.0])}, optimizer.init(params), params)
    # The decay cancels the gradient exactly; decoupled, it would not.
    assert float(updates["w"][0]) == 0.0
    decoupled = build_optimizer(config | {"name": "adamw"})
    updates, _ = decoupled.update({"w": jnp.asarray([-1.0])}, decoupled.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.1 * (1 - 0.5 * 2.0), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "sgd", "momentum": 0.5}, 0.5 * 2 + 4),
        ({"name": "sgd", "momentum": 0.5, "nesterov": True}, 4 + 0.5 * 5),
        ({"name": "sgd", "clip_value": 1.5}, 1.5),
        ({"name": "sgd", "clip": 1.0, "weight_decay": 0.5}, 1 + 0.5),
        ({"name": "adam", "b1": 0.5, "b2": 0.8}, (2.5 / 0.75) / (3.84 / 0.36) ** 0.5),
        ({"name": "rmsprop", "decay": 0.5}, 4 / (0.5 * 0.5 * 4 + 0.5 * 16) ** 0.5),
    ],
    ids=str,
)
def test_every_option_is_heeded(settings, expected):
    """The second update, by PyTorch's formulas, after gradients of 2 and 4 at a weight that stays 1."""
    optimizer, x = build_optimizer({"learning_rate": 1.0} | settings), jnp.asarray([1.0])
    state = optimizer.init(x)
    for gradient in (2.0, 4.0):
        updates, state = optimizer.update(jnp.asarray([gradient]), state, x)
    np.testing.assert_allclose(updates, -expected, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "adagrad"])
def test_every_optimizer_descends(name, momentum):
    optimizer, x = build_optimizer({"name": name, "learning_rate": 0.05, "momentum": momentum}), jnp.asarray([1.0, -1.0])
    state = optimizer.init(x)
    for _ in range(50):
        updates, state = optimizer.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
    assert float(jnp.max(jnp.abs(x))) < 0.6


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_small_gradients_are_scaled_as_in_pytorch(name):
    optimizer, x = build_optimizer({"name": name, "learning_rate": 1.0, "eps": 1e-8}), jnp.asarray([1.0])
    updates, _ = optimizer.update(jnp.asarray([1e-6]), optimizer.init(x), x)
    # adagrad: g / (|g| + eps); rmsprop: the mean square is a hundredth of g^2.
    root = 1e-6 if name == "adagrad" else 1e-7
    np.testing.assert_allclose(updates, -1e-6 / (root + 1e-8), rtol=1e-6)


def test_the_rate_falls_in_steps_after_the_warm_up():
    config = {"learning_rate": 1.0, "schedule": "step", "decay_at": (4, 6), "decay_factor": 0.5, "warmup_steps": 2}
    assert rates(config, range(8)) == [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    with pytest.raises(UserError, match="decay_at"):
        learning_rate({"learning_rate": 1.0, "schedule": "step"})


@pytest.mark.parametrize("schedule, last", [("poly", 0.0), ("onecycle", 1 / 25e4)])
def test_a_rate_stays_where_it_has_fallen_to(schedule, last):
    """Past the end the formulas have no value, or a negative one."""
    got = rates({"learning_rate": 1.0, "schedule": schedule, "max_steps": 100}, [100, 101, 150])
    np.testing.assert_allclose(got, [last] * 3, rtol=1e-4)


@pytest.mark.parametrize("config, message", [({"name": "adm"}, "did you mean 'adam'"), ({"schedule": "cosin"}, "'cosine'")])
def test_a_mistyped_name_is_an_error_that_names_the_right_one(config, message):
    with pytest.raises(UserError, match=message):
        build_optimizer({"learning_rate": 1.0} | config)


@pytest.mark.parametrize(
    "setting, value",
    [(setting, value) for setting in ("learning_rate", "clip_value") for value in (-1.0, float("nan"), float("inf"))]
    + [(setting, -1.0) for setting in ("weight_decay", "clip", "eps", "warmup_steps", "decay_factor", "lr_min")]
    + [(setting, value) for setting in ("b1", "b2", "decay", "momentum") for value in (-0.1, 1.0)],
)
def test_a_number_that_cannot_be_is_an_error(setting, value):
    with pytest.raises(UserError, match=f"config.optimizer.{setting}={value}: must be"):
        build_optimizer({"learning_rate": 1.0} | {setting: value})


def test_a_rate_that_is_missing_is_an_error():
    with pytest.raises(UserError, match=r"lacks config\.optimizer\.learning_rate"):
        build_optimizer({"name": "adam"})
