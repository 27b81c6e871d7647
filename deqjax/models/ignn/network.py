"""The implicit graph networks: encode, solve and decode, layer after layer, on batches of padded graphs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float, Key
from deqjax.core.stats import SolverStats
from deqjax.models.ignn.aggregation import Adjacency, adjacency
from deqjax.models.ignn.config import IGNNConfig
from deqjax.models.ignn.graphs import GraphsTuple, node_mask
from deqjax.models.ignn.layer import ImplicitGraphLayer
from deqjax.nn.config import DEQConfig
from deqjax.nn.dropout import VariationalDropout, apply_mask
from deqjax.nn.layers import LinearWeights


class Output(NamedTuple):
    """What a network makes of a batch."""

    logits: jax.Array  # [G, N, C], or [G, C] of whole graphs
    states: tuple[jax.Array, ...]  # equilibrium [G, N, m] of every implicit layer
    stats: tuple[SolverStats, ...]  # of their solves


class Linear(nnx.Module):
    """A linear map with PyTorch's initial distribution."""

    def __init__(self, n_in: int, n_out: int, rngs: nnx.Rngs, use_bias: bool = True):
        uniform = lambda shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -1, 1) / n_in**0.5  # noqa: E731
        self.kernel = nnx.Param(uniform((n_in, n_out)))
        self.bias = nnx.Param(uniform((n_out,))) if use_bias else None

    def __call__(self, x: Float[Array, "... n_in"]) -> Float[Array, "... n_out"]:
        return LinearWeights(self.kernel[...], None if self.bias is None else self.bias[...])(x)


