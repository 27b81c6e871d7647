"""Estimates of stability against matrices whose answers are known; the comparison of gradient rules."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax import Anderson, fixed_point_correction, jacobian_loss, spectral_radius
from tests.core.test_solvers import with_spectrum


def test_the_jacobian_loss_is_the_squared_norm_per_entry():
    A = jax.random.normal(jax.random.key(0), (6, 6))
    estimate = jacobian_loss(lambda z: z @ A, jnp.zeros((500, 6)), jax.random.key(1), n_probes=20)
    np.testing.assert_allclose(estimate, jnp.sum(A**2) / 6, rtol=0.05)
    # Probes of different leaves are independent.
    z = jnp.zeros((500, 6))
    mixed = jacobian_loss(lambda z: (z[0] + z[1],) * 2, (z, z), jax.random.key(1), n_probes=20)
    np.testing.assert_allclose(mixed, 2, rtol=0.05)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
def test_a_dominant_real_eigenvalue_is_found_by_both(method):
    A = with_spectrum(jnp.asarray([0.9, -0.5, 0.3, 0.2, 0.1]))
    radius = jax.jit(lambda key: spectral_radius(lambda z: z @ A, jnp.zeros((3, 5)), key, method=method))(jax.random.key(2))
    np.testing.assert_allclose(radius, 0.9, rtol=1e-2)


def test_arnoldi_sees_a_complex_pair_per_sample():
    turn = jnp.asarray([[0.0, -1.0], [1.0, 0.0]])
    A = jnp.zeros((6, 6)).at[:2, :2].set(0.8 * turn).at[2:, 2:].set(jnp.diag(jnp.asarray([0.5, 0.4, -0.3, 0.1])))
    scale = jnp.asarray([1.0, 2.0])
    f = lambda z: scale[:, None] * (z @ A)
    radius = spectral_radius(f, jnp.zeros((2, 6)), jax.random.key(0), steps=6, method="arnoldi")
    np.testing.assert_allclose(radius, [0.8, 1.6], rtol=1e-2)
    with pytest.raises(ValueError, match="arnoldi"):
        spectral_radius(f, jnp.zeros((2, 6)), jax.random.key(0), method="lanczos")


def test_check_gradients_ranks_the_rules(problem):
    f = lambda z, W, x, mask: jnp.where(mask[None], jnp.tanh(z @ W + x), 0.5 * z)
    errors = deqjax.check_gradients(
        f, jnp.zeros_like(problem[1]), *problem, jnp.arange(8) > 1, solver=Anderson(max_steps=30, tol=1e-12)
    )
    # Fifty steps from the solution are as good as exact where f contracts.
    assert errors["implicit"] < 1e-5 and errors["phantom, 50 steps"] < 1e-8
    assert errors["phantom, 50 steps"] < errors["phantom, 5 steps"] < errors["one step"]


def test_check_gradients_needs_something_to_differentiate():
    with pytest.raises(ValueError, match="args"):
        deqjax.check_gradients(lambda z, n: 0.5 * z, jnp.zeros((2, 3)), jnp.arange(3))


def test_what_cannot_be_estimated_is_explained():
    z, key = jnp.zeros((2, 3)), jax.random.key(0)
    with pytest.raises(ValueError, match="give a key"):
        jacobian_loss(jnp.tanh, z)
    for estimate in (jacobian_loss, spectral_radius):
        with pytest.raises(TypeError, match="keep shape and dtype"):
            estimate(lambda z: z[:, :2], z, key)
        with pytest.raises(TypeError, match="floating point"):
            inspect.unwrap(estimate)(lambda z: z, z.astype(int), key)
    for method in ("power", "arnoldi"):
        with pytest.raises(ValueError, match="steps=0"):
            spectral_radius(jnp.tanh, z, key, steps=0, method=method)
    with pytest.raises(ValueError, match="n_probes=0"):
        jacobian_loss(jnp.tanh, z, key, n_probes=0)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
def test_a_radius_has_no_bound_and_what_is_not_finite_has_none(method):
    radius = lambda f, z=0.0: spectral_radius(f, jnp.full((2, 3), z, jnp.float32), jax.random.key(0), method=method, steps=4)
    for size in (1e-30, 1e-25, 1e20, 1e30):
        np.testing.assert_allclose(radius(lambda z, size=size: size * z), size, rtol=1e-4)
    coarse = spectral_radius(lambda z: 0.9 * z, jnp.zeros((3, 50), jnp.bfloat16), jax.random.key(0), method=method, steps=12)
    np.testing.assert_allclose(coarse, 0.9, rtol=1e-2)
    assert not np.any(np.isfinite(radius(jnp.sqrt)))  # the derivative at 0 is infinite
    assert np.all(np.isnan(radius(lambda z: jnp.nan * z)))


@pytest.mark.parametrize("method", ["power", "arnoldi"])
def test_a_map_that_forgets_its_state_has_no_radius(method):
    """A nilpotent Jacobian and an empty one: every power of them ends in nothing."""
    A = jnp.stack([jnp.diag(jnp.ones(3), 1), jnp.zeros((4, 4))])
    f = lambda z: jnp.einsum("BD,BDE->BE", z, A)
    np.testing.assert_allclose(spectral_radius(f, jnp.zeros((2, 4)), jax.random.key(0), steps=10, method=method), 0, atol=1e-3)
    with pytest.raises(ValueError, match="give a key"):
        spectral_radius(f, jnp.zeros((2, 4)), method=method)


def test_the_correction_with_constant_weights_takes_the_gamma_of_a_config():
    criterion = lambda z, target: jnp.abs(z - target)
    total = fixed_point_correction(criterion, [1.0, 2.0, 3.0], 0.0, weighting="const", gamma=0.8)
    np.testing.assert_allclose(total, 6.0)
    with pytest.raises(ValueError, match="no state"):
        fixed_point_correction(criterion, [], 0.0)
