"""Small symmetric systems, one per sample, as in Anderson acceleration.

The samples are the last axis here, so that the few dozen operations of a factorisation are vector operations over them.
"""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Inexact

# Up to this size the factorisation is written out: fused operations on [B] numbers, where a batched library call would cost
# more than the solve's own step.
_WRITTEN_OUT = 8


def solve_positive(matrix: Inexact[Array, "M M B"], rhs: Inexact[Array, "M B"]) -> Inexact[Array, "M B"]:
    """Solves symmetric positive definite systems by Cholesky factors.

    Its derivatives are solves of the same systems: those through the factors of a nearly singular one are mostly rounding.
    """
    product = lambda x: jnp.einsum("MNB,NB->MB", matrix, x, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    factorised = lambda _, b: _cholesky_solve(matrix, b)  # noqa: E731
    return jax.lax.custom_linear_solve(product, rhs, factorised, symmetric=True)


def _cholesky_solve(matrix, rhs):
    M = rhs.shape[0]
    if M > _WRITTEN_OUT:
        lower = jnp.linalg.cholesky(jnp.moveaxis(matrix, -1, 0))
        return jax.scipy.linalg.cho_solve((lower, True), jnp.moveaxis(rhs, -1, 0)[..., None])[..., 0].T
    # Rounding must not turn a pivot negative.
    tiny = jnp.finfo(matrix.dtype).tiny
    factor: list[list] = [[None] * M for _ in range(M)]
    inverse_pivots = []
    for j in range(M):
        pivot = matrix[j, j] - sum(factor[j][k] ** 2 for k in range(j))
        inverse_pivots.append(jax.lax.rsqrt(jnp.maximum(pivot, tiny)))
        for i in range(j + 1, M):
            below = matrix[i, j] - sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = below * inverse_pivots[j]
    half: list = []
    for i in range(M):
        half.append((rhs[i] - sum(factor[i][k] * half[k] for k in range(i))) * inverse_pivots[i])
    x: list = [None] * M
    for i in reversed(range(M)):
        x[i] = (half[i] - sum(factor[k][i] * x[k] for k in range(i + 1, M))) * inverse_pivots[i]
    return jnp.stack(x)
