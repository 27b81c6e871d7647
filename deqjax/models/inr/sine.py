"""A sine for every device, right for phases of thousands of radians.

Most of what a representation computes is sines. The compiler's own is quick on accelerators; on a CPU it takes many times
as long as the polynomial here.
"""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float

# pi in three parts. A multiple of the first two, up to 2^13 of them, is exact in float32.
_PI = (201 / 64, 1015 / 2**20, -3.258413773771231e-07)
# sin(r) / r in powers of r^2 on |r| <= pi/2, by interpolation at Chebyshev nodes: off by less than 3e-11.
_COEFFICIENTS = (-2.3889102e-08, 2.7525264e-06, -1.9840861e-04, 8.3333310e-03, -1.6666667e-01, 1.0)


@jax.custom_jvp
def sin(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sine, with derivatives of every order."""
    if x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return jnp.sin(x)
    return _signed_sine(x, jnp.round(x * (1 / jnp.pi)))


@jax.custom_jvp
def cos(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The cosine, likewise."""
    if x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return jnp.cos(x)
    # cos(r + n pi) = -sin(r + (n - 1/2) pi).
    return -_signed_sine(x, jnp.round(x * (1 / jnp.pi) - 0.5), 0.5)


@sin.defjvp
def _(primals, tangents):
    return sin(*primals), cos(*primals) * tangents[0]


@cos.defjvp
def _(primals, tangents):
    return cos(*primals), -sin(*primals) * tangents[0]


def _signed_sine(x, n, offset=0.0):
    """(-1)^n sin(x - (n + offset) pi) for whole n."""
    r = x
    for part in _PI:
        r = r - (n + offset) * part
    # Where so large a phase has no digits left for its sine, it stays a sine all the same.
    r = jnp.clip(r, -jnp.pi / 2, jnp.pi / 2)
    square, sine = r * r, 0.0
    for coefficient in _COEFFICIENTS:
        sine = sine * square + coefficient
    half = 0.5 * n
    return r * sine * (1 - 4 * (half - jnp.floor(half)))
