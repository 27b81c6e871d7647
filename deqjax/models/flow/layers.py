"""Convolutions of the flow networks, with PyTorch's paddings and initial distributions."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float
from deqjax.nn.config import PLAIN, DEQConfig
from deqjax.nn.layers import ConvWeights, NormalizedConv, convolve, uniform


def he_normal(key, shape, dtype=jnp.float32):
    """N(0, 2 / (out * window)), of the encoders' kernels (He et al. 2015)."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1]))


class Conv(NormalizedConv):
    """A convolution with half a window of zeros on every side; its bias is drawn as PyTorch does.

    Args:
      n_in, n_out: channels.
      window: its height and width, or both in one number.
      deq: weight normalisation; by default none.
      init: of the kernel.
      dtype: of the computation; None leaves it that of the kernel.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        window: int | tuple[int, int],
        rngs,
        *,
        strides: int = 1,
        use_bias: bool = True,
        deq: DEQConfig = PLAIN,
        init=uniform,
        dtype: str | None = None,
    ):
        window = (window, window) if isinstance(window, int) else window
        padding = tuple(k // 2 for k in window)
        super().__init__(
            n_in, n_out, window, config=deq, strides=strides, padding=padding, use_bias=use_bias, init=init, rngs=rngs
        )
        if use_bias:
            self.bias[...] = uniform(rngs.params(), (n_out,), fan_in=n_in * math.prod(window))
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    def effective(self, *, train: bool = False) -> ConvWeights:
        weights = super().effective(train=train)
        return weights if self.dtype is None else dataclasses.replace(weights, kernel=weights.kernel.astype(self.dtype))

    def __call__(self, x: Float[Array, "B H W n_in"]) -> Float[Array, "B h w n_out"]:
        return convolve(x, self.effective())
