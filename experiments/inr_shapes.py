"""Shapes."""

import jax
import jax.numpy as jnp


def sdf_loss(net, x, normals, on_surface):
    weights = net.weights(train=True)

    def values_at(x):
        return net.decode(net.solve(net.encode(x, weights), train=True).states[-1])

    values, pullback = jax.vjp(values_at, x)
    (slopes,) = pullback(jnp.ones_like(values))
    sdf = values[:, 0]
    length = jnp.sqrt(jnp.sum(jnp.square(slopes), axis=-1))
    cosine = jnp.sum(slopes * normals, axis=-1) / jnp.maximum(length * jnp.sqrt(jnp.sum(normals**2, axis=-1)), 1e-8)
    terms = {
        "surface": 3e3 * jnp.mean(jnp.where(on_surface, jnp.abs(sdf), 0)),
        "off": 1e2 * jnp.mean(jnp.where(on_surface, 0, jnp.exp(-1e2 * jnp.abs(sdf)))),
        "normal": 1e2 * jnp.mean(jnp.where(on_surface, 1 - cosine, 0)),
        "eikonal": 5e1 * jnp.mean(jnp.abs(length - 1)),
    }
    return terms, values, slopes