class IGNN(nnx.Module):
    """One of the published networks, for nodes or for whole graphs (Gu et al. 2020; TorchDEQ's DEQ Zoo).

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from deqjax.models.ignn import IGNN, Bucket, IGNNConfig, single, stack
      >>> from deqjax.nn.config import DEQConfig
      >>> path = single(np.eye(3, 2, dtype=np.float32), [0, 1], [1, 2], np.ones(2, np.float32), 3)
      >>> config = IGNNConfig(network="chains", n_features=2, n_hidden=4, n_classes=2, spectral_radius=1.0)
      >>> model = IGNN(config, DEQConfig(norm_type="none", ift=True), nnx.Rngs(0))
      >>> model(stack([path], Bucket(n_node=4, n_edge=2))).logits.shape
      (1, 4, 2)

    Args:
      config: which network, and its sizes.
      deq: solver, gradient and weight normalisation of every implicit layer.
      rngs: the "params" stream draws the initial weights.

    Raises:
      ValueError: settings of the equilibrium layer that these networks have no use for.
    """

    def __init__(self, config: IGNNConfig, deq: DEQConfig, rngs: nnx.Rngs):
        _check_settings(deq)
        h, c = config.n_hidden, config.n_classes
        self.config = config
        self.layers = nnx.List([ImplicitGraphLayer(p, m, config, deq, rngs) for p, m in config.widths])
        self.skips = nnx.List([Linear(p, m, rngs) for p, m in config.widths] if config.network == "ppi" else [])
        self.hidden = Linear(h, h, rngs) if config.network == "graphs" else None
        self.readout = None if config.network == "ppi" else Linear(h, c, rngs, use_bias=config.network == "graphs")

    def __call__(
        self, graphs: GraphsTuple, *, train: bool = False, key: Key[Array, ""] | None = None, solver_options=None
    ) -> Output:
        """Logits of every node or graph.

        Args:
          graphs: a batch made by `stack`.
          train: gradients as configured; power iterations and projections move on.
          key: draws the dropout mask; None drops nothing.
          solver_options: see `DEQ`.
        """
        A, mask, x = self.encode(graphs)
        radius = self.radius(graphs)
        states, stats = [], []
        for number, layer in enumerate(self.layers):
            injection = layer.encode(x, A, mask, radius, train=train)
            out = layer.solve(injection, train=train, solver_options=solver_options)
            z = out.states[-1]
            x = self.after(number, z, x, mask)
            states.append(z)
            stats.append(out.stats)
        return Output(self.decode(x, mask, key), tuple(states), tuple(stats))

    def encode(self, graphs: GraphsTuple) -> tuple[Adjacency, Float[Array, "G N 1"], Float[Array, "G N F"] | None]:
        """The adjacency ready for products, the mask of real nodes, and the features, zero on padding."""
        config, weights = self.config, jnp.asarray(graphs.edges)
        n_nodes = config.n_features if graphs.nodes is None else graphs.nodes.shape[1]
        if graphs.nodes is None and jnp.ndim(graphs.edges) == 2 and len(graphs.edges) != 1:
            raise ValueError("graphs without features (each node its own) come one at a time: they share no node.")
        if graphs.nodes is not None:
            check_features(graphs, config.n_features)
        A = adjacency(jnp.asarray(graphs.senders), jnp.asarray(graphs.receivers), weights, n_nodes, config.aggregation)
        mask = node_mask(graphs, n_nodes).astype(weights.dtype)[..., None]
        return A, mask, None if graphs.nodes is None else jnp.asarray(graphs.nodes) * mask

    def radius(self, graphs: GraphsTuple) -> Float[Array, "..."]:
        """The spectral radius that the projection goes by: one for all graphs, or `[G]`."""
        dtype = jnp.asarray(graphs.edges).dtype
        if self.config.spectral_radius is not None:
            return jnp.asarray(self.config.spectral_radius, dtype)
        if graphs.globals is None:
            raise ValueError("the graphs carry no spectral radius in `globals`, and config.spectral_radius is None.")
        radius = jnp.asarray(graphs.globals)[:, 0].astype(dtype)
        # One weight matrix for one graph spares a batch of them.
        return radius[0] if radius.shape[0] == 1 else radius

    def after(
        self, number: int, z: Float[Array, "G N m"], x: Float[Array, "G N p"] | None, mask: Float[Array, "G N 1"]
    ) -> Float[Array, "G N m"]:
        """What follows an implicit layer: in the PPI network a linear skip of its input, and ELU except at the end."""
        if not self.skips:
            return z
        # The bias reaches padding as well; masked at once, no later layer sees it.
        z = (z + self.skips[number](x)) * mask
        return jax.nn.elu(z) if number + 1 < len(self.layers) else z

    # Decode ----------------------------------------------------------------------------------------------------------

    def decode(
        self, x: Float[Array, "G N m"], mask: Float[Array, "G N 1"], key: Key[Array, ""] | None
    ) -> Float[Array, "G *N C"]:
        """States to logits."""
        if self.config.network == "ppi":
            return x
        if self.config.network == "graphs":
            x = jax.nn.relu(self.hidden(jnp.sum(x * mask, axis=1)))
        elif self.config.network == "chains":
            x = unit_length(x)
        dropout = VariationalDropout(self.config.dropout).mask(key, x.shape, x.dtype)
        return self.readout(apply_mask(x, dropout))


def check_features(graphs: GraphsTuple, n_features: int) -> None:
    """Raises ValueError unless the nodes have so many features."""
    found = 0 if graphs.nodes is None else graphs.nodes.shape[-1]
    if found != n_features:
        raise ValueError(f"nodes of {found} features for a network of n_features={n_features}.")


def unit_length(x: Float[Array, "... m"], epsilon: float = 1e-12) -> Float[Array, "... m"]:
    """x / max(|x|, epsilon) along the last axis, with a gradient at zero and without underflow of squares."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    scale = jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(jnp.square(x / scale), axis=-1, keepdims=True)
    length = scale * jnp.sqrt(jnp.where(largest > 0, squares, 1))
    return jnp.where(length >= epsilon, x / jnp.where(length >= epsilon, length, 1), x / epsilon)


def _check_settings(deq: DEQConfig) -> None:
    if deq.n_supervised != 1:
        raise ValueError(
            f"the deq settings supervise {deq.n_supervised} states, but a layer of these networks passes one on: leave "
            "n_states=1, and indexing, sup_gap and sup_loc empty."
        )
    if deq.jac_loss_weight:
        raise ValueError(
            f"jac_loss_weight={deq.jac_loss_weight}: these networks are contractive by their weights' projection; set it to 0."
        )
