"""Adaptive embedding and projected adaptive softmax (Baevski and Auli 2019; Grave et al. 2017), weights shared.

The vocabulary, sorted by frequency, is cut into clusters. The first is the shortlist; every later one is one class of
the head, and has a softmax of its own, read through a narrower projection.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core import batched
from deqjax.core.annotations import Array, ArrayLike, Float, Int
from deqjax.models.transformer.config import TransformerConfig

# Rows of one stream times a tail's vocabulary that are expanded to logits at a time.
_TAIL_BUDGET = 2**21


class AdaptiveEmbedding(nnx.Module):
    """Token ids `[B, L]` to embeddings `[B, L, D]`, scaled by sqrt(D)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        ends, widths = config.cluster_ends, config.cluster_widths
        if config.div_val == 1:
            ends, widths = [0, config.n_tokens], [config.embed_width]
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        tables = [config.initial(rngs.params(), shape) for shape in zip(sizes, widths, strict=True)]
        self.tables = nnx.List([nnx.Param(t) for t in tables])
        projections = [config.initial_projection(rngs.params(), width) for width in widths]
        self.projections = nnx.List([nnx.Param(p) for p in projections] if config.has_projections else [])

    def __call__(self, tokens: Int[ArrayLike, "B L"]) -> Float[Array, "B L D"]:
        config = self.config
        if config.div_val == 1:
            e = self._project(self.tables[0][...][tokens], 0)
        else:
            e = 0
            for i, (start, end) in enumerate(zip(config.cluster_ends[:-1], config.cluster_ends[1:], strict=True)):
                inside = (tokens >= start) & (tokens < end)
                rows = self.tables[i][...][jnp.clip(tokens - start, 0, end - start - 1)]
                e = e + self._project(jnp.where(inside[..., None], rows, 0), i)
        return e * config.d_model**0.5

    def _project(self, rows, i):
        return rows @ self.projections[i][...].T if self.projections else rows


def twice_held_projections(config: TransformerConfig) -> list[list[tuple[str, ...]]]:
    """With `tie_projections="upstream"`, the paths within the model of those parameters that are one tensor in the originals.

    Tail i reads through the embedding's projection i, or through its only one when all clusters are equally wide.
    """
    tails = range(1, len(config.cutoffs) + 1)
    if config.tie_projections != "upstream" or not config.has_projections:
        return []
    embedding, softmax = (lambda i, owner=owner: (owner, "projections", str(i)) for owner in ("embedding", "softmax"))
    if config.div_val == 1:
        return [[embedding(0), *map(softmax, tails)]] if tails else []
    return [[embedding(i), softmax(i)] for i in tails]


