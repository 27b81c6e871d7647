"""f(h, flow): look correlations up where the flow points, encode the motion, update the hidden state, improve the flow.

Bai et al. 2022 (arXiv 2204.08442), section 3; after RAFT's update operator. What the context contributes to the six
convolutions of the recurrent unit does not change during a solve and is computed once, with their biases.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.attention import Aggregate, AggregateWeights
from deqjax.models.flow.config import FlowConfig
from deqjax.models.flow.correlation import LEVELS, RADIUS, FeatureMaps, Volume, grid, lookup
from deqjax.models.flow.layers import Conv
from deqjax.nn.config import DEQConfig
from deqjax.nn.layers import ConvWeights, convolve


class State(NamedTuple):
    """What is solved for, at an eighth of the pictures' size.

    The relative residual is that of hidden state and flow; in the original absolute coordinates hide its size.
    """

    h: jax.Array  # [B, h, w, C]
    flow: jax.Array  # [B, h, w, 2], (x, y) in pixels of this grid


class MotionWeights(NamedTuple):
    """The motion encoder during a solve."""

    convc1: ConvWeights
    convc2: ConvWeights
    convf1: ConvWeights
    convf2: ConvWeights
    conv: ConvWeights

    def __call__(self, flow, correlations):
        """Motion features `[B, h, w, motion]`, whose last two channels are the flow."""
        relu = jax.nn.relu
        c = relu(convolve(relu(convolve(correlations, self.convc1)), self.convc2))
        f = relu(convolve(relu(convolve(flow, self.convf1)), self.convf2))
        both = relu(convolve(jnp.concatenate([c, f], axis=-1), self.conv))
        return jnp.concatenate([both, flow.astype(both.dtype)], axis=-1)


class GRUWeights(NamedTuple):
    """One pass of the recurrent unit during a solve: the convolutions of hidden state and motion, without biases."""

    gates: ConvWeights  # z and r
    candidate: ConvWeights

    def __call__(self, h, x, context):
        """The new hidden state, given `[B, h, w, 3 C]` from the context."""
        of_gates, of_candidate = jnp.split(context, [2 * h.shape[-1]], axis=-1)
        gates = jax.nn.sigmoid(_plus(convolve(jnp.concatenate([h, x], axis=-1), self.gates), of_gates))
        z, r = jnp.split(gates, 2, axis=-1)
        q = jnp.tanh(_plus(convolve(jnp.concatenate([r * h, x], axis=-1), self.candidate), of_candidate))
        return (1 - z) * h + z * q


class FlowHeadWeights(NamedTuple):
    """The flow head during a solve."""

    conv1: ConvWeights
    conv2: ConvWeights

    def __call__(self, h):
        return convolve(jax.nn.relu(convolve(h, self.conv1)), self.conv2)


class CellWeights(NamedTuple):
    """The weights of f, normalised once per forward pass."""

    motion: MotionWeights
    gru: tuple[GRUWeights, GRUWeights]  # along rows, then along columns
    flow_head: FlowHeadWeights
    aggregate: AggregateWeights | None


class Injection(NamedTuple):
    """Everything that f depends on besides its state."""

    correlation: Volume | FeatureMaps
    context: tuple[jax.Array, jax.Array]  # [B, h, w, 3 C] for each pass of the recurrent unit
    attention: jax.Array | None  # [B, 1, N, N]
    weights: CellWeights


class MotionEncoder(nnx.Module):
    """From correlations and flow to motion features."""

    def __init__(self, config: FlowConfig, new_conv):
        (c1, c2), (f1, f2), motion = config.widths.correlation, config.widths.flow, config.widths.motion
        self.convc1, self.convc2 = new_conv(LEVELS * (2 * RADIUS + 1) ** 2, c1, 1), new_conv(c1, c2, 3)
        self.convf1, self.convf2 = new_conv(2, f1, 7), new_conv(f1, f2, 3)
        self.conv = new_conv(c2 + f2, motion - 2, 3)

    def effective(self, *, train: bool) -> MotionWeights:
        layers = (self.convc1, self.convc2, self.convf1, self.convf2, self.conv)
        return MotionWeights(*(layer.effective(train=train) for layer in layers))


class SeparableGRU(nnx.Module):
    """A convolutional gated recurrent unit, with windows of 1 x 5 and then of 5 x 1."""

    def __init__(self, C: int, n_in: int, new_conv):
        self.convz1, self.convr1, self.convq1 = (new_conv(C + n_in, C, (1, 5)) for _ in range(3))
        self.convz2, self.convr2, self.convq2 = (new_conv(C + n_in, C, (5, 1)) for _ in range(3))

    def effective(self, context: Float[Array, "B h w C"], *, train: bool) -> tuple[tuple, tuple]:
        """The weights of both passes, and what the context contributes to each."""
        of_pass = lambda *layers: _split([layer.effective(train=train) for layer in layers], context)  # noqa: E731
        passes = (of_pass(self.convz1, self.convr1, self.convq1), of_pass(self.convz2, self.convr2, self.convq2))
        return tuple(weights for weights, _ in passes), tuple(contribution for _, contribution in passes)


class FlowHead(nnx.Module):
    """From the hidden state to an update of the flow."""

    def __init__(self, C: int, width: int, new_conv):
        self.conv1, self.conv2 = new_conv(C, width, 3), new_conv(width, 2, 3)

    def effective(self, *, train: bool) -> FlowHeadWeights:
        return FlowHeadWeights(self.conv1.effective(train=train), self.conv2.effective(train=train))


class Cell(nnx.Module):
    """f.

    Args:
      config: sizes.
      deq: weight normalisation of all convolutions.
      rngs: draws the initial weights.
    """

    def __init__(self, config: FlowConfig, deq: DEQConfig, rngs: nnx.Rngs):
        def new_conv(n_in, n_out, window):
            return Conv(n_in, n_out, window, rngs, deq=deq, dtype=config.dtype)

        C, motion = config.widths.hidden, config.widths.motion
        self.config = config
        self.encoder = MotionEncoder(config, new_conv)
        self.gru = SeparableGRU(C, C + motion * (2 if config.gma else 1), new_conv)
        self.flow_head = FlowHead(C, config.head_width, new_conv)
        self.gma = Aggregate(motion, 1, motion, rngs, deq=deq, dtype=config.dtype) if config.gma else None

    def effective(self, context: Float[Array, "B h w C"], *, train: bool) -> tuple[CellWeights, tuple]:
        """The weights to use in one forward pass, and what the context contributes to the recurrent unit."""
        gru, contributions = self.gru.effective(context, train=train)
        aggregate = None if self.gma is None else self.gma.effective(train=train)
        weights = CellWeights(self.encoder.effective(train=train), gru, self.flow_head.effective(train=train), aggregate)
        return weights, contributions

    def __call__(self, z: State, injection: Injection) -> State:
        """One application of f."""
        flow = z.flow if self.config.all_grad else jax.lax.stop_gradient(z.flow)
        correlations = lookup(injection.correlation, grid(*flow.shape[:3], flow.dtype) + flow)
        h, update = self.update(z.h, flow, correlations, injection)
        return State(h.astype(z.h.dtype), flow + update.astype(flow.dtype))

    def update(self, h, flow, correlations, injection) -> tuple[jax.Array, jax.Array]:
        """The new hidden state and the flow's update, given the correlations at its targets."""
        weights = injection.weights
        x = weights.motion(flow, correlations)
        if weights.aggregate is not None:
            x = jnp.concatenate([x, weights.aggregate(x, injection.attention)], axis=-1)
        for gru, context in zip(weights.gru, injection.context, strict=True):
            h = gru(h, x, context)
        return h, weights.flow_head(h)


def _split(layers: list[ConvWeights], context) -> tuple[GRUWeights, jax.Array]:
    """Convolutions z, r and q of [h, context, x] as ones of [h, x], and what the context contributes to them."""
    C = context.shape[-1]
    kernel = jnp.concatenate([layer.kernel for layer in layers], axis=-1)
    bias = jnp.concatenate([layer.bias for layer in layers])
    of_h, of_context, of_x = jnp.split(kernel, [C, 2 * C], axis=2)
    varying = jnp.concatenate([of_h, of_x], axis=2)
    gates, candidate = (ConvWeights(k, None, layers[0].options) for k in jnp.split(varying, [2 * C], axis=-1))
    whole = dataclasses.replace(layers[0], kernel=of_context, bias=bias)
    return GRUWeights(gates, candidate), convolve(context, whole)


def _plus(x, y):
    """The sum in the wider dtype of the two, which is that of the context."""
    return x.astype(y.dtype) + y
