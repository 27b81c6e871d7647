"""Many signals at once, and the memory of a training run: the fixed points of its last visit to every coordinate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Bool, Float, Int
from deqjax.models.inr.config import INRConfig
from deqjax.models.inr.network import INR
from deqjax.nn.config import DEQConfig
from deqjax.nn.variables import AdjointProbe, BatchVariable


class Signals(nnx.Module):
    """Independent networks of one architecture, one per signal, whose parameters have a leading axis S if there are several.

    Args:
      build: makes one network from random streams.
      count: S.
      rngs: the "params" stream draws the initial weights of all.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
        self.count = count
        if count == 1:
            self.net = build(rngs)
            return
        graph, probes, _ = nnx.split(build(rngs), AdjointProbe, ...)
        keys = jax.random.split(rngs.params(), count)
        states = jax.vmap(lambda key: nnx.split(build(nnx.Rngs(key)), AdjointProbe, ...)[2])(keys)
        self.net = nnx.merge(graph, probes, states)

    def each(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(net, *args)` of every signal, arguments and results with a leading axis S, in one program.

        What the function changes in its network stays changed.
        """
        if self.count == 1:
            one = function(self.net, *jax.tree.map(lambda x: x[0], args))
            return jax.tree.map(lambda x: x[None], one)
        graph, probes, states = nnx.split(self.net, AdjointProbe, ...)

        def of_one(state, *args):
            net = nnx.merge(graph, probes, state, copy=True)
            result = function(net, *args)
            return result, nnx.split(net, AdjointProbe, ...)[2]

        result, states = jax.vmap(of_one)(states, *args)
        nnx.update(self.net, states)
        return result

    def one(self, number: int) -> nnx.Module:
        """The network of one signal; of several signals a copy."""
        if self.count == 1:
            return self.net
        graph, probes, states = nnx.split(self.net, AdjointProbe, ...)
        return nnx.merge(graph, probes, jax.tree.map(lambda x: x[number], states), copy=True)


class WarmStart(nnx.Module):
    """The states `[R, K, S, D]` of S signals at R K coordinates, visited in K batches of R (Huang et al. 2021).

    They belong to the training state. Axis 0 is the batch, so each coordinate's states stay on the device that computes it.
    """

    def __init__(self, rows: int, blocks: int, count: int, n_hidden: int, dtype=jnp.float32):
        self.z = BatchVariable(jnp.zeros((rows, blocks, count, n_hidden), dtype))
        self.seen = BatchVariable(jnp.zeros((rows, blocks), bool))

    def recall(self, block: Int[Array, ""]) -> tuple[Float[Array, "S R D"], Bool[Array, ""]]:
        """The states of a batch, zeros before its first visit, and whether it has been visited."""
        z = jax.lax.dynamic_index_in_dim(self.z[...], block, axis=1, keepdims=False)
        seen = jax.lax.dynamic_index_in_dim(self.seen[...], block, axis=1, keepdims=False)
        return jnp.moveaxis(z, 1, 0).astype(jnp.float32), jnp.all(seen)

    def remember(self, block: Int[Array, ""], z: Float[Array, "S R D"]) -> None:
        """Keeps the states of a batch, without their gradients."""
        z = jnp.moveaxis(jax.lax.stop_gradient(z), 0, 1).astype(self.z.dtype)
        self.z[...] = jax.lax.dynamic_update_index_in_dim(self.z[...], z, block, axis=1)
        ones = jnp.ones_like(self.seen[...][:, 0])
        self.seen[...] = jax.lax.dynamic_update_index_in_dim(self.seen[...], ones, block, axis=1)


def has_equilibrium(net: nnx.Module) -> bool:
    """Whether there are states to solve for."""
    return isinstance(net, INR) and net.deq is not None


def training_bytes(config: INRConfig, deq: DEQConfig) -> int:
    """About how many bytes of memory each coordinate of a batch takes in a training step: what backpropagation keeps.

    Per feature and layer: what the filters keep, and what each recorded application of f keeps.
    """
    recorded = sum(deq.phantom_steps(deq.n_states)) if config.network == "deq" else 1
    arrays = 4 * (config.n_layers + 1) + 4 * recorded * config.n_layers + 4
    return 4 * _width(config) * arrays


def evaluation_bytes(config: INRConfig) -> int:
    """About how many bytes of memory each coordinate takes in an evaluation: its filters and a few states."""
    return 4 * _width(config) * (2 * (config.n_layers + 1) + 6)


def _width(config):
    """Of the widest array of a coordinate; Fourier features are a sine and a cosine of each frequency."""
    return max(config.n_hidden, 2 * config.n_features) if config.network == "ffn" else config.n_hidden
