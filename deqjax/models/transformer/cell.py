"""f(z): a stack of weight-tied transformer blocks with the token injection added to queries, keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float, Key
from deqjax.models.transformer.attention import AttentionContext, LayerNorm, NormWeights, RelativeAttention, sinusoids, visible
from deqjax.models.transformer.config import TransformerConfig
from deqjax.models.transformer.memory import Memory
from deqjax.nn.config import DEQConfig
from deqjax.nn.dropout import VariationalDropout, apply_mask
from deqjax.nn.layers import LinearWeights, NormalizedLinear


class BlockMasks(NamedTuple):
    """Dropout masks of one block, or None each."""

    attention: jax.Array | None = None  # [B, 1, D]
    probability: jax.Array | None = None  # [B, H, L, K]
    inner: jax.Array | None = None  # [B, 1, F]
    outer: jax.Array | None = None  # [B, 1, D]


class BlockContext(NamedTuple):
    """What one block needs during a solve."""

    attention: AttentionContext
    inner: LinearWeights
    outer: LinearWeights
    norm: NormWeights
    inner_mask: jax.Array | None
    outer_mask: jax.Array | None


class Injection(NamedTuple):
    """Everything that f depends on besides z."""

    u: jax.Array  # [B, L, 3*H*dh]
    seen: jax.Array  # [L, K]
    blocks: tuple[BlockContext, ...]


class Block(nnx.Module):
    """Attention and feed-forward sub-layers of one block."""

    def __init__(self, config: TransformerConfig, deq: DEQConfig, init, rngs: nnx.Rngs):
        D, F = config.d_model, config.d_inner
        self.config = config
        self.attention = RelativeAttention(config, deq, init, rngs)
        self.inner = NormalizedLinear(D, F, config=deq, init=init, rngs=rngs)
        self.outer = NormalizedLinear(F, D, config=deq, init=init, rngs=rngs)
        self.norm = LayerNorm(D, config.affine, rngs, config.init_std)

    def context(self, memory: Memory, positions_KD, masks: BlockMasks, train: bool) -> BlockContext:
        attention = self.attention.context(memory, positions_KD, masks.attention, masks.probability, train)
        weights = self.inner.effective(train=train), self.outer.effective(train=train), self.norm.effective()
        return BlockContext(attention, *weights, masks.inner, masks.outer)

    def attend(self, z: Float[Array, "B L D"], injection: Injection, context: BlockContext) -> Float[Array, "B L D"]:
        """z after the attention sub-layer."""
        a, _ = self.attention.attend(z, injection.u, injection.seen, context.attention)
        return context.attention.norm_in(z + a) if self.config.norm == "post" else z + a

    def feed_forward(self, z: Float[Array, "B L D"], context: BlockContext) -> Float[Array, "B L D"]:
        """z after the feed-forward sub-layer."""
        x = z if self.config.norm == "post" else context.norm(z)
        y = apply_mask(jax.nn.relu(context.inner(x)), context.inner_mask)
        y = apply_mask(context.outer(y), context.outer_mask)
        if self.config.norm == "post":
            return context.norm(z + y)
        # Adding to the normalised input keeps the state bounded, so that a fixed point exists.
        return (x if self.config.norm == "pre_bounded" else z) + y


class Cell(nnx.Module):
    """The blocks of f in sequence."""

    def __init__(self, config: TransformerConfig, deq: DEQConfig, init, rngs: nnx.Rngs):
        self.config = config
        self.blocks = nnx.List([Block(config, deq, init, rngs) for _ in range(config.n_layer)])

    def context(
        self,
        u: Float[Array, "B L U"],
        memory: Memory,
        position_mask: Float[Array, "..."] | None,
        masks: tuple[BlockMasks, ...],
        train: bool,
    ) -> Injection:
        """The injection of a segment with token injections u `[B, L, 3*H*dh]`."""
        config, L, M = self.config, u.shape[1], memory.z.shape[1]
        positions_KD = sinusoids(M + L, config.d_model, u.dtype)
        if position_mask is not None:
            positions_KD = positions_KD * position_mask
        seen = visible(L, M, memory.length, config.window)
        blocks = tuple(b.context(memory, positions_KD, m, train) for b, m in zip(self.blocks, masks, strict=True))
        return Injection(u, seen, blocks)

    def __call__(self, z: Float[Array, "B L D"], injection: Injection) -> Float[Array, "B L D"]:
        """One application of f to states `[B, L, D]`."""
        for block, context in zip(self.blocks, injection.blocks, strict=True):
            z = block.feed_forward(block.attend(z, injection, context), context)
        return z

    def sample_masks(
        self, key: Key[Array, ""] | None, batch: int, length: int, memory_rows: int, dtype=jnp.float32
    ) -> tuple[BlockMasks, ...]:
        """One set of variational masks for a whole solve; all None without a key."""
        config, K = self.config, memory_rows + length
        feature, attention = VariationalDropout.channels(config.dropout, 1), VariationalDropout(config.dropatt)
        masks = []
        for l in range(config.n_layer):  # noqa: E741
            keys = [None] * 4 if key is None else jax.random.split(jax.random.fold_in(key, l), 4)
            masks.append(
                BlockMasks(
                    attention=feature.mask(keys[0], (batch, length, config.d_model), dtype),
                    probability=attention.mask(keys[1], (batch, config.n_head, length, K), dtype),
                    inner=feature.mask(keys[2], (batch, length, config.d_inner), dtype),
                    outer=feature.mask(keys[3], (batch, length, config.d_model), dtype),
                )
            )
        return tuple(masks)
