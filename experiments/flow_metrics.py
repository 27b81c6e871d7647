"""Losses and scores of optical flow."""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float

# Vectors longer than this are left out of the loss.
LONGEST = 400.0
# EPE thresholds in pixels.
WITHIN = (1, 3, 5)


def counted(truth: Float[Array, "B H W 2"], valid: Float[Array, "B H W"]) -> Float[Array, "B H W"]:
    """1 where a vector is known and not too long, else 0."""
    return ((valid >= 0.5) & (_length(truth) < LONGEST)).astype(truth.dtype)


def masked_l1(flow: Float[Array, "B H W 2"], truth: Float[Array, "B H W 2"], valid: Float[Array, "B H W"]) -> Float[Array, ""]:
    """Mean over all entries, known or not, of |flow - truth| where it is known (the loss of RAFT and its descendants)."""
    return jnp.mean(jnp.abs(flow - truth) * counted(truth, valid)[..., None])


def end_point_error(
    flow: Float[Array, "B H W 2"], truth: Float[Array, "B H W 2"], valid: Float[Array, "B H W"]
) -> tuple[Float[Array, "B H W"], Float[Array, "B H W"]]:
    """Euclidean distances in pixels, zero where the truth does not count; and where it does."""
    mask = counted(truth, valid)
    return _length(flow - truth) * mask, mask


def _length(vectors):
    """Euclidean length, differentiable everywhere."""
    squared = jnp.sum(jnp.square(vectors), axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def scores(flow: jax.Array, truth: jax.Array, valid: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """EPE and shares of pixels with an error below 1, 3 and 5, over the pixels that count, as sums and counts."""
    error, mask = end_point_error(flow, truth, valid)
    n = jnp.sum(mask)
    within = {f"{k}px": (jnp.sum((error < k) * mask), n) for k in WITHIN}
    return {"epe": (jnp.sum(error), n)} | within
