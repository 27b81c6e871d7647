"""Layers whose weights are normalised once per forward pass, and the masks that go with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from deqjax import Implicit, Picard, fixed_point
from deqjax.nn.config import DEQConfig
from deqjax.nn.convolution import conv
from deqjax.nn.dropout import VariationalDropout
from deqjax.nn.layers import NormalizedConv, NormalizedLinear

INIT = nnx.initializers.normal(0.3)
SIZES = {"strides": 1, "padding": "SAME", "dilation": 1, "groups": 1}


def layer(kind, config):
    if kind == "linear":
        return NormalizedLinear(5, 4, config=config, init=INIT, rngs=nnx.Rngs(0), dtype=jnp.float64)
    return NormalizedConv(5, 4, (3, 3), config=config, init=INIT, rngs=nnx.Rngs(0), dtype=jnp.float64)


def inputs(kind):
    shape = (3, 5) if kind == "linear" else (3, 6, 7, 5)
    return jax.random.normal(jax.random.key(1), shape, jnp.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": 1},
        {"strides": 2, "dilation": (1, 2)},
        {"strides": (2, 1), "padding": "VALID"},
        {"padding": ((2, 1), (0, 1)), "dilation": 2},
        {"groups": 2, "padding": 1},
    ],
    ids=str,
)
def test_the_convolution_is_that_of_lax_in_every_derivative(options):
    options = SIZES | options
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 4), jnp.float64)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4 // options["groups"], 6), jnp.float64)
    pair = lambda value: (value, value) if isinstance(value, int) else value
    padding = [pair(p) for p in pair(options["padding"])] if not isinstance(options["padding"], str) else options["padding"]

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            pair(options["strides"]),
            padding,
            rhs_dilation=pair(options["dilation"]),
            feature_group_count=options["groups"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def ours(x, kernel):
        return jnp.sin(conv(jnp.asarray(x), jnp.asarray(kernel), **options))

    np.testing.assert_allclose(ours(x, kernel), jnp.sin(theirs(x, kernel)), rtol=1e-12)
    check_grads(ours, (x, kernel), order=2, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.parametrize("options", [{"strides": 2, "dilation": (1, 2)}, {"padding": ((2, 1), (0, 1)), "dilation": 2}], ids=str)
def test_the_transpose_is_that_of_lax_in_single_precision_too(options):
    """It takes another way there than in double precision."""
    x, kernel = jax.random.normal(jax.random.key(0), (2, 6, 7, 4)), jax.random.normal(jax.random.key(1), (3, 3, 4, 6))
    derivatives = []
    for dtype in (jnp.float32, jnp.float64):
        y, pullback = jax.vjp(lambda x: conv(x, kernel.astype(x.dtype), **options), x.astype(dtype))
        derivatives.append(pullback(jnp.cos(jnp.arange(y.size, dtype=dtype)).reshape(y.shape))[0])
    np.testing.assert_allclose(*derivatives, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_convolutions_over_any_number_of_axes(n):
    x, kernel = jnp.ones((2, *(4,) * n, 3)), jnp.ones((*(3,) * n, 3, 5))
    assert conv(x, kernel, padding="VALID").shape == (2, *(2,) * n, 5)
    np.testing.assert_allclose(conv(x, kernel, padding="VALID"), 3.0 ** (n + 1))
    with pytest.raises(ValueError, match="spatial axes"):
        conv(x, kernel, strides=(1,) * (n + 1))


def test_the_adjoint_of_a_convolution_loops_over_a_kernel_laid_out_for_it():
    kernel = 0.1 * jax.random.normal(jax.random.key(1), (3, 3, 4, 4))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))

    def loss(x):
        f = lambda z: jnp.tanh(conv(z, kernel) + x)
        return jnp.sum(fixed_point(f, jnp.zeros_like(x), gradient=Implicit(solver=Picard(max_steps=20))).value)

    compiled = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    convolutions = [line for line in compiled.splitlines() if " convolution(" in line]
    assert convolutions
    # The slow form on a CPU is the one that swaps the kernel's channels on the fly.
    assert not any("_01oi->" in line for line in convolutions)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("learned", [True, False])
def test_weight_norm_after_training_steps(kind, learned):
    config = DEQConfig(norm_type="weight_norm", norm_no_scale=not learned, norm_target_norm=0.7, norm_clip=True)
    module, x = layer(kind, config), inputs(kind)
    kernel = module.kernel[...]
    if learned:
        np.testing.assert_allclose(module.effective().kernel, kernel, rtol=1e-12)
    for _ in range(4):
        gradient = nnx.grad(lambda m: jnp.sum(m.effective(train=True)(x) ** 3))(module)
        nnx.update(module, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(module, nnx.Param), gradient))
    assert not np.allclose(module.kernel[...], kernel)
    lengths = np.sqrt(np.sum(np.square(module.kernel[...]), axis=tuple(range(kernel.ndim - 1))))
    scale = np.asarray(module.scale[...]) if learned else 0.7
    expected = np.asarray(module.kernel[...]) * np.minimum(1.0, scale / lengths)
    np.testing.assert_allclose(module.effective().kernel, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_spectral_norm_after_training_steps(kind, iterations):
    """Against the power iteration written out, one advance per forward pass in training and none in evaluation."""
    config = DEQConfig(norm_type="spectral_norm", sn_n_power_iters=iterations, norm_target_norm=0.9)
    module, x = layer(kind, config), inputs(kind)
    np.testing.assert_array_equal(module.scale[...], 0.9)
    u, v = np.asarray(module.u[...]), np.asarray(module.v[...])
    unit = lambda a: a / np.linalg.norm(a)
    for _ in range(4):
        matrix = np.moveaxis(np.asarray(module.kernel[...]), -1, 0).reshape(4, -1)
        for _ in range(iterations):
            v = unit(matrix.T @ u)
            u = unit(matrix @ v)

        def loss(m):
            weights = m.effective(train=True)
            return jnp.sum(weights(x) ** 3), weights.kernel

        gradient, kernel = nnx.grad(loss, has_aux=True)(module)
        np.testing.assert_allclose(kernel, module.kernel[...] * module.scale[...] / (u @ matrix @ v), rtol=1e-10)
        nnx.update(module, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(module, nnx.Param), gradient))
    first, again = module.effective().kernel, module.effective().kernel
    np.testing.assert_array_equal(first, again)
    # Evaluation has not advanced the iteration.
    np.testing.assert_allclose(module.u[...], u, rtol=1e-9)
    np.testing.assert_allclose(module.v[...], v, rtol=1e-9)


def test_normalised_convolutions_say_what_does_not_fit():
    with pytest.raises(ValueError, match="groups=3"):
        NormalizedConv(4, 6, (3,), config=DEQConfig(), groups=3, init=INIT, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_dropout_of_channels_and_tokens(n):
    shape = (3, *(4,) * n, 5)
    channels = VariationalDropout.channels(0.5, n).mask(jax.random.key(0), shape)
    tokens = VariationalDropout.tokens(0.5, n).mask(jax.random.key(0), shape)
    assert channels.shape == (3, *(1,) * n, 5) and tokens.shape == (3, *(4,) * n, 1)
    assert VariationalDropout(0.5).mask(jax.random.key(0), shape, jnp.bfloat16).dtype == jnp.bfloat16
    for mask in (channels, tokens):
        assert set(np.unique(mask)) == {0.0, 2.0}
    negative = VariationalDropout(0.5, (-1,)).mask(jax.random.key(0), shape)
    np.testing.assert_array_equal(negative, tokens)
    assert np.all(VariationalDropout(1.0).mask(jax.random.key(0), shape) == 0)
    with pytest.raises(ValueError, match="not all of these are axes"):
        VariationalDropout(0.5, (7,)).mask(jax.random.key(0), shape)
