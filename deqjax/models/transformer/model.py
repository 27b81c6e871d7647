"""The DEQ transformer language model: encode, cell, decode.

Bai et al. 2019 (arXiv 1909.01377) on the Transformer-XL of Dai et al. 2019 (arXiv 1901.02860), in the two published
variants `deq-lm` and `deq-seq`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core import batched
from deqjax.core.annotations import Array, ArrayLike, Float, Int, Key
from deqjax.core.correction import correction_weights
from deqjax.core.stability import jacobian_loss
from deqjax.core.stats import SolverStats
from deqjax.models.transformer.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from deqjax.models.transformer.cell import BlockMasks, Cell, Injection
from deqjax.models.transformer.config import TransformerConfig, warn_without_fixed_point
from deqjax.models.transformer.memory import Memory
from deqjax.nn.config import DEQConfig
from deqjax.nn.deq import DEQ
from deqjax.nn.dropout import VariationalDropout, apply_mask
from deqjax.nn.layers import LinearWeights, uniform


class Masks(NamedTuple):
    """Every dropout mask of one forward pass; the blocks' are shared by all applications of f."""

    embedding: jax.Array | None  # [B, 1, D]
    position: jax.Array | None  # [1, D] or [K, 1]
    blocks: tuple[BlockMasks, ...]
    output: tuple[jax.Array | None, ...]  # [B, L, 1], one per supervised state


class Output(NamedTuple):
    """Equilibrium of a segment."""

    states: tuple[jax.Array, ...]  # [B, L, D] each, to be decoded
    stats: SolverStats
    memory: Memory  # for the next segment
    injection: Injection
    spectral_radius: jax.Array | None  # [B], in evaluation with `sradius_mode`


class Linear(nnx.Module):
    """A plain linear layer with bias."""

    def __init__(self, kernel):
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros((kernel.shape[1],)))

    def __call__(self, x):
        return LinearWeights(self.kernel[...], self.bias[...])(x)


