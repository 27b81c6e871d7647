"""The explicit baseline: a graph convolutional network of T layers sees T hops and no further."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Key
from deqjax.models.ignn.aggregation import adjacency
from deqjax.models.ignn.graphs import GraphsTuple, node_mask
from deqjax.models.ignn.network import Linear, Output
from deqjax.nn.dropout import VariationalDropout, apply_mask


class GCN(nnx.Module):
    """Z <- relu(A^T Z W + b), T times, then a linear map (Kipf and Welling 2017); for whole graphs after a sum over nodes.

    Takes the batches that `IGNN` takes.

    Args:
      n_features, n_hidden, n_classes: sizes.
      n_layers: T.
      dropout: rate before every linear map but the first.
      pool: classify graphs instead of nodes.
      aggregation: see `deqjax.models.ignn.aggregation`.
    """

    def __init__(
        self,
        n_features: int,
        n_hidden: int,
        n_classes: int,
        n_layers: int,
        rngs: nnx.Rngs,
        *,
        dropout: float = 0.5,
        pool: bool = False,
        aggregation: str = "auto",
    ):
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers}: must be 1 or more.")
        sizes = [n_features] + [n_hidden] * n_layers
        self.dropout, self.pool, self.aggregation = dropout, pool, aggregation
        self.layers = nnx.List([Linear(a, b, rngs) for a, b in itertools.pairwise(sizes)])
        self.readout = Linear(n_hidden, n_classes, rngs)

    def __call__(
        self, graphs: GraphsTuple, *, train: bool = False, key: Key[Array, ""] | None = None, solver_options=None
    ) -> Output:
        """Logits of every node `[G, N, C]` or graph `[G, C]`."""
        x, weights = jnp.asarray(graphs.nodes), jnp.asarray(graphs.edges)
        A = adjacency(jnp.asarray(graphs.senders), jnp.asarray(graphs.receivers), weights, x.shape[1], self.aggregation)
        mask = node_mask(graphs, x.shape[1]).astype(weights.dtype)[..., None]
        drop = VariationalDropout(self.dropout)
        keys = [None] * (len(self.layers) + 1) if key is None else jax.random.split(key, len(self.layers) + 1)
        for number, layer in enumerate(self.layers):
            if number:
                x = apply_mask(x, drop.mask(keys[number], x.shape, x.dtype))
            x = jax.nn.relu(A.aggregate(layer(x) * mask))
        x = jnp.sum(x * mask, axis=1) if self.pool else x
        return Output(self.readout(apply_mask(x, drop.mask(keys[-1], x.shape, x.dtype))), (), ())
