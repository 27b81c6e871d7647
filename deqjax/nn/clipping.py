"""Clipping of gradients where they arise, for recipes that clip every parameter on its own."""

import functools

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clip_gradient(x: Float[Array, "..."], max_norm: float) -> Float[Array, "..."]:
    """x itself; a gradient on its way back through here is scaled to a norm of at most `max_norm` (PyTorch's formula)."""
    return x


def _forward(x, max_norm):
    return x, None


def _backward(max_norm, _, gradient):
    # Divided by the largest entry first, so that squares of huge entries do not overflow.
    largest = jnp.max(jnp.abs(gradient), initial=0.0)
    scale = jnp.where(largest > 0, largest, 1)
    norm = scale * jnp.sqrt(jnp.sum(jnp.square(gradient / scale)))
    return (gradient * jnp.minimum(1, max_norm / (norm + 1e-6)),)


clip_gradient.defvjp(_forward, _backward)
