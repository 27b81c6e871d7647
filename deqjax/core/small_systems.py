"""Small symmetric systems, one per sample, as in Anderson acceleration.

The samples are the last axis here, so that the few dozen operations of a factorisation are vector operations over them.
"""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Inexact

# Up to this size the elimination is written out: operations on [B] numbers, where a batched library call would cost more
# than the solve's own step.
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
    # The right-hand side is eliminated like a last row of the matrix. What a column leaves is computed there and then; the
    # compiler would rather compute it again in each of its many uses.
    rows = [*_computed(matrix), _computed(rhs)]
    factor: list[list] = [[None] * M for _ in rows]
    inverse_pivots = []
    for j in range(M):
        pivot = rows[j][j] - sum(factor[j][k] ** 2 for k in range(j))
        inverse = jax.lax.rsqrt(jnp.maximum(pivot, tiny))
        below = [(rows[i][j] - sum(factor[i][k] * factor[j][k] for k in range(j))) * inverse for i in range(j + 1, M + 1)]
        inverse, below = _computed((inverse, below))
        inverse_pivots.append(inverse)
        for i, entry in enumerate(below, start=j + 1):
            factor[i][j] = entry
    x: list = [None] * M
    for i in reversed(range(M)):
        x[i] = _computed((factor[M][i] - sum(factor[k][i] * x[k] for k in range(i + 1, M))) * inverse_pivots[i])
    return jnp.stack(x)


_computed = jax.lax.optimization_barrier
