"""Weight and spectral normalisation, computed once per forward pass and never inside a solve.

A layer keeps the unnormalised weight; `effective` weights go into the injection. Flax layouts put output features on
the last axis, which is therefore the default of `axis`.
"""

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


class NormalizedKernel(nnx.Module):
    """A kernel `[..., n_out]` kept unnormalised, whose effective value is taken once per forward pass.

    Args:
      kernel: initial value. With weight normalisation the scale g starts at its norms, so that normalising changes nothing
        at first; with spectral normalisation it starts at the target norm.
      config: its `norm_*` settings choose the normalisation.
      rngs: draws the first singular vectors of spectral normalisation.
    """

    def __init__(self, kernel: Float[Array, "... out"], *, config: DEQConfig, rngs: nnx.Rngs):
        n_out, dtype = kernel.shape[-1], kernel.dtype
        self.config = config
        self.kernel = nnx.Param(kernel)
        scale = None
        if config.norm_type != "none" and not config.norm_no_scale:
            initial = jnp.full((n_out,), config.norm_target_norm, dtype)
            if config.norm_type == "weight_norm":
                initial = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=_other_axes(kernel, -1)))
            scale = nnx.Param(initial)
        self.scale = scale
        if config.norm_type == "spectral_norm":
            self.u = SpectralVector(_unit(jax.random.normal(rngs.params(), (n_out,), dtype)))
            self.v = SpectralVector(_unit(jax.random.normal(rngs.params(), (kernel.size // n_out,), dtype)))

    def normalized(self, *, train: bool) -> Float[Array, "... out"]:
        """The kernel to use in one forward pass. With spectral normalisation, training advances the power iteration."""
        config = self.config
        kernel, scale = self.kernel[...], None if self.scale is None else self.scale[...]
        settings = {
            "target_norm": config.norm_target_norm,
            "clip_value": config.norm_clip_value if config.norm_clip else None,
        }
        if config.norm_type == "weight_norm":
            return weight_norm(kernel, scale, **settings)
        if config.norm_type == "spectral_norm":
            iterations = config.sn_n_power_iters if train else 0
            kernel, u, v = spectral_norm(kernel, self.u[...], self.v[...], scale, n_power_iters=iterations, **settings)
            if train:
                self.u[...], self.v[...] = u, v
        return kernel
