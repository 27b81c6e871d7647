"""Convolutions of the multiscale networks, with PyTorch's paddings and the published initial distributions."""

import dataclasses

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float
from deqjax.models.mdeq.config import MDEQConfig
from deqjax.nn.config import PLAIN, DEQConfig
from deqjax.nn.layers import ConvWeights, NormalizedConv, convolve, uniform


def normal(key, shape, dtype=jnp.float32):
    """The originals' own, which their initialisation gives to every convolution that it reaches."""
    return 0.01 * jax.random.normal(key, shape, dtype)


class Conv(NormalizedConv):
    """A square convolution with `size // 2` zeros on every side; its input is cast to the network's compute dtype.

    Args:
      n_in, n_out: channels.
      size: of the window.
      config: initial distribution and dtype.
      deq: weight normalisation; by default none.
    """

    def __init__(self, n_in, n_out, size, config: MDEQConfig, rngs, *, strides=1, use_bias=False, deq: DEQConfig = PLAIN):
        missed = deq.norm_type == "weight_norm" and not config.init_normalized
        init = uniform if config.init == "uniform" or missed else normal
        window = (size, size)
        super().__init__(
            n_in, n_out, window, config=deq, strides=strides, padding=size // 2, use_bias=use_bias, init=init, rngs=rngs
        )
        if use_bias:
            shape, fan_in = (n_out,), n_in * size * size
            draw = (lambda key: uniform(key, shape, fan_in=fan_in)) if init is uniform else (lambda key: normal(key, shape))
            self.bias[...] = draw(rngs.params())
        self.dtype = None if config.dtype is None else jnp.dtype(config.dtype)

    def effective(self, *, train: bool = False) -> ConvWeights:
        weights = super().effective(train=train)
        return weights if self.dtype is None else dataclasses.replace(weights, kernel=weights.kernel.astype(self.dtype))

    def __call__(self, x: Float[Array, "B H W n_in"]) -> Float[Array, "B h w n_out"]:
        return convolve(x, self.effective())
