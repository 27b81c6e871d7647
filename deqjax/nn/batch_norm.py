"""Batch normalisation with PyTorch's numbers.

Flax's own keeps a running mean of the biased variance and counts momentum the other way round.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float


class BatchNorm(nnx.Module):
    """Normalises every channel over the batch and all positions (Ioffe and Szegedy 2015), `[B, *space, C]`.

    Training normalises with the batch's biased variance and moves the running statistics by `momentum` towards the batch's
    mean and unbiased variance; evaluation normalises with the running ones. The batch is the global one: on a mesh, devices
    agree on its statistics. These are computed in float32 or better, whatever the dtype of the input, which the output keeps.

    Not for use inside a solve, whose steps would each see other statistics.

    Args:
      n_features: C.
      momentum: PyTorch's: running <- (1 - momentum) * running + momentum * batch.
      epsilon: added to the variance.
      affine: learn a scale and a bias per channel, one and zero at first.
    """

    def __init__(self, n_features: int, *, momentum: float = 0.1, epsilon: float = 1e-5, affine: bool = True):
        self.momentum, self.epsilon = momentum, epsilon
        self.scale = nnx.Param(jnp.ones((n_features,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((n_features,))) if affine else None
        self.mean, self.var = nnx.BatchStat(jnp.zeros((n_features,))), nnx.BatchStat(jnp.ones((n_features,)))

    def __call__(self, x: Float[Array, "B *space C"], *, train: bool) -> Float[Array, "B *space C"]:
        """x normalised.

        Args:
          train: use the statistics of this batch, and move the running ones.

        Raises:
          ValueError: training on a single value per channel, which has no variance.
        """
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        values = x.astype(dtype)
        if train:
            mean, var = self._batch_statistics(values)
        else:
            mean, var = (s[...].astype(dtype) for s in (self.mean, self.var))
        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            factor = factor * self.scale[...].astype(dtype)
        shift = -mean * factor if self.bias is None else self.bias[...].astype(dtype) - mean * factor
        along = lambda c: c.reshape((1,) * (x.ndim - 1) + (-1,))  # noqa: E731
        return (values * along(factor) + along(shift)).astype(x.dtype)

    def _batch_statistics(self, x):
        """Mean and biased variance of the batch; the running statistics move on."""
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        if count < 2:
            raise ValueError(f"batch normalisation of {x.shape}: training needs more than one value per channel.")
        mean = jnp.mean(x, axis=axes)
        var = jnp.mean(jnp.square(x - mean.reshape((1,) * (x.ndim - 1) + (-1,))), axis=axes)
        for running, batch in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            old = running[...]
            running[...] = old + self.momentum * (jax.lax.stop_gradient(batch).astype(old.dtype) - old)
        return mean, var
