"""Batch and group normalisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.nn.batch_norm import BatchNorm
from deqjax.nn.group_norm import GroupNorm, group_norm
from deqjax.training.mesh import batch_sharding, make_mesh


def example(shape, dtype=jnp.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(2.0, 3.0, shape), dtype)


def float64(module):
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))


def test_training_normalises_with_the_biased_variance_and_remembers_the_unbiased_one():
    norm, x = float64(BatchNorm(5, momentum=0.3)), example((4, 3, 2, 5))
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 6), jnp.arange(5.0)
    y = norm(x, train=True)
    flat = np.asarray(x).reshape(-1, 5)
    expected = (np.asarray(x) - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * np.arange(1, 6) + np.arange(5)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(norm.mean[...], 0.3 * flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var[...], 0.7 + 0.3 * flat.var(0, ddof=1), rtol=1e-12)


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone():
    norm, x = float64(BatchNorm(5, affine=False)), example((4, 3, 2, 5))
    norm.mean[...], norm.var[...] = jnp.full(5, 1.5), jnp.full(5, 4.0)
    np.testing.assert_allclose(norm(x, train=False), (np.asarray(x) - 1.5) / np.sqrt(4 + 1e-5), rtol=1e-12)
    assert float(norm.mean[...][0]) == 1.5


def test_statistics_of_a_bfloat16_batch_are_those_of_its_values_in_float32():
    norm, x = BatchNorm(3), example((64, 8, 8, 3), jnp.bfloat16)
    y = norm(x, train=True)
    assert y.dtype == jnp.bfloat16
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_the_batch_is_the_global_one_on_a_mesh():
    graph, state = nnx.split(float64(BatchNorm(5)))

    @jax.jit
    def with_statistics(x):
        norm = nnx.merge(graph, state, copy=True)
        y = norm(x, train=True)
        return y, norm.mean[...], norm.var[...]

    x = example((16, 2, 2, 5))
    for one, eight in zip(
        with_statistics(x),
        with_statistics(jax.device_put(x, batch_sharding(make_mesh()))),
        strict=True,
    ):
        np.testing.assert_allclose(one, eight, rtol=1e-12)


def test_the_gradient_flows_through_the_statistics_of_the_batch():
    graph, state = nnx.split(float64(BatchNorm(2)))
    x, weights = example((3, 2, 2)), example((3, 2, 2), seed=1)
    loss = lambda x: jnp.sum(weights * nnx.merge(graph, state, copy=True)(x, train=True))
    # Whatever shifts or scales a whole channel leaves its normalised values as they are.
    gradient = jax.grad(loss)(x)
    np.testing.assert_allclose(jnp.sum(gradient, axis=(0, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(gradient * x, axis=(0, 1)), 0, atol=1e-4)
    step = 1e-6 * example(x.shape, seed=2)
    np.testing.assert_allclose((loss(x + step) - loss(x - step)) / 2, jnp.sum(gradient * step), rtol=1e-6)


def test_one_value_has_no_variance():
    with pytest.raises(ValueError, match="more than one value"):
        BatchNorm(2)(jnp.ones((1, 2)), train=True)


def test_groups_are_contiguous_channels_of_one_sample():
    norm, x = float64(GroupNorm(6, 3)), example((2, 4, 5, 6))
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7), jnp.arange(6.0)
    groups = np.asarray(x).reshape(2, 20, 3, 2)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-11, atol=1e-11)
    # bfloat16 holds two or three digits of a mean far from zero; float32 statistics do not suffer from it.
    coarse = GroupNorm(6, 3, affine=False)((x + 50).astype(jnp.bfloat16))
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(jnp.mean(coarse.reshape(2, 20, 3, 2), axis=(1, 3)), 0, atol=1e-4)
    with pytest.raises(ValueError, match="must divide"):
        GroupNorm(6, 4)


def test_derivatives_of_group_normalisation_are_those_of_its_steps():
    x, dx, scale = example((2, 3, 3, 4)), example((2, 3, 3, 4), seed=1), jnp.arange(1.0, 5)

    def step_by_step(x, scale):
        grouped = x.reshape(2, 9, 2, 2)
        grouped = grouped - grouped.mean((1, 3), keepdims=True)
        return (grouped * jax.lax.rsqrt(jnp.square(grouped).mean((1, 3), keepdims=True) + 0.1)).reshape(x.shape) * scale

    def derivatives(f):
        loss = lambda x, scale: jnp.sum(jnp.sin(f(x, scale)) * dx)
        # Reverse, forward, and two times in every order of the two.
        gradient = jax.grad(loss, (0, 1))
        along = lambda g: lambda x, scale: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, g(x, scale), (dx, scale)))
        forward = lambda x, scale: jax.jvp(loss, (x, scale), (dx, scale))[1]
        tangents = [jax.jvp(g, (x, scale), (dx, scale)) for g in (f, gradient, forward)]
        return [gradient(x, scale), jax.grad(along(gradient))(x, scale), jax.grad(forward)(x, scale), tangents]

    ours = derivatives(lambda x, scale: group_norm(x, 2, scale, epsilon=0.1))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    jax.tree.map(close, ours, derivatives(step_by_step))
    assert group_norm(x[:0], 2).shape == (0, 3, 3, 4)
