"""Keeping f a contraction: Jacobian regularisation, and the spectral radius to watch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import Array, Float, Inexact, Key, PyTree, State


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
    """
    leaves, structure = jax.tree.flatten(z)
    if probes is None:
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (n_probes, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
        probes = jax.tree.unflatten(structure, drawn)
    size = sum(x.size for x in leaves)
    pullback = jax.vjp(f, z)[1]

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
) -> Float[Array, " B"]:
    """Per-sample estimate of the largest |eigenvalue| of df/dz by power iteration on J^T: `[B]`.

    Below 1, plain iteration converges near z. The estimate is the Rayleigh quotient of one random start; it is too low
    when the dominant eigenvalues are a complex pair.

    Args:
      f: maps states to states.
      z: state, leaves `[B, ...]`.
      key: draws the start.
      steps: power iterations.
      start: the start itself instead, a state.
    """
    if start is None:
        leaves, structure = jax.tree.flatten(z)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        start = jax.tree.unflatten(structure, drawn)
    pullback = jax.vjp(f, z)[1]

    def iterate(_, carry):
        v, _ = carry
        image = pullback(v)[0]
        eigenvalue = batched.inner(image, v) / batched.inner(v, v)
        zeros = jax.tree.map(jnp.zeros_like, image)
        length = batched.norm(image)
        return batched.add_scaled(zeros, 1 / jnp.where(length > 0, length, 1), image), eigenvalue

    _, eigenvalue = jax.lax.fori_loop(0, steps, iterate, (start, batched.norm(start)))
    return jnp.abs(eigenvalue)
