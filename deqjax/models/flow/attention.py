"""Global motion aggregation: what similar pixels of the first frame do, where a pixel's own motion cannot be seen.

Jiang et al. 2021 (arXiv 2104.02409). The attention depends on the context alone, so it belongs to the injection.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.layers import Conv
from deqjax.nn.config import PLAIN, DEQConfig
from deqjax.nn.layers import ConvWeights, convolve


class Attention(nnx.Module):
    """How much each pixel attends to each.

    Args:
      n_in: channels of the context.
      heads, head_width: their number, and channels of each.
      rngs: draws the initial weights.
      dtype: of the computation.
    """

    def __init__(self, n_in: int, heads: int, head_width: int, rngs: nnx.Rngs, *, dtype: str | None = None):
        self.heads, self.head_width = heads, head_width
        self.to_qk = Conv(n_in, 2 * heads * head_width, 1, rngs, use_bias=False, dtype=dtype)

    def __call__(self, context: Float[Array, "B h w C"]) -> Float[Array, "B heads N N"]:
        B, h, w, _ = context.shape
        q, k = jnp.split(self.to_qk(context).reshape(B, h * w, 2 * self.heads, self.head_width), 2, axis=2)
        scores = self.head_width**-0.5 * jnp.einsum("BNHd,BMHd->BHNM", q, k)
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
        return weights.astype(scores.dtype)


class AggregateWeights(NamedTuple):
    """What aggregation needs during a solve."""

    to_v: ConvWeights
    project: ConvWeights | None
    gamma: jax.Array  # [1]

    def __call__(self, motion, attention):
        """Motion features `[B, h, w, C]` with those of similar pixels added."""
        B, h, w, _ = motion.shape
        v = convolve(motion, self.to_v).reshape(B, h * w, attention.shape[1], -1)
        aggregated = jnp.einsum("BHNM,BMHd->BNHd", attention, v).reshape(B, h, w, -1)
        if self.project is not None:
            aggregated = convolve(aggregated, self.project)
        return motion + self.gamma[0] * aggregated.astype(motion.dtype)


class Aggregate(nnx.Module):
    """Adds to motion features those of similar pixels, at first none (gamma is zero).

    Args:
      n_in: channels of the motion features.
      heads, head_width: as in the attention; channels of the values of each head.
      rngs: draws the initial weights.
      deq: weight normalisation.
      dtype: of the computation.
    """

    def __init__(
        self, n_in: int, heads: int, head_width: int, rngs: nnx.Rngs, *, deq: DEQConfig = PLAIN, dtype: str | None = None
    ):
        settings = {"use_bias": False, "deq": deq, "dtype": dtype}
        self.to_v = Conv(n_in, heads * head_width, 1, rngs, **settings)
        self.project = Conv(heads * head_width, n_in, 1, rngs, **settings) if heads * head_width != n_in else None
        self.gamma = nnx.Param(jnp.zeros((1,)))

    def effective(self, *, train: bool = False) -> AggregateWeights:
        """The weights to use in one forward pass."""
        project = None if self.project is None else self.project.effective(train=train)
        return AggregateWeights(self.to_v.effective(train=train), project, self.gamma[...])
