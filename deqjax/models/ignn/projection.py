"""Projection of weights onto the ball of the infinity norm, within which the implicit layer is well-posed."""

import jax.numpy as jnp

from deqjax.core.annotations import Array, ArrayLike, Float


def project_rows(matrix: Float[Array, "... R C"], radius: Float[ArrayLike, "..."]) -> Float[Array, "... R C"]:
    """The nearest matrix whose rows have an L1 norm of at most `radius`; rows within stay as they are.

    Exact, by sorting (Duchi et al. 2008, figure 1): a row a becomes sign(a) max(|a| - theta, 0).

    Args:
      matrix: `[..., R, C]`.
      radius: broadcasts against the leading axes.
    """
    radius = jnp.asarray(radius, matrix.dtype)[..., None, None]
    size = jnp.abs(matrix)
    descending = -jnp.sort(-size, axis=-1)
    excess = jnp.cumsum(descending, axis=-1) - radius
    count = jnp.arange(1, matrix.shape[-1] + 1, dtype=matrix.dtype).reshape((1,) * (matrix.ndim - 1) + (-1,))
    # The entries that stay positive are a prefix of the sorted ones.
    kept = jnp.sum(descending * count > excess, axis=-1, keepdims=True)
    theta = jnp.take_along_axis(excess, kept - 1, axis=-1) / kept.astype(matrix.dtype)
    outside = jnp.sum(size, axis=-1, keepdims=True) > radius
    return jnp.where(outside, jnp.sign(matrix) * jnp.maximum(size - theta, 0), matrix)


def project_columns(matrix: Float[Array, "... R C"], radius: Float[ArrayLike, "..."]) -> Float[Array, "... R C"]:
    """`project_rows` of the transposed matrix."""
    return jnp.swapaxes(project_rows(jnp.swapaxes(matrix, -1, -2), radius), -1, -2)
