"""From the equilibrium to logits: of the image, or of every pixel."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.mdeq.cell import State
from deqjax.models.mdeq.config import MDEQConfig
from deqjax.models.mdeq.layers import Conv
from deqjax.models.mdeq.resize import resize_bilinear
from deqjax.nn.batch_norm import BatchNorm
from deqjax.nn.layers import LinearWeights, uniform


class ConvBatchNorm(nnx.Module):
    """A convolution and its batch normalisation."""

    def __init__(self, n_in, n_out, size, config: MDEQConfig, rngs, *, strides=1, use_bias=False, affine=True):
        self.conv = Conv(n_in, n_out, size, config, rngs, strides=strides, use_bias=use_bias)
        self.norm = BatchNorm(n_out, momentum=config.batch_norm_momentum, affine=affine)

    def __call__(self, x: Float[Array, "B H W n_in"], *, train: bool) -> Float[Array, "B h w n_out"]:
        return self.norm(self.conv(x), train=train)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions to 4h channels, with a shortcut (He et al. 2016); the three norms learn no scales."""

    def __init__(self, n_in: int, h: int, config: MDEQConfig, rngs: nnx.Rngs):
        sizes = ((n_in, h, 1), (h, h, 3), (h, 4 * h, 1))
        self.layers = nnx.List([ConvBatchNorm(*size, config, rngs, affine=False) for size in sizes])
        self.shortcut = None if n_in == 4 * h else ConvBatchNorm(n_in, 4 * h, 1, config, rngs)

    def __call__(self, x: Float[Array, "B H W n_in"], *, train: bool) -> Float[Array, "B H W n_out"]:
        y = x
        for number, layer in enumerate(self.layers):
            y = layer(jax.nn.relu(y) if number else y, train=train)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x, train=train)))


class ClassificationHead(nnx.Module):
    """Every map widened by a bottleneck and added to the finer ones, halved on their way; then a linear classifier."""

    def __init__(self, config: MDEQConfig, rngs: nnx.Rngs):
        heads, final = config.head_channels, config.final_channels
        self.increase = nnx.List([Bottleneck(C, h, config, rngs) for C, h in zip(config.channels, heads, strict=True)])
        self.down = nnx.List(
            [ConvBatchNorm(4 * a, 4 * b, 3, config, rngs, strides=2, use_bias=True) for a, b in itertools.pairwise(heads)]
        )
        self.final = ConvBatchNorm(4 * heads[-1], final, 1, config, rngs, use_bias=True)
        self.kernel = nnx.Param(uniform(rngs.params(), (final, config.n_classes)))
        self.bias = nnx.Param(uniform(rngs.params(), (config.n_classes,), fan_in=final))

    def __call__(self, z: State, *, train: bool) -> Float[Array, "B classes"]:
        """Logits of every image."""
        y = self.increase[0](z[0], train=train)
        for x, down, increase in zip(z[1:], self.down, self.increase[1:], strict=True):
            y = increase(x, train=train) + jax.nn.relu(down(y, train=train))
        features = jnp.mean(jax.nn.relu(self.final(y, train=train)).astype(z[0].dtype), axis=(1, 2))
        return LinearWeights(self.kernel[...], self.bias[...])(features)


class SegmentationHead(nnx.Module):
    """All maps at the size of the finest, joined, and two convolutions."""

    def __init__(self, config: MDEQConfig, rngs: nnx.Rngs):
        total = sum(config.channels)
        self.mix = ConvBatchNorm(total, total, 1, config, rngs, use_bias=True)
        self.final = Conv(total, config.n_classes, config.final_kernel, config, rngs, use_bias=True)

    def __call__(self, z: State, *, train: bool) -> Float[Array, "B H W classes"]:
        """Logits of every pixel of the finest map."""
        joined = jnp.concatenate([resize_bilinear(x, z[0].shape[1:3], align_corners=True) for x in z], axis=-1)
        return self.final(jax.nn.relu(self.mix(joined, train=train))).astype(z[0].dtype)
