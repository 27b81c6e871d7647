"""Keeping f a contraction: Jacobian regularisation, and the spectral radius to watch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, Inexact, Key, PyTree, State
from deqjax.core.hoist import as_image, as_state
from deqjax.core.solvers.base import require, require_count


def jacobian_loss(
    f: Callable[[State], State],
    z: State,
    key: Key[Array, ""] | None = None,
    *,
    n_probes: int = 1,
    probes: PyTree[Inexact[Array, "P B ..."]] | None = None,
) -> Float[Array, ""]:
    """Hutchinson estimate of |df/dz|_F^2 per entry of the state (Bai et al. 2021, eq. 6): a scalar.

    The mean over Gaussian probes v of |v^T J|^2 / size(z), the size counting the whole batch. It is a function of f and
    z like any other: differentiate it at `stop_gradient(z)` to regularise f alone, or at z to let the term move the
    equilibrium as well.

    Args:
      f: maps states to states.
      z: state, leaves `[B, ...]`.
      key: draws the probes.
      n_probes: how many.
      probes: the probes themselves instead, a state with a leading axis of them on every leaf.

    Raises:
      TypeError: f does not map states to states, or a leaf is not floating point.
      ValueError: there is neither a key nor probes, or n_probes is not 1 or more.
    """
    require_count("n_probes", n_probes, 1)
    z = as_state(z)
    leaves, structure = jax.tree.flatten(z)
    if probes is None:
        if key is None:
            raise ValueError("jacobian_loss draws probes: give a key (another in every training step), or probes.")
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (n_probes, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
        probes = jax.tree.unflatten(structure, drawn)
    size = max(sum(x.size for x in leaves), 1)
    pullback = jax.vjp(lambda z: as_image(z, f(z)), z)[1]

    def squared(v):
        vjp = pullback(v)[0]
        return jnp.sum(batched.inner(vjp, vjp)) / size

    return jnp.mean(jax.vmap(squared)(probes))


def spectral_radius(
    f: Callable[[State], State],
    z: State,
    key: Key[Array, ""] | None = None,
    *,
    steps: int = 100,
    start: State | None = None,
    method: str = "power",
) -> Float[Array, " B"]:
    """Per-sample estimate of the largest |eigenvalue| of df/dz: `[B]`.

    Below 1, plain iteration converges near z. "power" iterates on J^T and returns the Rayleigh quotient of one random start;
    it is too low when the dominant eigenvalues are a complex pair. "arnoldi" returns the spectral radius of J^T on the
    Krylov space of that start (Arnoldi 1951), which sees pairs, converges in fewer steps, and keeps `steps` states.

    Args:
      f: maps states to states.
      z: state, leaves `[B, ...]`.
      key: draws the start.
      steps: products with J^T; for "arnoldi" a dozen or two is usual.
      start: the start itself instead, a state.
      method: "power" or "arnoldi".

    Raises:
      TypeError: f does not map states to states, or a leaf is not floating point.
      ValueError: there is no such method, neither a key nor a start, or steps is not 1 or more.
    """
    require(method in ("power", "arnoldi"), "method", method, '"power" or "arnoldi"')
    require_count("steps", steps, 1)
    z = as_state(z)
    if start is None:
        if key is None:
            raise ValueError("spectral_radius draws its start: give a key, or the start itself.")
        leaves, structure = jax.tree.flatten(z)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        start = jax.tree.unflatten(structure, drawn)
    pullback = jax.vjp(lambda z: as_image(z, f(z)), z)[1]
    if method == "arnoldi":
        return _radius_of_small(_hessenberg(lambda v: pullback(v)[0], start, steps))

    def iterate(_, carry):
        v, _ = carry
        image = pullback(v)[0]
        # 1 but for rounding; zero once J^T maps everything that is left to nothing.
        size = batched.inner(v, v)
        return _unit(image)[0], batched.inner(image, v) / jnp.where(size == 0, 1, size)

    v, length = _unit(start)
    return jnp.abs(jax.lax.fori_loop(0, steps, iterate, (v, length))[1])


def _hessenberg(linear, start: State, steps: int) -> Float[Array, "B M M"]:
    """The linear map on its Krylov space, in an orthonormal basis of it."""
    basis = batched.new_history(start, steps)
    resolution = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(start))
    v, _ = _unit(start)
    columns = jnp.repeat(jnp.repeat(jnp.zeros_like(batched.norm(v))[:, None, None], steps, axis=1), steps, axis=2)

    def extend(k, carry):
        v, basis, columns = carry
        basis = batched.write(basis, k, v)
        image, size = _unit(linear(v))
        # Gram-Schmidt, twice: once is not enough in finite precision.
        first = batched.coefficients(basis, image)
        image = batched.subtract(image, batched.combine(basis, first))
        second = batched.coefficients(basis, image)
        image = batched.subtract(image, batched.combine(basis, second))
        # What is left after an invariant space is found is rounding, and ends the basis.
        v, length = _unit(image)
        rounding = length <= max(1e3 * float(jnp.finfo(length.dtype).eps), 8 * resolution)
        v, length = batched.select(rounding, jax.tree.map(jnp.zeros_like, v), v), jnp.where(rounding, 0, length)
        below = jnp.arange(steps, dtype=jnp.int32) == k + 1
        column = first + second + jnp.where(below[None], length[:, None], 0)
        return v, basis, columns.at[:, :, k].set(size[:, None] * column)

    return jax.lax.fori_loop(0, steps, extend, (v, basis, columns))[2]


def _radius_of_small(matrix: Float[Array, "B M M"]) -> Float[Array, " B"]:
    """Spectral radius by Gelfand's formula |A^(2^k)|^(1/2^k), squaring; runs where no eigenvalue routine does."""
    squarings = 12

    def largest(matrix):
        # 1 for a matrix of zeros, and of NaN NaN.
        size = jnp.max(jnp.abs(matrix), axis=(1, 2))
        return jnp.where(size == 0, 1, size)

    def square(_, carry):
        matrix, log_scale = carry
        size = largest(matrix)
        matrix = matrix / size[:, None, None]
        # A = size * (A / size): each squaring doubles the logarithm collected so far.
        log_scale = 2 * (log_scale + jnp.log(size))
        return jnp.einsum("BMN,BNK->BMK", matrix, matrix, precision=jax.lax.Precision.HIGHEST), log_scale

    start = (matrix, jnp.zeros_like(matrix[:, 0, 0]))
    power, log_scale = jax.lax.fori_loop(0, squarings, square, start)
    log_radius = (log_scale + jnp.log(largest(power))) / 2**squarings
    return jnp.where(jnp.all(power == 0, axis=(1, 2)), 0, jnp.exp(log_radius))


def _unit(state: State) -> tuple[State, Float[Array, " B"]]:
    """Each sample scaled to length 1, zeros left as they are, and its length; no square overflows or vanishes on the way."""
    size = batched.largest(state)
    size = jnp.where(size == 0, 1, size)
    state = batched.scaled(1 / size, state)
    length = batched.norm(state)
    return batched.scaled(1 / jnp.where(length == 0, 1, length), state), size * length