class AdaptiveSoftmax(nnx.Module):
    """Log-probabilities of tokens given hidden states `[B, L, D]`.

    The column of tail i in the head counts from the end, as in the originals: checkpoints depend on it.
    """

    def __init__(self, config: TransformerConfig, embedding: AdaptiveEmbedding, rngs: nnx.Rngs):
        self.config = config
        n_tails, widths = len(config.cutoffs), config.cluster_widths
        if config.tie_weights:
            self.tables = embedding.tables
        else:
            shapes = [t[...].shape for t in embedding.tables]
            self.tables = nnx.List([nnx.Param(config.initial(rngs.params(), shape)) for shape in shapes])
        self.biases = nnx.List([nnx.Param(jnp.zeros((t[...].shape[0],))) for t in self.tables])
        self.projections = nnx.List([])
        if config.has_projections:
            for i, width in enumerate(widths):
                shared = embedding.projections[i if config.div_val > 1 else 0]
                if i == 0 or config.tie_projections == "none":
                    self.projections.append(nnx.Param(config.initial_projection(rngs.params(), width)))
                elif config.tie_projections == "upstream":
                    self.projections.append(nnx.Param(shared[...]))
                else:
                    self.projections.append(shared)
        self.cluster_weight = nnx.Param(config.initial(rngs.params(), (n_tails, widths[0]))) if n_tails else None
        self.cluster_bias = nnx.Param(jnp.zeros((n_tails,))) if n_tails else None

    def log_prob(self, h: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Log-probabilities of the whole vocabulary, `[B, L, V]`."""
        head = self._head(h)
        n_tails, shortlist = len(self.config.cutoffs), self.config.cluster_ends[1]
        parts = [head[..., :shortlist]]
        for i in range(1, n_tails + 1):
            parts.append(head[..., shortlist + n_tails - i][..., None] + jax.nn.log_softmax(self._tail_logits(h, i)))
        return jnp.concatenate(parts, axis=-1)

    def nll(self, h: Float[Array, "B L D"], targets: Int[ArrayLike, "B L"]) -> Float[Array, "B L"]:
        """-log p of `targets` `[B, L]`, in token order: `[B, L]`."""
        config, n_tails = self.config, len(self.config.cutoffs)
        ends, shortlist = config.cluster_ends, config.cluster_ends[1]
        head = self._head(h)
        column = targets
        for i in range(1, n_tails + 1):
            column = jnp.where((targets >= ends[i]) & (targets < ends[i + 1]), shortlist + n_tails - i, column)
        nll = -jnp.take_along_axis(head, column[..., None], axis=-1)[..., 0]
        for i in range(1, n_tails + 1):
            nll = nll + self._tail_nll(h, targets, i)
        return nll

    def _head(self, h):
        """Log-probabilities of shortlist tokens and tail classes."""
        projected = self._project(h, 0)
        table, bias = self._cluster(0)
        if self.cluster_weight is not None:
            table = jnp.concatenate([table, self.cluster_weight[...]])
            bias = jnp.concatenate([bias, self.cluster_bias[...]])
        return jax.nn.log_softmax(_logits(projected, table, bias))

    def _tail_logits(self, h, i):
        return _logits(self._project(h, i), *self._cluster(i))

    def _tail_nll(self, h, targets, i):
        """The tail's share of nll, zero for tokens outside it, expanding only the tokens that are inside.

        Positions of each stream are sorted so that the tail's come first, and taken in chunks of static size; chunks
        that no stream needs are skipped.
        """
        B, L = targets.shape
        start, end = self.config.cluster_ends[i : i + 2]
        inside = (targets >= start) & (targets < end)
        chunk = max(1, min(L, max(8, _TAIL_BUDGET // (end - start))))
        n_chunks = -(-L // chunk)
        order = jnp.argsort(~inside, axis=1, stable=True)
        order = jnp.pad(order, ((0, 0), (0, n_chunks * chunk - L)), constant_values=L)
        needed = jnp.max(jnp.sum(inside, axis=1))
        h = self._project(h, i)
        table, bias = self._cluster(i)

        def expand(rows):
            picked = jnp.take_along_axis(h, jnp.minimum(rows, L - 1)[..., None], axis=1)
            goal = jnp.take_along_axis(targets, jnp.minimum(rows, L - 1), axis=1) - start
            logp = jax.nn.log_softmax(_logits(picked, table, bias))
            value = -jnp.take_along_axis(logp, jnp.clip(goal, 0, end - start - 1)[..., None], axis=-1)[..., 0]
            return jnp.where((rows < L) & (goal >= 0) & (goal < end - start), value, 0)

        if n_chunks == 1:
            values = expand(order)
        else:
            # Recomputed in the backward pass: the logits of all chunks at once are what this avoids.
            expand = jax.checkpoint(expand)

            def visit(_, k):
                rows = jax.lax.dynamic_slice_in_dim(order, k * chunk, chunk, axis=1)
                dtype = batched.accumulation_dtype(h)
                skip = lambda rows: jnp.zeros(rows.shape, dtype)  # noqa: E731
                return None, jax.lax.cond(k * chunk < needed, expand, skip, rows)

            _, values = jax.lax.scan(visit, None, jnp.arange(n_chunks))
            values = jnp.moveaxis(values, 0, 1).reshape(B, -1)
        inverse = jnp.argsort(order[:, :L], axis=1)
        return jnp.take_along_axis(values[:, :L], inverse, axis=1)

    def _cluster(self, i):
        """Table and bias of cluster i."""
        if self.config.div_val > 1:
            return self.tables[i][...], self.biases[i][...]
        start, end = self.config.cluster_ends[i : i + 2]
        return self.tables[0][...][start:end], self.biases[0][...][start:end]

    def _project(self, h, i):
        return h @ self.projections[i][...] if self.projections else h


def _logits(h, table, bias):
    logits = h @ table.T
    logits = logits.astype(batched.accumulation_dtype(logits))
    return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,)).astype(logits.dtype)
