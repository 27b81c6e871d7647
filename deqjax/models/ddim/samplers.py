"""The sequential samplers: one call of the network after the other."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.core.annotations import Array, Float, Int
from deqjax.models.ddim.schedule import Chain
from deqjax.models.ddim.unet import UNet

# The noise in images `[N, H, W, C]`, each at its step `[N]` of a chain.
Denoiser = Callable[[Float[Array, "N H W C"], Int[Array, " N"]], Float[Array, "N H W C"]]


class Sampled(NamedTuple):
    """What a sampler made.

    Attributes:
      image: `[B, H, W, C]`.
      trajectory: `[B, T, H, W, C]` states after each step; the last is the image.
      predictions: `[B, T, H, W, C]` the image as each step predicted it.
      failed_at: `[B]` the first step at which the network's output was not finite; -1: none.
    """

    image: jax.Array
    trajectory: jax.Array
    predictions: jax.Array
    failed_at: jax.Array


class NonFiniteOutput(ValueError):
    """The network returned NaN or infinity at some timestep of a chain."""


def check_finite(failed_at, chain: Chain) -> None:
    """Raises NonFiniteOutput, naming samples and timesteps, unless all went well. Needs concrete values."""
    failed_at = np.asarray(failed_at)
    if bad := [f"sample {i} at timestep {chain.t[k]}" for i, k in enumerate(failed_at) if k >= 0]:
        raise NonFiniteOutput(
            f"the network's output is not finite for {len(bad)} of {len(failed_at)} samples: {', '.join(bad[:8])}. The weights "
            "are damaged, or the images too large for the network's dtype: compute in float32 (dtype), or load other weights."
        )


def chain_denoiser(model: UNet, chain: Chain) -> Denoiser:
    """The model on a chain. What depends on the timestep alone is computed here, once."""
    table = model.embed(jnp.asarray(chain.t))
    return lambda x, k: model.denoise(x, tuple(rows[k] for rows in table))


def sample_ddim(
    denoise: Denoiser, chain: Chain, x_T: Float[Array, "B H W C"], noise: Float[Array, "B T H W C"] | None = None
) -> Sampled:
    """DDIM (Song et al. 2021), of any eta.

    Args:
      denoise: the network.
      chain: the steps.
      x_T: the latents to begin with.
      noise: standard normal, one for each step, where the chain has eta > 0.

    Raises:
      ValueError: the chain needs noise and got none.
    """
    coefficients = {"carry": chain.carry, "push": chain.push, "sigma": chain.sigma}

    def step(x, e, predicted, c, z):
        x = c["carry"] * x + c["push"] * e
        return x if z is None else x + c["sigma"] * z

    return _scan(step, coefficients, denoise, chain, x_T, noise)


def sample_ddpm(
    denoise: Denoiser, chain: Chain, x_T: Float[Array, "B H W C"], noise: Float[Array, "B T H W C"] | None
) -> Sampled:
    """Ancestral sampling (Ho et al. 2020) with the larger of the two variances, predicted images clipped to [-1, 1].

    Takes the timesteps of the chain, whatever its eta, and fresh noise at every step but that from timestep 0.
    """
    beta = 1 - chain.a / chain.b
    coefficients = {
        "image": np.sqrt(chain.b) * beta / (1 - chain.a),
        "state": np.sqrt(1 - beta) * (1 - chain.b) / (1 - chain.a),
        "sigma": np.where(chain.t > 0, np.sqrt(beta), 0),
    }

    def step(x, e, predicted, c, z):
        return c["image"] * jnp.clip(predicted, -1, 1) + c["state"] * x + c["sigma"] * z

    if noise is None:
        raise ValueError("ancestral sampling needs noise `[B, T, H, W, C]`, one for each step.")
    sampled = _scan(step, coefficients, denoise, chain, x_T, noise)
    return sampled._replace(predictions=jnp.clip(sampled.predictions, -1, 1))


def _scan(step, coefficients, denoise, chain, x_T, noise) -> Sampled:
    if noise is None and np.any(chain.sigma):
        raise ValueError("a chain with eta > 0 needs noise `[B, T, H, W, C]`, one for each step.")
    B, dtype = x_T.shape[0], x_T.dtype
    coefficients |= {"to_image": 1 / np.sqrt(chain.a), "noise_share": np.sqrt(1 / chain.a - 1)}
    coefficients = {name: jnp.asarray(c, dtype) for name, c in coefficients.items()}
    over_time = None if noise is None else jnp.moveaxis(noise, 1, 0)

    def body(carry, at):
        x, failed_at = carry
        k, c, z = at
        e = denoise(x, jnp.full((B,), k))
        bad = ~jnp.all(jnp.isfinite(e), axis=(1, 2, 3)) & (failed_at < 0)
        predicted = c["to_image"] * x - c["noise_share"] * e
        x = step(x, e, predicted, c, z)
        return (x, jnp.where(bad, k, failed_at)), (x, predicted)

    steps = jnp.arange(len(chain), dtype=jnp.int32)
    none = jnp.full_like(x_T[:, 0, 0, 0], -1, jnp.int32)
    (image, failed_at), (states, predictions) = jax.lax.scan(body, (x_T, none), (steps, coefficients, over_time))
    return Sampled(image, jnp.moveaxis(states, 0, 1), jnp.moveaxis(predictions, 0, 1), failed_at)


def encode(denoise: Denoiser, chain: Chain, images: Float[Array, "B H W C"]) -> Float[Array, "B T H W C"]:
    """Images to latents by the deterministic chain run backwards, T - 1 calls: a first guess of a latent, not its inverse.

    Returns:
      The states at the chain's timesteps, ascending: first the images themselves, taken for the state at the least noisy
      timestep, last the latents.
    """
    a = chain.a[::-1]
    carry = np.sqrt(a[1:] / a[:-1])
    push = np.sqrt(a[1:]) * (np.sqrt(1 / a[1:] - 1) - np.sqrt(1 / a[:-1] - 1))
    cast = lambda c: jnp.asarray(c, images.dtype)  # noqa: E731

    def body(x, at):
        k, c, p = at
        x = c * x + p * denoise(x, jnp.full((x.shape[0],), k))
        return x, x

    steps = jnp.arange(len(chain) - 1, 0, -1, dtype=jnp.int32)
    _, states = jax.lax.scan(body, images, (steps, cast(carry), cast(push)))
    return jnp.concatenate([images[:, None], jnp.moveaxis(states, 0, 1)], axis=1)


def slerp(a: Float[Array, "H W C"], b: Float[Array, "H W C"], weights: Float[Array, " N"]) -> Float[Array, "N H W C"]:
    """Spherical interpolation between two latents."""
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)), -1, 1))
    w = weights[:, None, None, None]
    return (jnp.sin((1 - w) * angle) * a[None] + jnp.sin(w * angle) * b[None]) / jnp.sin(angle)
