"""Relative-position attention with memory (Dai et al. 2019, section 3), split into what a solve needs once and each step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Bool, Float, Int
from deqjax.models.transformer.config import TransformerConfig
from deqjax.models.transformer.memory import Memory
from deqjax.nn.config import DEQConfig
from deqjax.nn.dropout import apply_mask
from deqjax.nn.layers import LinearWeights, NormalizedLinear


class NormWeights(NamedTuple):
    """Scale and bias of a layer norm, both None without affine."""

    scale: jax.Array | None
    bias: jax.Array | None

    def __call__(self, x: Float[Array, "... D"], epsilon: float = 1e-5) -> Float[Array, "... D"]:
        # Statistics in float32 even when the state is bfloat16.
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
        if self.scale is not None:
            shape = (1,) * (y.ndim - 1) + (-1,)
            y = y * self.scale.reshape(shape) + self.bias.reshape(shape)
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over features, epsilon 1e-5, with or without affine."""

    def __init__(self, features: int, affine: bool, rngs: nnx.Rngs, init_std: float = 0.01):
        self.scale = nnx.Param(1 + init_std * jax.random.normal(rngs.params(), (features,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((features,))) if affine else None

    def effective(self) -> NormWeights:
        return NormWeights(*(None if p is None else p[...] for p in (self.scale, self.bias)))


class AttentionContext(NamedTuple):
    """Everything of one attention layer that is constant during a solve."""

    qkv: LinearWeights
    output: LinearWeights
    norm_in: NormWeights
    norm_out: NormWeights | None
    content_bias: jax.Array  # [H, dh] r_w_bias
    position_bias: jax.Array  # [H, dh] r_r_bias
    memory_keys: jax.Array  # [B, M, H, dh]
    memory_values: jax.Array
    positions: jax.Array  # [K, H, dh] projected; row j stands for distance K-1-j
    mask: jax.Array | None  # dropout of the output, [B, 1, D]
    probability_mask: jax.Array | None  # dropout of the probabilities, [B, H, L, K]


def split_heads(x, n_head: int, interleaved: bool):
    """Queries, keys and values `[..., H, dh]` from `[..., 3*H*dh]`."""
    if interleaved:
        parts = x.reshape(*x.shape[:-1], n_head, 3, x.shape[-1] // (3 * n_head))
        return parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
    parts = x.reshape(*x.shape[:-1], 3, n_head, x.shape[-1] // (3 * n_head))
    return parts[..., 0, :, :], parts[..., 1, :, :], parts[..., 2, :, :]


def sinusoids(n_rows: int, d_model: int, dtype=jnp.float32) -> Float[Array, "K D"]:
    """`[K, D]`: row j encodes distance K-1-j as [all sines, all cosines]."""
    distances = jnp.arange(n_rows - 1, -1, -1, dtype=dtype)
    frequencies = 1 / 10000 ** (jnp.arange(0, d_model, 2, dtype=dtype) / d_model)
    angles = distances[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def visible(length: int, memory_rows: int, memory_length: Int[Array, ""], window: int | None) -> Bool[Array, "L K"]:
    """`[L, K]`: may query i see key j? Not the future, nothing beyond the window, no empty memory row."""
    i, j = jnp.arange(length)[:, None], jnp.arange(memory_rows + length)[None, :]
    distance = memory_rows + i - j
    seen = (distance >= 0) & (j >= memory_rows - memory_length)
    return seen if window is None else seen & (distance < window)


def relative_shift(scores_BHLK: Float[Array, "B H L K"]) -> Float[Array, "B H L K"]:
    """Turns scores against position rows into scores against keys: entry (i, j) moves to row j + L-1-i.

    Entries with the key after the query hold leftovers of neighbouring rows; the caller masks them.
    """
    B, H, L, K = scores_BHLK.shape
    padded = jnp.pad(scores_BHLK, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(B, H, K + 1, L)
    return padded[:, :, 1:].reshape(B, H, L, K)


class RelativeAttention(nnx.Module):
    """Parameters of one attention layer. `context` is evaluated once per segment, `attend` at every solver step."""

    def __init__(self, config: TransformerConfig, deq: DEQConfig, init, rngs: nnx.Rngs):
        D, H, dh = config.d_model, config.n_head, config.d_head
        self.config = config
        linear = lambda n_out, bias: NormalizedLinear(D, n_out, config=deq, use_bias=bias, init=init, rngs=rngs)  # noqa: E731
        self.qkv = linear(3 * H * dh, False)
        self.position = linear(H * dh, False)
        self.output = linear(D, True)
        uniform = lambda: jax.random.uniform(rngs.params(), (H, dh), minval=-0.05, maxval=0.05)  # noqa: E731
        self.content_bias, self.position_bias = nnx.Param(uniform()), nnx.Param(uniform())
        self.norm_in = LayerNorm(D, config.affine, rngs, config.init_std)
        self.norm_out = LayerNorm(D, True, rngs, config.init_std) if config.attention_norm else None

    def context(
        self,
        memory: Memory,
        positions_KD: Float[Array, "K D"],
        mask: Float[Array, "B 1 D"] | None,
        probability_mask: Float[Array, "B H L K"] | None,
        train: bool,
    ) -> AttentionContext:
        """Effective weights, the memory's keys and values, the projected positions."""
        config, qkv, norm_in = self.config, self.qkv.effective(train=train), self.norm_in.effective()
        z = memory.z if config.norm == "post" else norm_in(memory.z)
        _, keys, values = split_heads(qkv(z) + memory.u, config.n_head, config.interleaved)
        positions = self.position.effective(train=train)(positions_KD)
        return AttentionContext(
            qkv=qkv,
            output=self.output.effective(train=train),
            norm_in=norm_in,
            norm_out=None if self.norm_out is None else self.norm_out.effective(),
            content_bias=self.content_bias[...],
            position_bias=self.position_bias[...],
            memory_keys=keys,
            memory_values=values,
            positions=positions.reshape(-1, config.n_head, config.d_head),
            mask=mask,
            probability_mask=probability_mask,
        )

    def attend(
        self, z: Float[Array, "B L D"], u: Float[Array, "B L U"], seen_LK: Bool[Array, "L K"], context: AttentionContext
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B H L K"]]:
        """The attention sub-layer's contribution at state z `[B, L, D]`, and its probabilities `[B, H, L, K]`."""
        config = self.config
        c = z if config.norm == "post" else context.norm_in(z)
        q, k, v = split_heads(context.qkv(c) + u, config.n_head, config.interleaved)
        k = jnp.concatenate([context.memory_keys, k], axis=1)
        v = jnp.concatenate([context.memory_values, v], axis=1)
        content_BHLK = jnp.einsum("blhd,bkhd->bhlk", q + context.content_bias[None, None], k)
        position_BHLK = jnp.einsum("blhd,khd->bhlk", q + context.position_bias[None, None], context.positions)
        scores_BHLK = (content_BHLK + relative_shift(position_BHLK)) / config.d_head**0.5
        scores_BHLK = scores_BHLK.astype(jnp.promote_types(scores_BHLK.dtype, jnp.float32))
        scores_BHLK = jnp.where(seen_LK[None, None], scores_BHLK, -jnp.inf)
        probabilities_BHLK = jax.nn.softmax(scores_BHLK, axis=-1).astype(z.dtype)
        dropped = apply_mask(probabilities_BHLK, context.probability_mask)
        a = jnp.einsum("bhlk,bkhd->blhd", dropped, v).reshape(z.shape)
        if context.norm_out is not None:
            a = context.norm_out(a)
        return apply_mask(context.output(a), context.mask), probabilities_BHLK
