"""From the image to the injection of the finest feature map."""

import jax
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.mdeq.config import MDEQConfig
from deqjax.models.mdeq.layers import Conv
from deqjax.nn.batch_norm import BatchNorm


class Stem(nnx.Module):
    """3x3 convolutions, the first ones of stride 2, each with batch normalisation and ReLU; then, mostly, a pointwise one.

    Args:
      config: `downsample` of the convolutions, at least two, halve the image.
    """

    def __init__(self, config: MDEQConfig, rngs: nnx.Rngs):
        C, convolutions = config.channels[0], max(config.downsample, 2)
        layers = [
            Conv(C if k else config.in_channels, C, 3, config, rngs, strides=2 if k < config.downsample else 1)
            for k in range(convolutions)
        ]
        if config.has_stage0:
            layers.append(Conv(C, C, 1, config, rngs))
        self.convs = nnx.List(layers)
        self.norms = nnx.List([BatchNorm(C, momentum=config.batch_norm_momentum) for _ in layers])

    def __call__(self, images: Float[Array, "B H0 W0 c"], *, train: bool) -> Float[Array, "B H W C"]:
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x), train=train))
        return x
