"""The filters: all that a representation makes of its coordinates, computed once per forward pass."""

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.inr.config import INRConfig
from deqjax.models.inr.sine import sin

# Phases reach 247 radians for a picture of 512 pixels and 17,658 for a song: fewer mantissa bits would scramble them.
_HIGHEST = jax.lax.Precision.HIGHEST


class Filters(nnx.Module):
    """L + 1 filters of D features each: u = h, sin(h), or sin(h) under Gaussian envelopes, of h = x A + a.

    (Huang et al. 2021, section 3; Fathony et al. 2021, section 3.)
    """

    def __init__(self, config: INRConfig, rngs: nnx.Rngs):
        d, L, D = config.n_in, config.n_layers, config.n_hidden
        n = (L + 1) * D
        uniform = lambda shape, low, high: jax.random.uniform(rngs.params(), shape, jnp.float32, low, high)  # noqa: E731
        kernel = uniform((d, n), -1, 1) / d**0.5 * (config.input_scale / (L + 1) ** 0.5)
        self.config = config
        mu = gamma = None
        if config.filter == "gabor":
            alpha = jnp.full((n,), config.gabor_alpha, jnp.float32)
            if config.recipe == "original":
                alpha = alpha.at[:D].set(6.0) / (L + 1)
            drawn = jax.random.gamma(rngs.params(), alpha, dtype=jnp.float32)
            kernel = kernel * jnp.sqrt(drawn)
            mu, gamma = nnx.Param(uniform((n, d), -1, 1)), nnx.Param(drawn)
        self.mu, self.gamma = mu, gamma
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(uniform((n,), -jnp.pi, jnp.pi))

    def __call__(self, x: Float[Array, "N d"]) -> tuple[Float[Array, "N D"], ...]:
        """u_0 of the state, then u_1 .. u_L of the layers."""
        h = jnp.matmul(x, self.kernel[...], precision=_HIGHEST) + self.bias[...][None]
        if self.config.filter != "siren_like":
            h = sin(h)
        if self.config.filter == "gabor":
            h = h * jnp.exp(-0.5 * self._inverse_variance()[None] * self._squared_distance(x))
        return tuple(jnp.split(h, self.config.n_layers + 1, axis=1))

    def _inverse_variance(self):
        gamma = self.gamma[...]
        return jax.nn.relu(gamma) if self.config.recipe == "original" else gamma

    def _squared_distance(self, x):
        mu = self.mu[...]
        lengths = jnp.sum(jnp.square(x), axis=1, keepdims=True) + jnp.sum(jnp.square(mu), axis=1)[None]
        return lengths - 2 * jnp.matmul(x, mu.T, precision=_HIGHEST)
