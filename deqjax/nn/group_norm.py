"""Group normalisation with statistics in float32, whatever the dtype of the input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float


def group_norm(
    x: Float[Array, "B *space C"],
    n_groups: int,
    scale: Float[Array, " C"] | None = None,
    bias: Float[Array, " C"] | None = None,
    epsilon: float = 1e-5,
) -> Float[Array, "B *space C"]:
    """Every sample's contiguous groups of channels at zero mean and unit variance (Wu and He 2018), the biased one.

    The output has the dtype of the statistics: float32, or float64 of such an input.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    along = lambda c: c.astype(dtype).reshape((1,) * (x.ndim - 1) + (-1,))  # noqa: E731
    y = _standardize(x.astype(dtype), n_groups, epsilon)
    y = y if scale is None else y * along(scale)
    return y if bias is None else y + along(bias)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _standardize(x, n_groups, epsilon):
    return _with_factor(x, n_groups, epsilon)[0]


@_standardize.defjvp
def _(n_groups, epsilon, primals, tangents):
    # The adjoint solve of an equilibrium applies this at every step. It is its own transpose, with two means that do not
    # wait for each other; differentiating the steps below one by one gives three, of which one does.
    y, factor = _with_factor(*primals, n_groups, epsilon)
    dx = factor * tangents[0]
    return y, dx - _means(dx, n_groups) - y * _means(y * dx, n_groups)


def _with_factor(x, n_groups, epsilon):
    """x less its mean, times one over its standard deviation; and that factor."""
    x = x - _means(x, n_groups)
    factor = jax.lax.rsqrt(_means(jnp.square(x), n_groups) + epsilon)
    return x * factor, factor


def _means(x, n_groups):
    """Over positions and the channels of a group, one for each channel again. The big array is never reshaped."""
    n_channels = x.shape[-1]
    per_channel = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
    per_group = jnp.mean(per_channel.reshape(len(x), n_groups, n_channels // n_groups), axis=-1)
    return jnp.repeat(per_group, n_channels // n_groups, axis=-1).reshape(len(x), *(1,) * (x.ndim - 2), n_channels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupNormWeights:
    """What a group normalisation needs during a solve: scale and bias `[C]`, or None each."""

    scale: jax.Array | None
    bias: jax.Array | None
    n_groups: int = dataclasses.field(metadata={"static": True})
    epsilon: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        return group_norm(x, self.n_groups, self.scale, self.bias, self.epsilon)


class GroupNorm(nnx.Module):
    """Group normalisation of `[B, *space, C]`; the output is float32 or better.

    Args:
      n_features: C.
      n_groups: must divide C.
      epsilon: added to the variance.
      affine: learn a scale and a bias per channel, one and zero at first.

    Raises:
      ValueError: the groups do not divide the channels.
    """

    def __init__(self, n_features: int, n_groups: int, *, epsilon: float = 1e-5, affine: bool = True):
        if n_groups < 1 or n_features % n_groups:
            raise ValueError(f"n_groups={n_groups} must divide the {n_features} channels that it normalises.")
        self.n_groups, self.epsilon = n_groups, epsilon
        self.scale = nnx.Param(jnp.ones((n_features,))) if affine else None
        self.bias = nnx.Param(jnp.zeros((n_features,))) if affine else None

    def effective(self) -> GroupNormWeights:
        """The weights to use in one forward pass."""
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return GroupNormWeights(scale, bias, self.n_groups, self.epsilon)

    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        return self.effective()(x)
