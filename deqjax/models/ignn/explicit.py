"""The explicit baseline: a graph convolutional network of T layers sees T hops and no further."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Key
from deqjax.models.ignn.aggregation import adjacency
from deqjax.models.ignn.graphs import GraphsTuple, node_mask
from deqjax.models.ignn.network import Linear, Output, check_features, unit_length
from deqjax.nn.dropout import VariationalDropout, apply_mask


class GCN(nnx.Module):
    """Z <- relu(A^T Z W), T times (Kipf and Welling 2017), then what `IGNN` does with its states.

    That is a linear map of states of unit length, or, for whole graphs, of their sum over the nodes. Takes the batches that
    `IGNN` takes.

    Args:
      n_features, n_hidden, n_classes: sizes.
      n_layers: T.
      dropout: rate before the last linear map.
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
        self.n_features = n_features
        self.dropout, self.pool, self.aggregation = dropout, pool, aggregation
        self.layers = nnx.List([Linear(a, b, rngs, use_bias=False) for a, b in itertools.pairwise(sizes)])
        self.readout = Linear(n_hidden, n_classes, rngs, use_bias=pool)

    def __call__(
        self, graphs: GraphsTuple, *, train: bool = False, key: Key[Array, ""] | None = None, solver_options=None
    ) -> Output:
        """Logits of every node `[G, N, C]` or graph `[G, C]`.

        Raises:
          ValueError: nodes without features, or with another number of them.
        """
        check_features(graphs, self.n_features)
        x, weights = jnp.asarray(graphs.nodes), jnp.asarray(graphs.edges)
        A = adjacency(jnp.asarray(graphs.senders), jnp.asarray(graphs.receivers), weights, x.shape[1], self.aggregation)
        mask = node_mask(graphs, x.shape[1]).astype(weights.dtype)[..., None]
        for layer in self.layers:
            x = jax.nn.relu(A.aggregate(layer(x) * mask))
        x = jnp.sum(x * mask, axis=1) if self.pool else unit_length(x)
        dropout = VariationalDropout(self.dropout).mask(key, x.shape, x.dtype)
        return Output(self.readout(apply_mask(x, dropout)), (), ())
