"""From pictures to maps of an eighth of their size: of features to correlate, and of context."""

import jax
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.layers import Conv, he_normal
from deqjax.nn.batch_norm import BatchNorm
from deqjax.nn.group_norm import group_norm


class InstanceNorm(nnx.Module):
    """Normalises every channel of every sample over its pixels, `[B, H, W, C]`; the variance is the biased one.

    Nothing is learnt, and evaluation is as training (Ulyanov et al. 2016). Computed in float32 or better.
    """

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B H W C"]:
        return group_norm(x, x.shape[-1]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two convolutions, each with normalisation and ReLU, beside a shortcut; a ReLU comes before the sum and after it."""

    def __init__(self, n_in: int, n_out: int, strides: int, norm, conv):
        self.conv1, self.norm1 = conv(n_in, n_out, 3, strides=strides), norm(n_out)
        self.conv2, self.norm2 = conv(n_out, n_out, 3), norm(n_out)
        self.shortcut = conv(n_in, n_out, 1, strides=strides) if strides > 1 else None
        self.norm3 = norm(n_out) if strides > 1 else None

    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w D"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), train=train))
        y = jax.nn.relu(self.norm2(self.conv2(y), train=train))
        if self.shortcut is not None:
            x = self.norm3(self.shortcut(x), train=train)
        return jax.nn.relu(x + y)


class Encoder(nnx.Module):
    """RAFT's encoder (Teed and Deng 2020): 64, 96 and 128 channels at a half, a quarter and an eighth of the size.

    Args:
      n_out: channels of the output.
      norm: "instance" (features) or "batch" (context).
      rngs: draws the initial weights.
      dtype: of the convolutions.
    """

    def __init__(self, n_out: int, norm: str, rngs: nnx.Rngs, *, dtype: str | None = None):
        def new_conv(n_in, n_out, window, strides=1):
            return Conv(n_in, n_out, window, rngs, strides=strides, init=he_normal, dtype=dtype)

        new_norm = {"instance": lambda n: InstanceNorm(), "batch": BatchNorm}[norm]
        self.conv1, self.norm1 = new_conv(3, 64, 7, strides=2), new_norm(64)
        self.layers = nnx.List(
            [
                nnx.List(
                    [
                        ResidualBlock(n_in, n_out, strides, new_norm, new_conv),
                        ResidualBlock(n_out, n_out, 1, new_norm, new_conv),
                    ]
                )
                for n_in, n_out, strides in ((64, 64, 1), (64, 96, 2), (96, 128, 2))
            ]
        )
        self.conv2 = new_conv(128, n_out, 1)

    def __call__(self, images: Float[Array, "B H W 3"], *, train: bool = False) -> Float[Array, "B h w n_out"]:
        """Maps of pictures scaled to -1..1; `train` lets batch normalisation go by the batch, and remember it."""
        x = jax.nn.relu(self.norm1(self.conv1(images), train=train))
        for layer in self.layers:
            for block in layer:
                x = block(x, train=train)
        return self.conv2(x)
