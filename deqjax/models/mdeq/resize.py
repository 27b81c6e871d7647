"""Bilinear resizing with PyTorch's two conventions, as products with small constant matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.core.annotations import Array, Float


def resize_bilinear(x: Float[Array, "B h w C"], size: tuple[int, int], *, align_corners: bool) -> Float[Array, "B H W C"]:
    """x interpolated to another height and width.

    Args:
      size: H and W.
      align_corners: the corners' centres coincide (source = target (n_in - 1) / (n_out - 1)); else the edges do, with
        half-pixel centres and without smoothing before a reduction. `jax.image.resize` has neither.
    """
    if x.shape[1:3] == tuple(size):
        return x
    rows, columns = (
        jnp.asarray(_weights(n_in, n_out, align_corners), x.dtype) for n_in, n_out in zip(x.shape[1:3], size, strict=True)
    )
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("Hh,bhwc->bHwc", rows, x, precision=highest)
    return jnp.einsum("Ww,bhwc->bhWc", columns, x, precision=highest)


def _weights(n_in: int, n_out: int, align_corners: bool) -> np.ndarray:
    """`[n_out, n_in]`: how much each source pixel counts."""
    target = np.arange(n_out)
    if align_corners:
        source = target * ((n_in - 1) / max(n_out - 1, 1))
    else:
        source = np.clip((target + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
    low = np.minimum(np.floor(source).astype(int), n_in - 1)
    high, part = np.minimum(low + 1, n_in - 1), source - low
    weights = np.zeros((n_out, n_in))
    np.add.at(weights, (target, low), 1 - part)
    np.add.at(weights, (target, high), part)
    return weights
