"""The denoising U-Net: epsilon(x, t), the noise in an image x at timestep t.

What depends on t alone, one bias per channel and residual block, is computed once by `embed`; a chain of fixed timesteps then
has it as a constant. Every layer computes in the dtype of its own weights, see `with_dtype`; normalisation is in float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.annotations import Array, Float, Key, Shaped
from deqjax.models.ddim.config import GROUPS, UNetConfig
from deqjax.nn.convolution import conv
from deqjax.nn.dropout import VariationalDropout, apply_mask
from deqjax.nn.group_norm import GroupNorm


class UNet(nnx.Module):
    """The U-Net of Ho et al. (2020), arXiv 2006.11239, appendix B.

    Attribute paths follow the names in published checkpoints: `down[l].block[b]`, `mid.block_1`, `up[l].attn[b]`, where level
    0 has the full resolution on the way up, too.
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        L, widths = len(config.multipliers), config.widths
        make = _Layers(config, rngs)
        self.temb = nnx.List([make.dense(config.width, make.n_embedding), make.dense(make.n_embedding, make.n_embedding)])
        self.conv_in = make.conv(config.image_channels, config.width)

        skips, n_in, down = [config.width], config.width, []
        for level, n_out in enumerate(widths):
            down.append(Level(n_in, [0] * config.n_blocks, n_out, config, level, "down" if level < L - 1 else "", make))
            skips += [n_out] * (config.n_blocks + (level < L - 1))
            n_in = n_out
        self.down = nnx.List(down)
        self.mid = Middle(n_in, make)
        up: list = [None] * L
        for level in reversed(range(L)):
            concatenated = [skips.pop() for _ in range(config.n_blocks + 1)]
            up[level] = Level(n_in, concatenated, widths[level], config, level, "up" if level else "", make)
            n_in = widths[level]
        self.up = nnx.List(up)
        self.norm_out = GroupNorm(n_in, GROUPS, epsilon=1e-6)
        self.conv_out = make.conv(n_in, config.image_channels, scale=0.0)

    def blocks(self) -> list["ResBlock"]:
        """The residual blocks, in the order in which they are applied."""
        down = [block for level in self.down for block in level.block]
        up = [block for level in self.up[::-1] for block in level.block]
        return [*down, self.mid.block_1, self.mid.block_2, *up]

    def embed(self, t: Shaped[Array, " B"]) -> tuple[Float[Array, "B C"], ...]:
        """What every residual block adds at timesteps t (from 0, real or integer): `[B, channels]` each."""
        h = self.temb[0](sinusoid(t, self.config.width))
        h = nnx.silu(self.temb[1](nnx.silu(h)))
        return tuple(block.temb_proj(h) for block in self.blocks())

    def __call__(self, x: Float[Array, "B H W C"], t: Shaped[Array, " B"], key: Key[Array, ""] | None = None):
        """The noise in x.

        Args:
          x: `[B, R, R, C]` images at timesteps t.
          t: `[B]`.
          key: draws dropout masks, in training.

        Returns:
          `[B, R, R, C]`, in the dtype of x.

        Raises:
          ValueError: the images have another size.
        """
        return self.denoise(x, self.embed(t), key)

    def denoise(
        self, x: Float[Array, "B H W C"], embedding: tuple[Float[Array, "B _"], ...], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B H W C"]:
        """The same with what `embed` made of t."""
        c = self.config
        if x.shape[1:] != (c.image_size, c.image_size, c.image_channels):
            raise ValueError(
                f"images of {'x'.join(map(str, x.shape[1:]))} for a U-Net of {c.image_size}x{c.image_size}x{c.image_channels}."
            )
        given, biases = x.dtype, iter(embedding)
        # What a block needs beside its input.
        masks = (None if key is None else jax.random.fold_in(key, n) for n in range(len(embedding)))
        extra = lambda: (next(biases), next(masks))  # noqa: E731
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for number, block in enumerate(level.block):
                h = level.attend(number, block(h, *extra()))
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h)
                skips.append(h)
        h = self.mid.attn_1(self.mid.block_1(h, *extra()))
        h = self.mid.block_2(h, *extra())
        for level in self.up[::-1]:
            for number, block in enumerate(level.block):
                h = level.attend(number, block(jnp.concatenate([h, skips.pop()], axis=-1), *extra()))
            if level.upsample is not None:
                h = level.upsample(h)
        return self.conv_out(nnx.silu(self.norm_out(h))).astype(given)


def sinusoid(t: Shaped[Array, " B"], width: int) -> Float[Array, "B C"]:
    """Sines, then cosines, of t at frequencies from 1 down to 1/10000; a column of zeros if the width is odd.

    In float32, with the frequencies that PyTorch's arithmetic gives: at t near 1000 their last bit shows in the fifth digit.
    """
    half = width // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1))
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), ((0, 0), (0, width % 2)))


def with_dtype(model: UNet, dtype) -> UNet:
    """A model whose convolutions and linear maps compute in `dtype`, with converted copies of their weights.

    Do it once, outside any loop. Gradients flow to the model given.
    """
    graph, state = nnx.split(model)

    def convert(path, leaf):
        is_norm = any("norm" in str(getattr(entry, "key", "")) for entry in path)
        return leaf if is_norm else leaf.astype(dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(convert, state))


# Blocks --------------------------------------------------------------------------------------------------------------


