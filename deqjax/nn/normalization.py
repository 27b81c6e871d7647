"""Weight and spectral normalisation, computed once per forward pass and never inside a solve.

A layer keeps the unnormalised weight; `effective` weights go into the injection. Flax layouts put output features on
the last axis, which is therefore the default of `axis`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.nn.config import DEQConfig


def weight_norm(
    v: Float[Array, "..."],
    g: Float[Array, " out"] | None = None,
    *,
    axis: int = -1,
    target_norm: float = 1.0,
    clip_value: float | None = None,
) -> Float[Array, "..."]:
    """v * g / |v|, the norm over all axes but `axis` (Salimans and Kingma 2016).

    Args:
      v: weight, any shape.
      g: scale per slice along `axis`, shape `[v.shape[axis]]`; None uses `target_norm` for all.
      clip_value: upper bound of the factor g / |v|.
    """
    length = jnp.sqrt(jnp.sum(jnp.square(v), axis=_other_axes(v, axis)))
    return v * _along(_factor(g, length, target_norm, clip_value), v, axis)


def spectral_norm(
    weight: Float[Array, "..."],
    u: Float[Array, " out"],
    v: Float[Array, " rest"],
    g: Float[Array, " out"] | None = None,
    *,
    axis: int = -1,
    n_power_iters: int = 1,
    target_norm: float = 1.0,
    clip_value: float | None = None,
) -> tuple[Float[Array, "..."], Float[Array, " out"], Float[Array, " rest"]]:
    """weight * g / sigma with sigma the largest singular value of the weight as a matrix `[axis, rest]` (Miyato 2018).

    Args:
      weight: any shape; flattening takes the axes other than `axis` in order.
      u, v: left `[h]` and right `[w]` singular vectors so far.
      n_power_iters: power iterations to do first (0 in evaluation).

    Returns:
      The normalised weight and the new u and v, which carry no gradient.
    """
    matrix = jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    constant = jax.lax.stop_gradient(matrix)
    for _ in range(n_power_iters):
        v = _unit(constant.T @ u)
        u = _unit(constant @ v)
    u, v = jax.lax.stop_gradient((u, v))
    sigma = jnp.full((weight.shape[axis],), u @ matrix @ v)
    return weight * _along(_factor(g, sigma, target_norm, clip_value), weight, axis), u, v


def _factor(g, length, target_norm, clip_value):
    factor = (target_norm if g is None else g) / length
    return factor if clip_value is None else jnp.minimum(clip_value, factor)


def _other_axes(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _along(values, x, axis):
    return jnp.expand_dims(values, _other_axes(x, axis))


def _unit(x, epsilon=1e-12):
    return x / jnp.maximum(jnp.linalg.norm(x), epsilon)


class SpectralVector(nnx.Variable):
    """Singular-vector estimates of spectral normalisation; advanced once per training forward, never by gradients."""


class LinearWeights(NamedTuple):
    """What a linear layer needs during a solve: kernel `[in, out]` and bias `[out]` or None."""

    kernel: jax.Array
    bias: jax.Array | None

    def __call__(self, x: Float[Array, "... n_in"]) -> Float[Array, "... n_out"]:
        y = x @ self.kernel
        if self.bias is None:
            return y
        return y + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))


class NormalizedLinear(nnx.Module):
    """A linear layer whose effective weights are taken once (`effective`) and then used as constants.

    Args:
      in_features, out_features: sizes.
      config: its `norm_*` settings choose the normalisation.
      use_bias: add a bias.
      init: of the unnormalised kernel; the scale g starts at its norms, so normalising changes nothing at first.
    """

    def __init__(self, in_features, out_features, *, config: DEQConfig, use_bias=True, init, rngs: nnx.Rngs, dtype=jnp.float32):
        kernel = init(rngs.params(), (in_features, out_features), dtype)
        self.config = config
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None
        scale = None
        if config.norm_type != "none" and not config.norm_no_scale:
            initial = jnp.full((out_features,), config.norm_target_norm, dtype)
            if config.norm_type == "weight_norm":
                initial = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))
            scale = nnx.Param(initial)
        self.scale = scale
        if config.norm_type == "spectral_norm":
            self.u = SpectralVector(_unit(jax.random.normal(rngs.params(), (out_features,), dtype)))
            self.v = SpectralVector(_unit(jax.random.normal(rngs.params(), (in_features,), dtype)))

    def effective(self, *, train: bool = False) -> LinearWeights:
        """The weights to use in one forward pass. With spectral normalisation, training advances the power iteration."""
        config = self.config
        kernel, scale = self.kernel[...], None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        clip = config.norm_clip_value if config.norm_clip else None
        if config.norm_type == "weight_norm":
            kernel = weight_norm(kernel, scale, target_norm=config.norm_target_norm, clip_value=clip)
        elif config.norm_type == "spectral_norm":
            iterations = config.sn_n_power_iters if train else 0
            kernel, u, v = spectral_norm(
                kernel,
                self.u[...],
                self.v[...],
                scale,
                n_power_iters=iterations,
                target_norm=config.norm_target_norm,
                clip_value=clip,
            )
            if train:
                self.u[...], self.v[...] = u, v
        return LinearWeights(kernel, bias)