class DEQTransformer(nnx.Module):
    """A word-level language model whose hidden sequence is the fixed point of a transformer cell.

    Args:
      config: sizes and variant.
      deq: solver, gradient and normalisation.
      rngs: the "params" stream draws the initial weights.
    """

    def __init__(self, config: TransformerConfig, deq: DEQConfig, rngs: nnx.Rngs):
        warn_without_fixed_point(config, deq)
        D = config.d_model
        self.config, self.deq = config, DEQ(deq)
        self.embedding = AdaptiveEmbedding(config, rngs)
        self.injection = Linear(config.initial(rngs.params(), (D, 3 * D)))
        # In deq-seq the framework's default survives, because normalisation hides the weights from the script.
        hidden = config.recipe == "deq-seq" and deq.norm_type != "none"
        self.cell = Cell(config, deq, uniform if hidden else config.initial, rngs)
        self.softmax = AdaptiveSoftmax(config, self.embedding, rngs)

    # Encode ----------------------------------------------------------------------------------------------------------

    def encode(
        self, tokens: Int[ArrayLike, "B L"], memory: Memory, masks: Masks | None = None, *, train: bool = False
    ) -> Injection:
        """Tokens `[B, L]` and memory to the injection: all of f that does not depend on z."""
        masks = masks if masks is not None else self.sample_masks(None, *tokens.shape, memory.z.shape[1])
        u = self.injection(apply_mask(self.embedding(tokens), masks.embedding))
        injection = self.cell.context(u, memory, masks.position, masks.blocks, train)
        if self.config.dtype is None:
            return injection
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(self.config.dtype) if is_float(x) else x, injection)

    def sample_masks(self, key: Key[Array, ""] | None, batch: int, length: int, memory_rows: int) -> Masks:
        """Masks for one forward pass; all None without a key, that is in evaluation."""
        config, rate = self.config, self.config.dropout
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        embedding = VariationalDropout.channels(rate, 1).mask(keys[0], (batch, length, config.d_model))
        position_shape, shared = (memory_rows + length, config.d_model), (0,)
        if config.position_mask_axis == "positions":
            shared = (1,)
        position = VariationalDropout(rate, shared).mask(keys[1], position_shape)
        blocks = self.cell.sample_masks(keys[2], batch, length, memory_rows)
        # Drops whole output tokens: an accident of layout in the originals that the recipes were tuned with.
        tokens = VariationalDropout.tokens(rate, 1)
        output = tuple(
            tokens.mask(None if key is None else jax.random.fold_in(keys[3], k), (batch, length, config.d_model))
            for k in range(self.deq.config.n_supervised)
        )
        return Masks(embedding, position, blocks, output)

    # Solve -----------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        tokens: Int[ArrayLike, "B L"],
        memory: Memory,
        *,
        train: bool = False,
        masks: Masks | None = None,
        z_init: Float[Array, "B L D"] | None = None,
        unroll: int | None = None,
        solver_options: Mapping | None = None,
    ) -> Output:
        """The hidden states of a segment: `encode`, then `solve` with the same arguments."""
        injection = self.encode(tokens, memory, masks, train=train)
        return self.solve(injection, memory, train=train, z_init=z_init, unroll=unroll, solver_options=solver_options)

    def solve(
        self,
        injection: Injection,
        memory: Memory,
        *,
        train: bool = False,
        z_init: Float[Array, "B L D"] | None = None,
        unroll: int | None = None,
        solver_options: Mapping | None = None,
    ) -> Output:
        """Solves for the hidden states of an encoded segment. Changes nothing in the model.

        Args:
          injection: of the segment.
          memory: of the segments before.
          train: supervised states with gradients, or the single result.
          z_init: warm start; None starts from zeros.
          unroll: apply f so many times instead of solving (the pre-training phase).
          solver_options: see `DEQ`.
        """
        f = lambda z: self.cell(z, injection)  # noqa: E731
        if z_init is None:
            z_init = jnp.zeros((*injection.u.shape[:2], self.config.d_model))
        z_init = z_init.astype(injection.u.dtype)
        if unroll is not None:
            z, _ = jax.lax.scan(lambda z, _: (f(z), None), z_init, length=unroll)
            states, stats, radius = (z,), _monitor(f, z), None
        else:
            states, stats, radius = self.deq(f, z_init, train=train, solver_options=solver_options)
            if stats.abs_trace.shape[1] == 0:
                stats = _monitor(f, states[-1])
        memory = memory.append(states[-1], injection.u, self.config.mem_len)
        return Output(states, stats, memory, injection, radius)

    # Decode ----------------------------------------------------------------------------------------------------------

    def log_prob(self, z: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Log-probabilities of the next token at every position, `[B, L, V]`."""
        return self.softmax.log_prob(z)

    def nll(
        self, states: Sequence[Float[Array, "B L D"]], targets: Int[ArrayLike, "B Lt"], masks: Masks | None = None
    ) -> Float[Array, "B Lt"]:
        """Weighted -log p of targets `[B, Lt]` at the last Lt positions, summed over supervised states: `[B, Lt]`.

        The weights are those of the fixed-point correction, gamma^(n-1-k).
        """
        weights = correction_weights(len(states), "exp", gamma=self.deq.config.gamma)
        total = 0
        for k, (weight, z) in enumerate(zip(weights, states, strict=True)):
            h = apply_mask(z, None if masks is None else masks.output[k])
            total = total + weight * self.softmax.nll(h[:, h.shape[1] - targets.shape[1] :], targets)
        return total

    def jacobian_loss(
        self, output: Output, key: Key[Array, ""] | None = None, probes: Float[Array, "P B L D"] | None = None
    ) -> Float[Array, ""]:
        """Jacobian regularisation at the last state; moves the equilibrium as well as f."""
        f = lambda z: self.cell(z, output.injection)  # noqa: E731
        return jacobian_loss(f, output.states[-1], key, probes=probes)


def _monitor(f, z) -> SolverStats:
    """Residuals of a state that no solver vouches for, from one application without gradients."""
    z = jax.lax.stop_gradient(z)
    f_z = jax.lax.stop_gradient(f(z))
    absolute = batched.norm(batched.subtract(f_z, z))
    relative = absolute / (batched.norm(f_z) + 1e-8)
    steps = jnp.zeros_like(absolute, jnp.int32)
    return SolverStats(absolute, relative, steps, steps, absolute[:, None], relative[:, None], jnp.ones_like(steps))
