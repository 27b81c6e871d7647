"""Linear and convolutional layers for the cell of an equilibrium model.

A layer gives out its effective weights once per forward pass; they belong to the injection, and the cell uses them as
constants at every step of the solve.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from deqjax.core.annotations import Array, Float
from deqjax.nn.config import DEQConfig
from deqjax.nn.convolution import PerAxis, conv
from deqjax.nn.normalization import NormalizedKernel


class LinearWeights(NamedTuple):
    """What a linear layer needs during a solve: kernel `[in, out]` and bias `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None

    def __call__(self, x: Float[Array, "... n_in"]) -> Float[Array, "... n_out"]:
        return _biased(x @ self.kernel, self.bias)


class NormalizedLinear(NormalizedKernel):
    """A linear layer.

    Args:
      in_features, out_features: sizes.
      config: its `norm_*` settings choose the normalisation.
      use_bias: add a bias, zero at first.
      init: of the unnormalised kernel.
    """

    def __init__(self, in_features, out_features, *, config: DEQConfig, use_bias=True, init, rngs: nnx.Rngs, dtype=jnp.float32):
        super().__init__(init(rngs.params(), (in_features, out_features), dtype), config=config, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def effective(self, *, train: bool = False) -> LinearWeights:
        """The weights to use in one forward pass."""
        return LinearWeights(self.normalized(train=train), None if self.bias is None else self.bias[...])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvWeights:
    """What a convolution needs during a solve: kernel `[*window, in / groups, out]` and bias `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None
    options: Mapping = dataclasses.field(default_factory=FrozenDict, metadata={"static": True})

    def __call__(self, x: Float[Array, "B *space n_in"]) -> Float[Array, "B *new_space n_out"]:
        return _biased(conv(x, self.kernel, **self.options), self.bias)


class NormalizedConv(NormalizedKernel):
    """A convolution over any number of spatial axes, channels last.

    Args:
      in_features, out_features: channels.
      kernel_size: of the window, one number for every spatial axis.
      config: its `norm_*` settings choose the normalisation.
      strides, padding, dilation, groups: see `deqjax.nn.convolution.conv`.
      use_bias: add a bias, zero at first.
      init: of the unnormalised kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        config: DEQConfig,
        strides: PerAxis = 1,
        padding: str | PerAxis = "SAME",
        dilation: PerAxis = 1,
        groups: int = 1,
        use_bias: bool = True,
        init,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
    ):
        if in_features % groups or out_features % groups:
            raise ValueError(f"groups={groups} must divide in_features={in_features} and out_features={out_features}.")
        shape = (*kernel_size, in_features // groups, out_features)
        super().__init__(init(rngs.params(), shape, dtype), config=config, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None
        hashable = lambda value: value if isinstance(value, (int, str)) else tuple(value)  # noqa: E731
        options = {"strides": strides, "padding": padding, "dilation": dilation}
        self.options = FrozenDict({name: hashable(value) for name, value in options.items()} | {"groups": groups})

    def effective(self, *, train: bool = False) -> ConvWeights:
        """The weights to use in one forward pass."""
        return ConvWeights(self.normalized(train=train), None if self.bias is None else self.bias[...], self.options)


def convolve(x: Float[Array, "B *space n_in"], weights: ConvWeights) -> Float[Array, "B *new_space n_out"]:
    """A convolution in the kernel's dtype, whatever that of x; a bias is added in float32 or better."""
    y = conv(x.astype(weights.kernel.dtype), weights.kernel, **weights.options)
    return y if weights.bias is None else _biased(y.astype(jnp.promote_types(y.dtype, jnp.float32)), weights.bias)


def uniform(key, shape, dtype=jnp.float32, fan_in: int | None = None):
    """PyTorch's default of convolutions and linear layers, for kernels `[*window, in, out]`, and for biases given fan_in."""
    return jax.random.uniform(key, shape, dtype, -1, 1) / (fan_in or math.prod(shape[:-1])) ** 0.5


def _biased(y, bias):
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
