"""The state of a training run: everything that the next step depends on, as arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deqjax.core.naming import leaf_path
from deqjax.nn.variables import BatchVariable


@flax.struct.dataclass
class TrainState:
    """Arrays only (or, in their places, shapes or shardings): a static field would make states of two runs different trees.

    Attributes:
      step: updates done, skipped ones included; the next batch's number.
      params: `nnx.State` of the parameters.
      variables: `nnx.State` of all else in the model: memories, statistics, random streams.
      opt: the optimiser's state.
      sums: `{name: (sum, count)}` of the metrics since the last log line.
      skipped: updates skipped because loss, gradient or they themselves were not finite.
      skipped_in_a_row: those since the last good one.
      best: the best value of the validation metric so far.
      stale: evaluations since then.
      ema: the moving average of the parameters, or an empty tuple.
    """

    step: Any
    params: Any
    variables: Any
    opt: Any
    sums: dict
    skipped: Any
    skipped_in_a_row: Any
    best: Any
    stale: Any
    ema: Any

    @classmethod
    def create(
        cls, params, variables, optimizer: optax.GradientTransformation, metric_names, best: float, ema: bool = False
    ) -> "TrainState":
        """The state before the first step."""
        zero = jnp.zeros((), jnp.int32)
        sums = {name: (jnp.zeros((), float), jnp.zeros((), float)) for name in metric_names}
        return cls(
            step=zero,
            params=params,
            variables=variables,
            opt=optimizer.init(params),
            sums=sums,
            skipped=zero,
            skipped_in_a_row=zero,
            best=jnp.asarray(best, float),
            stale=zero,
            ema=params if ema else (),
        )

    @property
    def weights(self):
        """The parameters to evaluate with: their average, where one is kept."""
        return self.ema or self.params


def named_leaves(tree) -> dict[tuple[str, ...], Any]:
    """Every leaf by its path."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def to_nested_dict(tree) -> dict:
    """Plain nested dicts of the leaves that hold anything, which depend on no class of ours or of the optimiser."""
    return nested_dict({path: leaf for path, leaf in named_leaves(tree).items() if leaf.size})


def nested_dict(leaves: dict[tuple[str, ...], Any]) -> dict:
    """The inverse of `named_leaves` on nested dicts."""
    nested: dict = {}
    for path, leaf in leaves.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return nested


def from_nested_dict(template, nested: dict):
    """The inverse of `to_nested_dict`, given a tree of the same structure."""

    def pick(path, like):
        if not like.size:
            return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))
        inner = nested
        for name in leaf_path(path):
            inner = inner[name]
        return inner

    return jax.tree_util.tree_map_with_path(pick, template)


def kinds_of_state(variables):
    """Of each leaf: "row" where axis 0 is the batch, "shared" for what those rows have in common, "random", or else "own"."""

    def mark(node):
        if isinstance(node, BatchVariable):
            return jax.tree.map(lambda leaf: "row" if leaf.ndim else "shared", node)
        return jax.tree.map(lambda _: "random" if isinstance(node, nnx.RngState) else "own", node)

    return jax.tree.map(mark, variables, is_leaf=lambda node: isinstance(node, nnx.Variable))


def count_parameters(params) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def merged(graphdef, *states) -> nnx.Module:
    """A model of its own: updating its variables leaves the given states as they are."""
    return nnx.merge(graphdef, *states, copy=True)
