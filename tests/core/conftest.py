"""The core is held to strict promotion, and warnings are errors in it."""

import warnings

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="session")
def problem():
    """A tanh contraction: W [8, 8], x [4, 8]."""
    W = 0.4 * jax.random.normal(jax.random.key(0), (8, 8), jnp.float64) / 8**0.5
    return W, jax.random.normal(jax.random.key(1), (4, 8), jnp.float64)
