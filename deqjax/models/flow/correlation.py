"""How similar each pixel of one frame is to those of the other around the place where the flow says it went.

Teed and Deng 2020 (RAFT), sections 3.2 and 3.3. The correlations of a pixel with another frame's pixels, averaged over
squares of 2^l, are looked up bilinearly at the 9 x 9 points around its target, at levels l = 0..3. Whatever lies outside
the frame counts as zero; the k-th pixel of every level has coordinate k.

Averaging is linear, so the correlations of level l are those with averaged features. There are two forms, `Volume` and
`FeatureMaps`, which differ only in how they come by the correlations at the 10 x 10 whole-numbered points around a target;
values and gradients are equal.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float

LEVELS, RADIUS = 4, 4
_POINTS = 2 * RADIUS + 2  # in each direction, from floor(target) - RADIUS


class Volume(NamedTuple):
    """The correlations of all pairs, kept: 1.33 N^2 numbers for N pixels."""

    levels: tuple[jax.Array, ...]  # [B, h, w, h >> l, w >> l]

    def patches(self, level: int, x_BhwP: jax.Array, y_BhwP: jax.Array) -> jax.Array:
        """Correlations `[B, h, w, P, P]` at the points (x, y), x first."""
        volume = self.levels[level]
        # Selecting by products needs neither gather nor scatter, forwards and backwards.
        rows = _one_hot(y_BhwP, volume.shape[-2], volume.dtype)
        columns = _one_hot(x_BhwP, volume.shape[-1], volume.dtype)
        exact = jax.lax.Precision.HIGHEST
        of_rows = jnp.einsum("BhwYX,BhwqY->BhwqX", volume, rows, precision=exact)
        return jnp.einsum("BhwqX,BhwpX->Bhwpq", of_rows, columns, precision=exact)


class FeatureMaps(NamedTuple):
    """The features themselves; correlations are computed when they are looked up, in memory linear in N."""

    fmap1: jax.Array  # [B, h, w, D], divided by the square root of D
    pyramid: tuple[jax.Array, ...]  # [B, h >> l, w >> l, D]

    def patches(self, level: int, x_BhwP: jax.Array, y_BhwP: jax.Array) -> jax.Array:
        """Correlations `[B, h, w, P, P]` at the points (x, y), x first."""
        fmap1, fmap2 = self.fmap1, self.pyramid[level]
        B, h, w, _ = fmap1.shape
        _, height, width, D = fmap2.shape
        if not height * width:
            return jnp.zeros((B, h, w, _POINTS, _POINTS), fmap1.dtype)
        rows = fmap2.reshape(B, height * width, D)

        @jax.checkpoint
        def at_point(x_Bhw, y_Bhw):
            inside = (x_Bhw >= 0) & (x_Bhw < width) & (y_Bhw >= 0) & (y_Bhw < height)
            place = jnp.where(inside, y_Bhw * width + x_Bhw, 0).astype(jnp.int32)
            features = jax.vmap(lambda f, p: f[p])(rows, place)
            return jnp.where(inside, jnp.sum(fmap1 * features, axis=-1), 0)

        def column(x_Bhw):
            return jax.lax.map(lambda y_Bhw: at_point(x_Bhw, y_Bhw), jnp.moveaxis(y_BhwP, -1, 0))

        # One point at a time: each needs N D numbers.
        patch_PPBhw = jax.lax.map(column, jnp.moveaxis(x_BhwP, -1, 0))
        return jnp.moveaxis(patch_PPBhw, (0, 1), (-2, -1))


def correlate(fmap1: Float[Array, "B h w D"], fmap2: Float[Array, "B H W D"], form: str) -> Volume | FeatureMaps:
    """What to look correlations up in.

    Args:
      fmap1, fmap2: features of both frames, usually of one size.
      form: "volume" or "on_demand".
    """
    dtype = jnp.promote_types(fmap1.dtype, jnp.float32)
    fmap1, fmap2 = fmap1.astype(dtype) / math.sqrt(fmap1.shape[-1]), fmap2.astype(dtype)
    pyramid = [fmap2]
    for _ in range(LEVELS - 1):
        pyramid.append(_halve(pyramid[-1]))
    if form == "on_demand":
        return FeatureMaps(fmap1, tuple(pyramid))
    exact = jax.lax.Precision.HIGHEST
    return Volume(tuple(jnp.einsum("BhwD,BYXD->BhwYX", fmap1, fmap, precision=exact) for fmap in pyramid))


def lookup(correlation: Volume | FeatureMaps, coords: Float[Array, "B h w 2"]) -> Float[Array, "B h w 324"]:
    """Correlations around targets.

    Args:
      correlation: of both frames.
      coords: of each pixel's target, (x, y) in pixels of the maps.

    Returns:
      Channel 81 l + 9 (i + 4) + (j + 4) belongs to level l and the point (x / 2^l + i, y / 2^l + j). The derivative by
      coordinates is that of the cell to the right of a whole number.
    """
    offsets = jnp.arange(_POINTS, dtype=coords.dtype) - RADIUS
    channels = []
    for level in range(LEVELS):
        centres = coords / 2**level
        corners = jax.lax.stop_gradient(jnp.floor(centres))
        right, below = ((centres - corners)[..., k, None, None] for k in (0, 1))
        x, y = (corners[..., k, None] + offsets for k in (0, 1))
        patch = correlation.patches(level, x, y)
        # All 81 points share where they lie in their cells.
        patch = (1 - below) * patch[..., :-1] + below * patch[..., 1:]
        patch = (1 - right) * patch[..., :-1, :] + right * patch[..., 1:, :]
        channels.append(patch.reshape(*patch.shape[:-2], -1))
    return jnp.concatenate(channels, axis=-1)


def grid(B: int, h: int, w: int, dtype=jnp.float32) -> Float[Array, "B h w 2"]:
    """Every pixel's own coordinates, (x, y)."""
    rows, columns = jnp.arange(h, dtype=dtype), jnp.arange(w, dtype=dtype)
    both = jnp.stack([jnp.broadcast_to(columns, (h, w)), jnp.broadcast_to(rows[:, None], (h, w))], axis=-1)
    return jnp.broadcast_to(both, (B, h, w, 2))


def _halve(fmap):
    """Means over squares of two; an odd last row or column is left out."""
    B, h, w, D = fmap.shape
    even = fmap[:, : h // 2 * 2, : w // 2 * 2].reshape(B, h // 2, 2, w // 2, 2, D)
    return jnp.mean(even, axis=(2, 4))


def _one_hot(places, n, dtype):
    return (places[..., None] == jnp.arange(n, dtype=places.dtype)).astype(dtype)