class ResBlock(nnx.Module):
    """Two convolutions beside a skip connection, with a bias that depends on t in between."""

    def __init__(self, n_in: int, n_out: int, make: "_Layers"):
        self.norm1, self.conv1 = GroupNorm(n_in, GROUPS, epsilon=1e-6), make.conv(n_in, n_out)
        self.temb_proj = make.dense(make.n_embedding, n_out)
        self.norm2, self.conv2 = GroupNorm(n_out, GROUPS, epsilon=1e-6), make.conv(n_out, n_out, scale=0.0)
        self.nin_shortcut = make.dense(n_in, n_out) if n_in != n_out else None
        self.dropout = make.dropout

    def __call__(self, x, bias, key):
        h = self.conv1(nnx.silu(self.norm1(x))) + bias[:, None, None]
        h = nnx.silu(self.norm2(h))
        h = self.conv2(apply_mask(h, self.dropout.mask(key, h.shape, h.dtype)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Attention(nnx.Module):
    """Self-attention of one head over all pixels, beside a skip connection."""

    def __init__(self, n_channels: int, make: "_Layers"):
        self.norm = GroupNorm(n_channels, GROUPS, epsilon=1e-6)
        self.q, self.k, self.v = (make.dense(n_channels, n_channels) for _ in range(3))
        self.proj_out = make.dense(n_channels, n_channels, scale=0.0)

    def __call__(self, x):
        h = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q_BQC, k_BKC, v_BKC = self.q(h), self.k(h), self.v(h)
        scores_BQK = jnp.einsum("BQC,BKC->BQK", q_BQC, k_BKC) * x.shape[-1] ** -0.5
        weights_BQK = jax.nn.softmax(scores_BQK.astype(h.dtype), axis=-1).astype(v_BKC.dtype)
        return x + self.proj_out(jnp.einsum("BQK,BKC->BQC", weights_BQK, v_BKC)).reshape(x.shape)


class Level(nnx.Module):
    """The blocks of one resolution, each with its attention if there is any, and the way to the next resolution."""

    def __init__(self, n_in, concatenated, n_out, config: UNetConfig, level: int, then: str, make: "_Layers"):
        blocks = []
        for n_skip in concatenated:
            blocks.append(ResBlock(n_in + n_skip, n_out, make))
            n_in = n_out
        attends = config.resolutions[level] in config.attention
        self.block = nnx.List(blocks)
        self.attn = nnx.List([Attention(n_out, make) for _ in blocks] if attends else [])
        self.downsample = Downsample(n_out, config.resample_conv, make) if then == "down" else None
        self.upsample = Upsample(n_out, config.resample_conv, make) if then == "up" else None

    def attend(self, number: int, h):
        return self.attn[number](h) if self.attn else h


class Middle(nnx.Module):
    """The bottleneck."""

    def __init__(self, n_channels: int, make: "_Layers"):
        self.block_1 = ResBlock(n_channels, n_channels, make)
        self.attn_1 = Attention(n_channels, make)
        self.block_2 = ResBlock(n_channels, n_channels, make)


class Downsample(nnx.Module):
    """Half the resolution. The convolution is padded on the right and at the bottom only."""

    def __init__(self, n_channels: int, with_conv: bool, make: "_Layers"):
        self.conv = make.conv(n_channels, n_channels, strides=2, padding=((0, 1), (0, 1))) if with_conv else None

    def __call__(self, x):
        if self.conv is not None:
            return self.conv(x)
        B, H, W, C = x.shape
        return x.reshape(B, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4))


class Upsample(nnx.Module):
    """Twice the resolution, every pixel repeated."""

    def __init__(self, n_channels: int, with_conv: bool, make: "_Layers"):
        self.conv = make.conv(n_channels, n_channels) if with_conv else None

    def __call__(self, x):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return x if self.conv is None else self.conv(x)


# Layers --------------------------------------------------------------------------------------------------------------


class Conv(nnx.Module):
    """A convolution of 3x3 that computes in the dtype of its kernel `[3, 3, in, out]`."""

    def __init__(self, kernel, bias, strides: int, padding):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.strides, self.padding = strides, padding

    def __call__(self, x):
        kernel = self.kernel[...]
        y = conv(x.astype(kernel.dtype), kernel, strides=self.strides, padding=self.padding)
        return y + self.bias[...].reshape(1, 1, 1, -1)


class Dense(nnx.Module):
    """A linear map of the last axis that computes in the dtype of its kernel `[in, out]`."""

    def __init__(self, kernel, bias):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

    def __call__(self, x):
        kernel = self.kernel[...]
        return x.astype(kernel.dtype) @ kernel + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


class _Layers(NamedTuple):
    """Makes layers with initial weights as the config has them."""

    config: UNetConfig
    rngs: nnx.Rngs

    @property
    def n_embedding(self) -> int:
        return 4 * self.config.width

    @property
    def dropout(self) -> VariationalDropout:
        return VariationalDropout(self.config.dropout)

    def conv(self, n_in: int, n_out: int, *, strides: int = 1, padding=((1, 1), (1, 1)), scale: float = 1.0) -> Conv:
        return Conv(*self._initial((3, 3, n_in, n_out), scale), strides, padding)

    def dense(self, n_in: int, n_out: int, *, scale: float = 1.0) -> Dense:
        return Dense(*self._initial((n_in, n_out), scale))

    def _initial(self, shape, scale):
        """Kernel and bias. Scale 0, of the last layer of a residual branch, is a tiny number, as in the original."""
        if self.config.init == "ddpm":
            glorot = jax.nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")
            return glorot(self.rngs.params(), shape), jnp.zeros(shape[-1])
        bound = math.prod(shape[:-1]) ** -0.5
        uniform = lambda shape: jax.random.uniform(self.rngs.params(), shape, minval=-bound, maxval=bound)  # noqa: E731
        return uniform(shape), uniform(shape[-1:])
