"""f(z): residual blocks on every feature map, then fusion of all maps with all others.

Bai et al. 2020 (arXiv 2006.08656), section 3; the order of operations is that of the released code. A state is a tuple of
maps `[B, H / 2^i, W / 2^i, C_i]`, never joined.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float, Key
from deqjax.models.mdeq.config import MDEQConfig
from deqjax.models.mdeq.layers import Conv
from deqjax.nn.config import PLAIN, DEQConfig
from deqjax.nn.dropout import VariationalDropout, apply_mask
from deqjax.nn.group_norm import GroupNorm, GroupNormWeights
from deqjax.nn.layers import ConvWeights, convolve

State = tuple[jax.Array, ...]  # [B, H / 2^i, W / 2^i, C_i] each


class BlockWeights(NamedTuple):
    """What a residual block needs during a solve."""

    conv1: ConvWeights
    norm1: GroupNormWeights
    conv2: ConvWeights
    norm2: GroupNormWeights
    norm3: GroupNormWeights

    def __call__(self, z, u, mask):
        a = jax.nn.relu(self.norm1(convolve(z, self.conv1)))
        b = apply_mask(convolve(a, self.conv2), mask)
        # The injection comes before the second normalisation, the last one after the ReLU: so it is in the released code.
        b = self.norm2(b if u is None else b + u)
        return self.norm3(jax.nn.relu(b + z))


class ConvNormWeights(NamedTuple):
    """A convolution and its group normalisation during a solve."""

    conv: ConvWeights
    norm: GroupNormWeights

    def __call__(self, x):
        return self.norm(convolve(x, self.conv))


class CellWeights(NamedTuple):
    """The weights of f, normalised once per forward pass."""

    blocks: tuple[tuple[BlockWeights, ...], ...]  # of every map
    fuse: tuple[tuple[tuple[ConvNormWeights, ...], ...], ...]  # [to][from], the stages; none from a map to itself
    post: tuple[ConvNormWeights, ...]  # of every map; none if there is but one


class Injection(NamedTuple):
    """Everything that f depends on besides z."""

    u: jax.Array  # [B, H, W, C_0]: only the finest map sees the image
    weights: CellWeights
    masks: tuple[tuple[jax.Array | None, ...], ...]  # [B, 1, 1, C_i] of every block of every map


class ResidualBlock(nnx.Module):
    """Two convolutions around an injection, with three group normalisations."""

    def __init__(self, C: int, big_kernels: int, config: MDEQConfig, deq: DEQConfig, rngs: nnx.Rngs):
        inner, sizes = int(config.expansion * C), (5 if big_kernels >= 1 else 3, 5 if big_kernels >= 2 else 3)
        norm = lambda n: GroupNorm(n, config.n_groups, affine=config.block_affine)  # noqa: E731
        self.conv1, self.conv2 = (
            Conv(n_in, n_out, size, config, rngs, deq=deq) for n_in, n_out, size in ((C, inner, sizes[0]), (inner, C, sizes[1]))
        )
        self.norm1, self.norm2, self.norm3 = norm(inner), norm(C), norm(C)

    def effective(self, *, train: bool) -> BlockWeights:
        conv1, conv2 = self.conv1.effective(train=train), self.conv2.effective(train=train)
        return BlockWeights(conv1, self.norm1.effective(), conv2, self.norm2.effective(), self.norm3.effective())


class ConvNorm(nnx.Module):
    """A convolution and its group normalisation."""

    def __init__(self, conv: Conv, norm: GroupNorm):
        self.conv, self.norm = conv, norm

    def effective(self, *, train: bool) -> ConvNormWeights:
        return ConvNormWeights(self.conv.effective(train=train), self.norm.effective())


class Cell(nnx.Module):
    """f.

    Args:
      config: sizes.
      deq: weight normalisation of those convolutions that `config.normalized` says.
      rngs: draws the initial weights.
    """

    def __init__(self, config: MDEQConfig, deq: DEQConfig, rngs: nnx.Rngs):
        fuse = deq if config.normalized == "all" else PLAIN
        post = PLAIN if config.normalized == "branches" else deq
        n, channels = len(config.channels), config.channels
        self.config = config
        self.blocks = nnx.List(
            [
                nnx.List([ResidualBlock(C, big, config, deq, rngs) for _ in range(n_blocks)])
                for C, big, n_blocks in zip(channels, config.big_kernels, config.n_blocks, strict=True)
            ]
        )

        def stages(to: int, of: int):
            """Upwards one pointwise convolution; downwards strided ones, the last of which changes the channels."""
            norm = lambda n: GroupNorm(n, config.n_groups, affine=config.fuse_affine)  # noqa: E731
            if of > to:
                return [ConvNorm(Conv(channels[of], channels[to], 1, config, rngs, deq=fuse), norm(channels[to]))]
            outputs = [channels[of]] * (to - of - 1) + [channels[to]] * (to > of)
            return [ConvNorm(Conv(channels[of], C, 3, config, rngs, strides=2, deq=fuse), norm(C)) for C in outputs]

        self.fuse = nnx.List([nnx.List([nnx.List(stages(to, of)) for of in range(n)]) for to in range(n)])
        post_norm = lambda C: GroupNorm(C, config.n_groups // 2, affine=config.post_affine)  # noqa: E731
        posts = [ConvNorm(Conv(C, C, 1, config, rngs, deq=post), post_norm(C)) for C in channels] if n > 1 else []
        self.post = nnx.List(posts)

    def effective(self, *, train: bool) -> CellWeights:
        """The weights to use in one forward pass; training advances the power iterations of spectral normalisation."""
        of_stages = lambda stages: tuple(stage.effective(train=train) for stage in stages)  # noqa: E731
        return CellWeights(
            blocks=tuple(of_stages(blocks) for blocks in self.blocks),
            fuse=tuple(tuple(of_stages(stages) for stages in row) for row in self.fuse),
            post=of_stages(self.post),
        )

    def sample_masks(self, key: Key[Array, ""] | None, batch: int) -> tuple[tuple[jax.Array | None, ...], ...]:
        """One mask per residual block, which drops whole channels of a sample; None without a key."""
        dropout, masks = VariationalDropout.channels(self.config.dropout, 2), []
        for i, (C, n_blocks) in enumerate(zip(self.config.channels, self.config.n_blocks, strict=True)):
            keys = [None if key is None else jax.random.fold_in(jax.random.fold_in(key, i), b) for b in range(n_blocks)]
            masks.append(tuple(dropout.mask(k, (batch, 1, 1, C)) for k in keys))
        return tuple(masks)

    def __call__(self, z: State, injection: Injection) -> State:
        """One application of f."""
        weights = injection.weights
        blocks = run_blocks(z, injection)
        if len(z) == 1:
            return _like(z, blocks)
        fused = [
            sum(transform(blocks[of], stages, of - to) for of, stages in enumerate(row)) for to, row in enumerate(weights.fuse)
        ]
        return _like(z, [post(jax.nn.relu(y)) for post, y in zip(weights.post, fused, strict=True)])


def run_blocks(z: State, injection: Injection) -> list[Float[Array, "B h w C"]]:
    """The residual blocks of every map; the first block of the finest takes the image."""
    outputs = []
    for i, (x, blocks, masks) in enumerate(zip(z, injection.weights.blocks, injection.masks, strict=True)):
        for b, (block, mask) in enumerate(zip(blocks, masks, strict=True)):
            x = block(x, injection.u if i == b == 0 else None, mask)
        outputs.append(x)
    return outputs


def transform(x: Float[Array, "B h w C"], stages: Sequence[ConvNormWeights], octaves: int) -> Float[Array, "B H W D"]:
    """A map on its way to another; it is coarser by so many halvings (finer, if negative)."""
    for number, stage in enumerate(stages):
        x = stage(jax.nn.relu(x) if number else x)
    return repeat_pixels(x, 2**octaves) if octaves > 0 else x


def repeat_pixels(x: Float[Array, "B h w C"], times: int) -> Float[Array, "B H W C"]:
    """Every pixel as a square of times x times."""
    B, h, w, C = x.shape
    squares = jnp.broadcast_to(x[:, :, None, :, None], (B, h, times, w, times, C))
    return squares.reshape(B, h * times, w * times, C)


def _like(z, outputs) -> State:
    return tuple(y.astype(x.dtype) for x, y in zip(z, outputs, strict=True))
