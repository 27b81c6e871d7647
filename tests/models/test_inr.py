"""Implicit neural representations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.core.gradients import adjoint_probe
from deqjax.models.inr import INR, INRConfig, Signals, WarmStart, representation
from deqjax.models.inr.sine import cos, sin
from deqjax.nn.config import DEQConfig
from deqjax.nn.deq import DEQ
from experiments.inr_shapes import sdf_loss

CLIPPED = {"norm_type": "spectral_norm", "norm_no_scale": True, "norm_clip": True, "norm_target_norm": 0.97}
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (12, 2)), jnp.float32)


def model(deq=None, precision=jnp.float32, **settings):
    config = INRConfig(**{"n_in": 2, "n_out": 3, "n_hidden": 8, "input_scale": 6.0, **settings})
    net = representation(config, DEQConfig(**(deq or {})), nnx.Rngs(0))
    graph, state = nnx.split(net)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(precision), state))


# Sines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "error"), [(1.0, 1.5e-7), (250.0, 2e-7), (18_000.0, 1e-6)])
def test_sines_are_right_for_large_phases(largest, error):
    x = jnp.asarray(np.random.default_rng(0).uniform(-largest, largest, 10_000), jnp.float32)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(sin(x), np.sin(exact), rtol=0, atol=error)
    np.testing.assert_allclose(cos(x), np.cos(exact), rtol=0, atol=error)


def test_sines_stay_sines_where_phases_have_no_digits_left_and_pass_on_what_is_not_a_number():
    x = jnp.asarray([1e9, -3e20, 1e38], jnp.float32)
    assert bool(jnp.all(jnp.abs(sin(x)) <= 1)) and bool(jnp.all(jnp.abs(cos(x)) <= 1))
    assert bool(jnp.all(jnp.isnan(sin(jnp.asarray([np.nan, np.inf], jnp.float32)))))


def test_derivatives_of_sines_of_every_order_are_sines():
    x = jnp.asarray(np.linspace(-7, 7, 50), jnp.float32)
    first, second = jax.grad(sin), jax.grad(jax.grad(sin))
    np.testing.assert_allclose(jax.vmap(first)(x), np.cos(x), atol=2e-7)
    np.testing.assert_allclose(jax.vmap(second)(x), -np.sin(x), atol=2e-7)
    np.testing.assert_allclose(jax.vmap(jax.grad(second))(x), -np.cos(x), atol=2e-7)


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"n_in": 2, "n_out": 1, "n_hidden": 256}, 67_841),
        ({"n_in": 2, "n_out": 3, "n_hidden": 128, "n_layers": 4}, 68_867),
        ({"n_in": 2, "n_out": 3, "n_hidden": 512, "filter": "gabor"}, 270_851),
        ({"n_in": 1, "n_out": 1, "n_hidden": 512, "filter": "fourier"}, 265_729),
        ({"n_in": 3, "n_out": 3, "n_hidden": 2048}, 4_220_931),
        ({"n_in": 2, "n_out": 1, "n_hidden": 64, "n_layers": 3, "network": "siren"}, 8_577),
    ],
)
@pytest.mark.parametrize("network", ["deq", "one_pass"])
def test_networks_have_the_published_numbers_of_parameters(settings, count, network):
    config = INRConfig(**{"network": network, **settings})
    net = nnx.eval_shape(lambda: representation(config, DEQConfig(), nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == count


def test_initial_weights_have_the_published_distributions():
    net = model(n_hidden=150, n_layers=3, filter="gabor", input_scale=10.0)
    gamma, kernel = net.filters.gamma[...], net.filters.kernel[...]
    bound = 10 / (3 + 1) ** 0.5 / 2**0.5
    unit = kernel / jnp.sqrt(gamma)[None] / bound
    assert bool(jnp.all(jnp.abs(unit) <= 1 + 1e-5)) and abs(float(jnp.std(unit)) - 3**-0.5) < 0.02
    # Gamma(3): mean and variance 3.
    assert abs(float(jnp.mean(gamma)) - 3) < 0.3 and abs(float(jnp.var(gamma)) - 3) < 0.8
    assert float(jnp.max(jnp.abs(net.filters.bias[...]))) <= np.pi
    for layer in (*net.layers, net.output):
        assert float(jnp.max(jnp.abs(layer.kernel[...]))) <= 150**-0.5
        assert float(jnp.max(jnp.abs(layer.bias[...]))) <= 150**-0.5
    original = model(n_hidden=400, filter="gabor", recipe="original").filters.gamma[...]
    # 6 / (L + 1) of the first filter, 3 / (L + 1) of the other.
    assert abs(float(jnp.mean(original[:400])) - 3) < 0.4 and abs(float(jnp.mean(original[400:])) - 1.5) < 0.3


def test_the_explicit_network_is_the_equilibriums_first_step():
    for name in ("siren_like", "fourier", "gabor"):
        net, explicit = (model(network=network, filter=name, n_layers=2) for network in ("deq", "one_pass"))
        first = net.decode(net.cell(jnp.zeros((12, 8), jnp.float32), net.encode(X, net.weights())))
        np.testing.assert_array_equal(explicit(X).values[-1], first)


@pytest.mark.parametrize(
    "setting",
    [{"network": "mlp"}, {"filter": "relu"}, {"n_hidden": 0}, {"input_scale": float("nan")}, {"linear_output": False}],
)
def test_a_setting_that_cannot_be_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        model(**setting)


# Equilibria ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siren_like", "fourier", "gabor"])
def test_clipped_spectral_norms_make_the_equilibrium_unique(name):
    net = model({**CLIPPED, "f_max_iter": 2000, "f_tol": 1e-5}, filter=name, n_layers=2)
    for layer in net.layers:
        layer.kernel[...] = 40 * layer.kernel[...]  # far beyond what training does
    for _ in range(20):
        weights = net.weights(train=True)
    assert all(np.linalg.norm(layer.kernel, 2) < 0.98 for layer in weights)
    elsewhere = 3 * jax.random.normal(jax.random.key(1), (12, 8), jnp.float32)
    cold, other = net(X), net(X, z_init=elsewhere)
    assert bool(jnp.all(cold.stats.converged & other.stats.converged))
    np.testing.assert_allclose(cold.states[-1], other.states[-1], atol=2e-3)


def test_the_first_estimate_of_a_spectral_norm_is_one():
    model = INR(INRConfig(n_in=2, n_out=1, n_hidden=16, input_scale=8.0), DEQConfig(norm_type="spectral_norm"), nnx.Rngs(0))
    for layer in model.layers:
        u, kernel, v = (x[...] for x in (layer.u, layer.kernel, layer.v))
        np.testing.assert_allclose(u @ kernel.T @ v, np.linalg.norm(kernel, 2), rtol=0.02)


@pytest.mark.parametrize(
    "deq", [{"grad": 1}, {"grad": 3}, {"ift": True}, {"hook_ift": True}, {**CLIPPED, "grad": 2}, {"norm_type": "none"}]
)
@pytest.mark.parametrize("name", ["siren_like", "gabor"])
def test_every_parameter_gets_a_gradient(deq, name):
    graph, params, rest = nnx.split(model(deq, filter=name), nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params, rest, copy=True)(X, train=True).values[-1] - 1))

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(params))[0]:
        assert bool(jnp.all(jnp.isfinite(leaf))) and bool(jnp.any(leaf != 0)), jax.tree_util.keystr(path)


def test_a_step_that_knows_its_states_solves_nothing():
    net = model({"f_tol": 1e-6})
    injection = net.encode(X, net.weights())
    zeros = jnp.zeros((12, 8), jnp.float32)
    solved, sums = net.start(injection, zeros, False)
    assert float(sums["samples"]) == 12 and float(sums["steps"]) > 12
    again, sums = net.start(injection, solved, True)
    assert float(sums["samples"]) == 0
    np.testing.assert_array_equal(again, solved)
    # A tolerance that falls in the course of training is heeded.
    assert float(net.start(injection, zeros, False, {"f_tol": jnp.float32(1e3)})[1]["steps"]) == 12


def test_products_in_bfloat16_leave_the_phases_alone():
    # Phases reach 90 radians: coordinates in bfloat16 would be off by half a radian.
    exact, rounded = (model(input_scale=90.0, dtype=dtype) for dtype in (None, "bfloat16"))
    assert float(jnp.max(jnp.abs(exact.filters(X)[0] - rounded.filters(X)[0]))) == 0
    assert float(jnp.max(jnp.abs(exact(X).values[-1] - rounded(X).values[-1]))) < 0.03


# Several signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deq", [{"grad": 2}, {**CLIPPED, "hook_ift": True}])
def test_signals_at_once_are_each_as_alone(deq):
    config = INRConfig(n_in=2, n_out=1, n_hidden=8, input_scale=6.0)
    signals = Signals(lambda rngs: representation(config, DEQConfig(**deq), rngs), 3, nnx.Rngs(0))
    alone = [signals.one(number) for number in range(3)]
    expected = [net(X, train=True).values[-1] for net in alone]

    @nnx.jit
    def at_once(signals):
        return signals.each(lambda net: net(X, train=True).values[-1])

    together = at_once(signals)
    np.testing.assert_allclose(together, jnp.stack(expected), atol=1e-5)
    assert float(jnp.max(jnp.abs(expected[0] - expected[1]))) > 1e-2
    if "norm_type" in deq:  # what a pass changes in a network stays changed
        np.testing.assert_allclose(signals.one(2).layers[0].u[...], alone[2].layers[0].u[...], atol=1e-5)


def test_signals_at_once_report_the_adjoint_solves_of_all():
    config = INRConfig(n_in=2, n_out=1, n_hidden=8, input_scale=6.0)
    signals = Signals(lambda rngs: representation(config, DEQConfig(hook_ift=True), rngs), 3, nnx.Rngs(0))
    graph, state = nnx.split(signals)

    def loss(probe):
        signals = nnx.merge(graph, state, copy=True)
        signals.net.deq.probe[...] = probe
        return jnp.sum(signals.each(lambda net: net(X, train=True).values[-1]))

    samples = jax.jit(jax.grad(loss))(adjoint_probe())[-1]
    assert float(samples) == 3 * len(X)


def test_the_memory_of_a_batch_is_its_own():
    warm = WarmStart(rows=4, blocks=3, count=2, n_hidden=5)
    z = jax.random.normal(jax.random.key(0), (2, 4, 5), jnp.float32)
    warm.remember(jnp.int32(1), z)
    for block in range(3):
        recalled, known = warm.recall(jnp.int32(block))
        assert bool(known) == (block == 1)
        np.testing.assert_array_equal(recalled, z if block == 1 else 0 * z)


# Derivatives in the coordinates --------------------------------------------------------------------------------------


def tight(**settings):
    deq = {"hook_ift": True, "f_max_iter": 400, "b_max_iter": 400, "f_tol": 1e-14, "b_tol": 1e-14, "norm_type": "none"}
    deq |= {"f_stop_mode": "rel", "b_stop_mode": "rel"}
    return model(deq, jnp.float64, n_in=3, n_out=1, input_scale=3.0, **settings)


@pytest.mark.parametrize("settings", [{"filter": "siren_like"}, {"filter": "gabor", "n_layers": 2}, {"filter": "fourier"}])
def test_the_gradient_of_a_loss_of_slopes_agrees_with_finite_differences(settings):
    random = np.random.default_rng(0)
    x, normals = (jnp.asarray(random.uniform(-1, 1, (6, 3))) for _ in range(2))
    graph, params, rest = nnx.split(tight(**settings), nnx.Param, ...)

    @jax.jit
    def loss(params):
        net = nnx.merge(graph, params, rest, copy=True)
        return sum(sdf_loss(net, x, normals, jnp.arange(6) < 3)[0].values())

    gradient = jax.jit(jax.grad(loss))(params)
    leaves, structure = jax.tree.flatten(params)
    for seed in range(3):
        random = np.random.default_rng(seed)
        direction = structure.unflatten([jnp.asarray(random.normal(size=leaf.shape)) for leaf in leaves])
        along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        moved = lambda h, d=direction: loss(jax.tree.map(lambda p, q: p + h * q, params, d))
        # Fourth order in the step.
        h = 1e-4
        numeric = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        assert abs(float(numeric - along)) < 1e-6 * abs(float(along)) + 1e-6


def test_slopes_and_second_derivatives_of_the_equilibrium_agree_with_finite_differences():
    net = tight()
    graph, state = nnx.split(net)
    value = jax.jit(lambda x: nnx.merge(graph, state)(x[None]).values[-1][0, 0])
    x, h = jnp.asarray([0.2, -0.4, 0.7]), 1e-5
    slope = jax.jit(jax.grad(value))
    second = jax.jit(jax.jacrev(jax.grad(value)))(x)
    for axis in range(3):
        step = jnp.zeros(3).at[axis].set(h)
        assert abs(float((value(x + step) - value(x - step)) / (2 * h) - slope(x)[axis])) < 1e-8
        np.testing.assert_allclose((slope(x + step) - slope(x - step)) / (2 * h), second[axis], atol=1e-8)


def test_explicit_networks_have_no_states():
    for network in ("siren", "ffn", "one_pass"):
        out = model(network=network)(X)
        assert out.states == () and out.stats is None and out.values[-1].shape == (12, 3)
    assert isinstance(model(), INR) and isinstance(model().deq, DEQ)
