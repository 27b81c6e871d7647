"""A whole sampling chain as one fixed-point system: all its states at once (Pokle et al. 2022, arXiv 2210.12867).

The unknown is z `[B, T, H, W, C]`, where slot k holds the state after step k, so that the last slot is the image. Every step
x_{k+1} = carry_k x_k + push_k e(x_k) + sigma_k noise_k is linear but for the network e. Summed up from a state x that is known,
before step s, the chain reads

    F(z)_k = G_k (x / G_{s-1} + sum over s <= j <= k of (push_j (e(u_j) - l_j u_j) + sigma_j noise_j) / G_j),

u_s = x, u_j = z_{j-1}, where l_j u is a linear guess of the network, whose part is moved into the gains:
G_k = prod over j <= k of (carry_j + push_j l_j). Without a guess (l = 0) this is the system of the paper, equation 9; with that
of Gaussian data it converges faster, and its sums are of numbers of order one. The fixed point is the same: the trajectory of
the sequential sampler, because slot k depends on earlier slots alone. For that reason also, k evaluations make k slots exact.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deqjax.core.annotations import Array, Bool, Float, Int
from deqjax.core.gradients import Gradient
from deqjax.core.hoist import hoist
from deqjax.models.ddim.samplers import Denoiser
from deqjax.models.ddim.schedule import Chain


@dataclasses.dataclass(frozen=True, eq=False)
class JointSystem:
    """A sampling chain as a system for its whole trajectory.

    Attributes:
      denoise: the network on the chain's steps.
      chain: the steps; coefficients are computed from it in float64 and rounded once.
      data_variance: variance of the data for the linear guess (images in [-1, 1] have 0.1 to 1); None: no guess.
      chunk: images per device that the network sees at a time, one chunk after the other; 0: all at once.
      remat: recompute the network's activations in the backward pass.
      spread: splits the time axis over devices, `NamedSharding(mesh, PartitionSpec(axis))`; None leaves it whole.
    """

    denoise: Denoiser
    chain: Chain
    data_variance: float | None = None
    chunk: int = 0
    remat: bool = False
    spread: NamedSharding | None = None

    def __post_init__(self):
        if self.data_variance is not None and not self.data_variance > 0:
            raise ValueError(f"data_variance={self.data_variance}: must be positive, or None for no linear guess.")
        if self.chunk < 0:
            raise ValueError(f"chunk={self.chunk}: must be 0 (all at once) or more.")

    @functools.cached_property
    def guess(self) -> np.ndarray:
        """`[T]` l_k: of all linear functions of the state, the best predictor of the noise in Gaussian data."""
        a = self.chain.a
        if self.data_variance is None:
            return np.zeros_like(a)
        return np.sqrt(1 - a) / (a * self.data_variance + 1 - a)

    @functools.cached_property
    def gains(self) -> np.ndarray:
        """`[T + 1]` G, with G_{-1} = 1 in front."""
        return np.cumprod(np.append(1.0, self.chain.carry + self.chain.push * self.guess))

    @property
    def n_parts(self) -> int:
        """Among how many devices the time axis is split."""
        if self.spread is None:
            return 1
        axes = self.spread.spec[0]
        return int(np.prod([self.spread.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes)]))

    # The map ---------------------------------------------------------------------------------------------------------

    def map(self, x_T: Float[Array, "B H W C"], noise: Float[Array, "B T H W C"] | None = None):
        """F as a function of the state `[B, T, H, W, C]` alone."""
        start = jnp.zeros_like(x_T[:, 0, 0, 0], jnp.int32)

        def f(z):
            return self.window(jnp.concatenate([x_T[:, None], z[:, :-1]], axis=1), x_T, start, noise)[0]

        return f

    def map_with_latent(self, x_T: Float[Array, "B H W C"], noise: Float[Array, "B T H W C"] | None = None):
        """The same on states `[B, T + 1, H, W, C]` of which slot 0 is the latent itself, as the original inverts it.

        A damped step then damps the latent that the network sees as well.
        """
        start = jnp.zeros_like(x_T[:, 0, 0, 0], jnp.int32)

        def f(z):
            return jnp.concatenate([x_T[:, None], self.window(z[:, :-1], x_T, start, noise)[0]], axis=1)

        return f

    def window(
        self,
        inputs: Float[Array, "B W H W_ C"],
        base: Float[Array, "B H W_ C"],
        start: Int[Array, " B"],
        noise: Float[Array, "B T H W_ C"] | None,
    ) -> tuple[Float[Array, "B W H W_ C"], Bool[Array, "B W"]]:
        """F on slots start, start + 1, ... of every sample, and in which of them the network's output is finite.

        Args:
          inputs: what the network sees at those steps.
          base: the state before the first of them.
          start: the first slot of each sample. Slots past the last come out as zeros plus the last state.
          noise: of the whole chain.
        """
        W, T, dtype = inputs.shape[1], len(self.chain), inputs.dtype
        slots = start[:, None] + jnp.arange(W, dtype=jnp.int32)[None]
        within, k = slots < T, jnp.minimum(slots, T - 1)
        coefficient = lambda c, k: over_images(jnp.asarray(c, dtype)[k])  # noqa: E731

        e = self._evaluate(inputs, k)
        finite = jnp.all(jnp.isfinite(e), axis=(2, 3, 4))
        gain = coefficient(self.gains[1:], k)
        term = coefficient(self.chain.push, k) * e
        if self.data_variance is not None:
            term = term - coefficient(self.chain.push * self.guess, k) * inputs
        if noise is not None:
            drawn = jnp.take_along_axis(noise, over_images(k), axis=1)
            term = term + coefficient(self.chain.sigma, k) * drawn
        term = jnp.where(over_images(within), term / gain, 0)
        known = base / coefficient(self.gains, start)
        return gain * (known[:, None] + _prefix_sum(term, self.n_parts)), finite

    def _evaluate(self, inputs_BW, k_BW):
        """The network on all of them. Time comes first in its batch, so that a device has consecutive timesteps."""
        B, W = k_BW.shape
        x = jnp.swapaxes(inputs_BW, 0, 1).reshape(W * B, *inputs_BW.shape[2:])
        k = k_BW.T.reshape(-1)
        if self.spread is not None:
            fill = -len(k) % self.n_parts
            x, k = (jnp.pad(v, ((0, fill),) + ((0, 0),) * (v.ndim - 1)) for v in (x, k))
            x, k = (jax.lax.with_sharding_constraint(v, self.spread) for v in (x, k))
        denoise = jax.checkpoint(self.denoise) if self.remat else self.denoise
        e = _in_chunks(denoise, x, k, self.chunk, self.n_parts)
        if self.spread is not None:
            e = jax.lax.with_sharding_constraint(e, self.spread)
        return jnp.swapaxes(e[: W * B].reshape(W, B, *e.shape[1:]), 0, 1)


def attach(
    system: JointSystem,
    x_T: Float[Array, "B H W C"],
    noise: Float[Array, "B T H W C"] | None,
    trajectory: Float[Array, "B T H W C"],
    gradient: Gradient,
) -> Float[Array, "B T H W C"]:
    """The trajectory that a solve has found, with the gradient of a rule, to latents, noise and the network's weights.

    The latent counts as a state of the trajectory, as in the original: a rule that takes the states for constants takes the
    latent that the network sees for one, too.
    """
    states = jax.lax.stop_gradient(jnp.concatenate([x_T[:, None], trajectory], axis=1))
    return gradient.attach(hoist(system.map_with_latent(x_T, noise), states), states)[-1][:, 1:]


def over_images(per_slot):
    """Makes numbers per sample, or per sample and slot, broadcast against images."""
    return per_slot[..., None, None, None]


def _prefix_sum(x, n_parts: int):
    """Sums up to every slot. In parts: those of a device stay there, and the devices exchange but one total each."""
    B, W = x.shape[:2]
    if W % n_parts or n_parts == 1:
        return jnp.cumsum(x, axis=1)
    inside = jnp.cumsum(x.reshape(B, n_parts, W // n_parts, *x.shape[2:]), axis=2)
    totals = inside[:, :, -1]
    before = jnp.cumsum(totals, axis=1) - totals
    return (inside + before[:, :, None]).reshape(x.shape)


def _in_chunks(denoise, x, k, chunk: int, n_parts: int):
    """The network on x, so many images per device at a time."""
    per_device = x.shape[0] // n_parts
    if not chunk or chunk >= per_device:
        return denoise(x, k)
    padding = -per_device % chunk

    def split(v):
        v = v.reshape(n_parts, per_device, *v.shape[1:])
        v = jnp.pad(v, ((0, 0), (0, padding)) + ((0, 0),) * (v.ndim - 2))
        v = jnp.swapaxes(v.reshape(n_parts, -1, chunk, *v.shape[2:]), 0, 1)
        return v.reshape(v.shape[0], n_parts * chunk, *v.shape[3:])

    e = jax.lax.map(lambda at: denoise(*at), (split(x), split(k)))
    e = jnp.swapaxes(e.reshape(e.shape[0], n_parts, chunk, *e.shape[2:]), 0, 1)
    return e.reshape(n_parts, -1, *e.shape[3:])[:, :per_device].reshape(x.shape)
