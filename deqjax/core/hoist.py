"""Turns a user's f, with everything that it closes over, into a pure function with explicit constants.

Every array captured by f (parameters being differentiated, integer masks, random keys, batched tracers under `vmap`)
becomes an input. Solvers, derivative rules and loops then never close over foreign tracers, and f is traced just once
however many times it is applied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun


class Hoisted(NamedTuple):
    """`z -> function(constants, z)`, callable like the f it was made from."""

    function: Callable[[list, Any], Any]
    constants: list

    def __call__(self, z):
        return self.function(self.constants, z)

    def detached(self) -> "Hoisted":
        """The same map without gradients to anything that f captured."""
        return self._replace(constants=[jax.lax.stop_gradient(c) for c in self.constants])

    def plus(self, c) -> "Hoisted":
        """`z -> function(constants, z) + c`, with the leaves of c among the constants."""
        n, structure = len(self.constants), jax.tree.structure(c)

        def function(constants, z):
            return jax.tree.map(jnp.add, self.function(constants[:n], z), jax.tree.unflatten(structure, constants[n:]))

        return Hoisted(function, [*self.constants, *jax.tree.leaves(c)])

    def split(self) -> tuple[list, list, Callable[[list, list], "Hoisted"]]:
        """The constants that carry gradients, the others, and the map that makes a `Hoisted` of such lists.

        Derivative rules take both as arguments: they may close over neither.
        """
        floating = [jnp.issubdtype(c.dtype, jnp.inexact) for c in self.constants]
        smooth = [c for c, is_float in zip(self.constants, floating, strict=True) if is_float]
        fixed = [c for c, is_float in zip(self.constants, floating, strict=True) if not is_float]

        def rebuild(smooth, fixed):
            remaining = (iter(fixed), iter(smooth))
            return self._replace(constants=[next(remaining[is_float]) for is_float in floating])

        return smooth, fixed, rebuild


def hoist(f: Callable, z) -> Hoisted:
    """Traces f at a state like `z` and checks that it maps states to states.

    Raises:
      TypeError: f changes the structure, a shape or a dtype of the state, or a leaf cannot be iterated on.
    """
    closed = jax.make_jaxpr(lambda z: as_image(z, f(z)))(z)
    structure = jax.tree.structure(z)

    def function(constants, z):
        # Swapping the constants keeps the one trace; evaluating it is the same as calling f.
        fun = jaxpr_as_fun(_with_constants(closed, constants))
        return jax.tree.unflatten(structure, fun(*jax.tree.leaves(z)))

    return Hoisted(function, list(closed.consts))


def _with_constants(closed, constants):
    return type(closed)(closed.jaxpr, constants)


def as_state(z):
    """The state as arrays of floating-point dtype, weak types made strong.

    Raises:
      TypeError: a leaf is no array, or not floating point.
    """

    def strong(path, x):
        try:
            x = jnp.asarray(x)
        except TypeError:
            raise TypeError(
                f"the state leaf z{jax.tree_util.keystr(path)} is {x!r}, which is no array. Does z_init come after f?"
            ) from None
        if not jnp.issubdtype(x.dtype, jnp.floating):
            advice = "Convert it (z.astype(jnp.float32)) or let f close over it instead of iterating on it."
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                advice = "Iterate on its real and imaginary parts, as two leaves."
            raise TypeError(
                f"the state leaf z{jax.tree_util.keystr(path)} has dtype {x.dtype}; a solver needs floating point. {advice}"
            )
        return jax.lax.convert_element_type(x, x.dtype)

    return jax.tree_util.tree_map_with_path(strong, z)


def check_batch(z, axis: int = 0):
    """Refuses a state whose leaves do not share a batch axis.

    Raises:
      ValueError: a leaf has no such axis or another length there, or there is no leaf at all.
    """
    leaves = jax.tree_util.tree_leaves_with_path(z)
    if not leaves:
        raise ValueError("z_init has no leaves: there is nothing to solve for.")
    length = lambda x: x.shape[axis] if -x.ndim <= axis < x.ndim else None  # noqa: E731
    sizes = {length(x) for _, x in leaves}
    if len(sizes) > 1 or None in sizes:
        shapes = ", ".join(f"z{jax.tree_util.keystr(path)} {list(x.shape)}" for path, x in leaves)
        raise ValueError(
            f"every leaf of z_init needs a batch axis {axis} of the same length, but the shapes are {shapes}. "
            "If the whole state is one problem, pass batch_axis=None to fixed_point."
        )


def as_image(z, image):
    """What f returned for z, as arrays.

    Raises:
      TypeError: it is no state like z.
    """
    given, returned = jax.tree.structure(z), jax.tree.structure(image)
    if given != returned:
        raise TypeError(f"f must return a state with the structure of its input: got {returned} for {given}.")
    image = jax.tree.map(jnp.asarray, image)
    for (path, given), returned in zip(jax.tree_util.tree_leaves_with_path(z), jax.tree.leaves(image), strict=True):
        if given.shape != returned.shape or given.dtype != returned.dtype:
            raise TypeError(
                f"f must keep shape and dtype of every leaf: z{jax.tree_util.keystr(path)} is "
                f"{given.dtype}{list(given.shape)} but f returned {returned.dtype}{list(returned.shape)}. "
                "Start from a z_init of the returned shape, or cast f's result (x.astype(z.dtype))."
            )
    return image
