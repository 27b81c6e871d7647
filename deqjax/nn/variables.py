"""Kinds of model state that the training loop treats in a way of their own."""

from flax import nnx


class AdjointProbe(nnx.Variable):
    """Zeros whose "gradient" is the statistics of the backward solve; see `deqjax.adjoint_probe`."""


class BatchVariable(nnx.Variable):
    """Per-stream state, such as a segment memory: axis 0 of every array in it is the batch, scalars are shared.

    Sharded like the batch, so that each stream's memory stays on the device that computes the stream.
    """
