"""The explicit networks to compare with: SIREN, and Gaussian Fourier features."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.inr.config import INRConfig
from deqjax.models.inr.network import Output, linear
from deqjax.models.inr.sine import cos, sin

_HIGHEST = jax.lax.Precision.HIGHEST


class Siren(nnx.Module):
    """sin(omega (W h + b)) in L hidden layers, with `input_scale` for omega in the first (Sitzmann et al. 2020)."""

    def __init__(self, config: INRConfig, rngs: nnx.Rngs):
        d, D = config.n_in, config.n_hidden
        bound = (6 / D) ** 0.5 / config.omega
        hidden = [linear(D, D, rngs, bound=bound) for _ in range(config.n_layers - 1)]
        self.config = config
        self.layers = nnx.List([linear(d, D, rngs, bound=1 / d), *hidden, linear(D, config.n_out, rngs, bound=bound)])

    def __call__(self, x: Float[Array, "N d"], *, train: bool = False) -> Output:
        """The values at the coordinates x."""
        first, *hidden, last = (layer.effective() for layer in self.layers)
        h = sin(self.config.input_scale * (jnp.matmul(x, first.kernel, precision=_HIGHEST) + first.bias[None]))
        for layer in hidden:
            h = sin(self.config.omega * layer(h))
        y = last(h)
        return Output((sin(self.config.omega * y) if self.config.linear_output is False else y,), (), None, None)


class Frequencies(nnx.Variable):
    """Random frequencies and their amplitudes, which are not trained."""


class FourierFeatures(nnx.Module):
    """L hidden ReLU layers on sines and cosines of 2 pi x B, B normal and fixed; a sine at the end (Tancik et al. 2020)."""

    def __init__(self, config: INRConfig, rngs: nnx.Rngs):
        D, n = config.n_hidden, config.n_features
        self.config = config
        self.frequencies = Frequencies(config.feature_scale * jax.random.normal(rngs.params(), (config.n_in, n), jnp.float32))
        self.amplitudes = Frequencies(jnp.ones((n,), jnp.float32))
        sizes = [2 * n, *[D] * config.n_layers, config.n_out]
        self.layers = nnx.List([linear(a, b, rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: Float[Array, "N d"], *, train: bool = False) -> Output:
        """The values at the coordinates x."""
        phase = 2 * jnp.pi * jnp.matmul(x, self.frequencies[...], precision=_HIGHEST)
        amplitudes = self.amplitudes[...][None]
        h = jnp.concatenate([amplitudes * sin(phase), amplitudes * cos(phase)], axis=1)
        *hidden, last = (layer.effective() for layer in self.layers)
        for layer in hidden:
            h = jax.nn.relu(layer(h))
        y = last(h)
        return Output((y if self.config.linear_output else sin(y),), (), None, None)
