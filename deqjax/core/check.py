"""Comparing gradient rules on one's own map."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Key, PyTree
from deqjax.core.fixed_point import fixed_point
from deqjax.core.gradients import Gradient, OneStep, Phantom
from deqjax.core.hoist import as_state
from deqjax.core.implicit import Implicit
from deqjax.core.solvers import Anderson, Solver


def check_gradients(
    f: Callable[..., PyTree],
    z_init: PyTree,
    *args: Any,
    rules: Mapping[str, Gradient] | None = None,
    solver: Solver = Anderson(max_steps=100, tol=1e-6),
    key: Key[Array, ""] | None = None,
    batch_axis: int | None = 0,
) -> dict[str, float]:
    """How far the gradients of several rules are from the implicit one, on this f.

    The loss is the inner product of the solution with fixed random numbers. An exact rule agrees to the tolerance of the
    solves; a truncated one (few phantom steps) shows its bias.

    Example:
      >>> errors = deqjax.check_gradients(lambda z, W, x: jnp.tanh(z @ W + x), jnp.zeros((4, 8)), W, x)
      >>> errors["phantom, 5 steps"] < errors["one step"]
      True

    Args:
      f: `f(z, *args) -> z`; its gradients to the floating-point `args` are compared.
      z_init: where to start.
      *args: pytrees.
      rules: by name; None compares the usual ones.
      solver: of the forward problem; the reference's adjoint is solved by the same method.
      key: draws the numbers of the loss.
      batch_axis: see `fixed_point`.

    Returns:
      |gradient - reference| / |reference| over all `args` together, by the name of the rule.

    Raises:
      TypeError: the rules are no mapping.
      ValueError: there is nothing to compare: no floating-point array among the `args`.
    """
    key = jax.random.key(0) if key is None else key
    z_init = as_state(z_init)
    leaves, structure = jax.tree.flatten(z_init)
    keys = jax.random.split(key, len(leaves))
    cotangent = jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
    if rules is None:
        rules = {
            "implicit": Implicit(),
            "one step": OneStep(),
            "phantom, 5 steps": Phantom(steps=5),
            "phantom, 50 steps": Phantom(steps=50),
        }
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules={rules!r}: must be a mapping of names to rules, such as {{'phantom': Phantom(steps=5)}}.")
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)  # noqa: E731
    flat, treedef = jax.tree.flatten(args)
    smooth = [x for x in flat if is_float(x)]
    if not smooth:
        raise ValueError("check_gradients compares gradients to floating-point args, and there are none: pass f's parameters.")

    def gradient(rule):
        def loss(smooth):
            remaining = iter(smooth)
            filled = jax.tree.unflatten(treedef, [next(remaining) if is_float(x) else x for x in flat])
            z = fixed_point(f, z_init, *filled, solver=solver, gradient=rule, batch_axis=batch_axis).value
            products = jax.tree.map(lambda a, b: jnp.sum(a * b), z, cotangent)
            return sum(jax.tree.leaves(products))

        return jax.jit(jax.grad(loss))(smooth)

    def length(tree):
        return float(jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(float))) for x in tree)))

    reference = gradient(Implicit(solver=solver))
    distance = lambda g: length([a - b for a, b in zip(g, reference, strict=True)]) / max(length(reference), 1e-300)  # noqa: E731
    return {name: distance(gradient(rule)) for name, rule in rules.items()}
