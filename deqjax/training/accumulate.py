"""Gradient accumulation: a batch in slices, one after the other, in the memory of one."""

import jax
import jax.numpy as jnp

from deqjax.training.state import kinds_of_state


def accumulated(gradient, slices: int):
    """The gradient of a mean over rows from its gradients over slices of the batch.

    Each slice weighs as much as it counts for the metric `loss`, where there is one: rows may be padding, or of many parts.
    A slice takes rows from every device's share, and the same rows of the batch variables. What the rows share in those
    is updated once per batch; all other variables, such as statistics, once per slice.

    Args:
      gradient: `value_and_grad` of a `loss_function`, of the parameters and the probes.
      slices: into how many equal parts to cut.
    """
    if slices == 1:
        return gradient

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // slices, slices, *x.shape[1:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def run(params, probes, variables, batch, step):
        kinds = kinds_of_state(variables)
        columns = {name: cut(x) for name, x in batch.items() if x.ndim}

        def one(variables, part):
            """The gradient of a slice, with the variables before it: those by row already cut."""
            enter = lambda kind, x, before: x[part] if kind == "row" else before if kind == "shared" else x  # noqa: E731
            own = jax.tree.map(enter, kinds, variables, start)
            return gradient(params, probes, own, batch | {name: x[part] for name, x in columns.items()}, step, part)

        def visit(part, carry):
            totals, variables = carry
            (value, (metrics, updated)), (grads, measured) = one(variables, part)
            leave = lambda kind, x, new: x.at[part].set(new) if kind == "row" else new  # noqa: E731
            # A mean over nothing is NaN, and has no weight.
            count = jnp.asarray(metrics.get("loss", (0, 1))[1])
            weigh = lambda x: jnp.where(count > 0, x * count.astype(x.dtype), 0)  # noqa: E731
            value, grads = jax.tree.map(weigh, (value, grads))
            totals = jax.tree.map(jnp.add, totals, (value, metrics, grads, measured))
            return totals, jax.tree.map(leave, kinds, variables, updated)

        start = variables
        variables = jax.tree.map(lambda kind, x: cut(x) if kind == "row" else x, kinds, variables)
        (value, (metrics, _)), (grads, measured) = jax.eval_shape(one, variables, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, metrics, grads, measured))
        totals, variables = jax.lax.fori_loop(0, slices, visit, (zeros, variables))
        value, metrics, grads, measured = totals
        variables = jax.tree.map(lambda kind, x: join(x) if kind == "row" else x, kinds, variables)
        total = metrics.get("loss", (0, slices))[1]
        value, grads = jax.tree.map(lambda x: x / jnp.asarray(total, x.dtype), (value, grads))
        return (value, (metrics, variables)), (grads, measured)

    return run
