"""Small systems, one per sample, as in Anderson acceleration and in Broyden's method.

The samples are the last axis here, so that the few dozen operations of a factorisation are vector operations over them.
"""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Inexact

# Up to this size the elimination is written out: operations on [B] numbers, where a batched library call would cost more
# than the solve's own step.
_WRITTEN_OUT = 8


def solve_positive(matrix: Inexact[Array, "M M B"], rhs: Inexact[Array, "M B"]) -> Inexact[Array, "M B"]:
    """Solves symmetric positive definite systems by Cholesky factors; a solution that is not finite is all zeros.

    Its derivatives are solves of the same systems: those through the factors of a nearly singular one are mostly rounding.
    """
    product = lambda x: jnp.einsum("MNB,NB->MB", matrix, x, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    factorised = lambda _, b: _finite(_cholesky_solve(matrix, b), axis=0)  # noqa: E731
    return jax.lax.custom_linear_solve(product, rhs, factorised, symmetric=True)


def _cholesky_solve(matrix, rhs):
    M = rhs.shape[0]
    if M > _WRITTEN_OUT:
        lower = jnp.linalg.cholesky(jnp.moveaxis(matrix, -1, 0))
        return jax.scipy.linalg.cho_solve((lower, True), jnp.moveaxis(rhs, -1, 0)[..., None])[..., 0].T
    # Rounding must not turn a pivot negative.
    tiny = jnp.finfo(matrix.dtype).tiny
    # The right-hand side is eliminated like a last row of the matrix.
    rows = [*matrix, rhs]
    factor: list[list] = [[None] * M for _ in rows]
    inverse_pivots = []
    for j in range(M):
        pivot = rows[j][j] - sum(factor[j][k] ** 2 for k in range(j))
        inverse = jax.lax.rsqrt(jnp.maximum(pivot, tiny))
        below = [(rows[i][j] - sum(factor[i][k] * factor[j][k] for k in range(j))) * inverse for i in range(j + 1, M + 1)]
        inverse_pivots.append(inverse)
        for i, entry in enumerate(below, start=j + 1):
            factor[i][j] = entry
    x: list = [None] * M
    for i in reversed(range(M)):
        x[i] = (factor[M][i] - sum(factor[k][i] * x[k] for k in range(i + 1, M))) * inverse_pivots[i]
    return jnp.stack(x)


def solve_general(matrix: Inexact[Array, "B M M"], rhs: Inexact[Array, "B M"]) -> Inexact[Array, "B M"]:
    """Solves any systems by LU factors; a solution that is not finite is all zeros. The samples come first here."""

    def factorised(matrix):
        return lambda _, b: _finite(jnp.linalg.solve(matrix, b[..., None])[..., 0], axis=1)

    product = lambda x: jnp.einsum("BMN,BN->BM", matrix, x, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    return jax.lax.custom_linear_solve(product, rhs, factorised(matrix), factorised(jnp.swapaxes(matrix, 1, 2)))


def _finite(x, axis):
    # A NaN would survive in derivatives even where the solution is not used.
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axis, keepdims=True), x, 0)


def solve_lower(matrix: Inexact[Array, "M M B"], rhs: Inexact[Array, "M B"], transpose: bool = False) -> Inexact[Array, "M B"]:
    """Solves lower triangular systems, or their transposes. What is above the diagonal is not looked at."""
    M = rhs.shape[0]
    if M > _WRITTEN_OUT:
        matrix, rhs = jnp.moveaxis(matrix, -1, 0), jnp.moveaxis(rhs, -1, 0)[..., None]
        settings = {"left_side": True, "lower": True, "transpose_a": transpose}
        return jax.lax.linalg.triangular_solve(matrix, rhs, **settings)[..., 0].T
    x: dict = {}
    for i in range(M)[::-1] if transpose else range(M):
        known = sum((matrix[k, i] if transpose else matrix[i, k]) * x[k] for k in x)
        x[i] = (rhs[i] - known) / matrix[i, i]
    return jnp.stack([x[i] for i in range(M)])
