"""The multiscale equilibrium model: encode, solve, decode."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float, Key, PyTree
from deqjax.core.solve import residuals
from deqjax.core.stability import jacobian_loss
from deqjax.core.stats import SolverStats, Status
from deqjax.models.mdeq.cell import Cell, Injection, State
from deqjax.models.mdeq.config import MDEQConfig
from deqjax.models.mdeq.heads import ClassificationHead, SegmentationHead
from deqjax.models.mdeq.stem import Stem
from deqjax.nn.config import DEQConfig
from deqjax.nn.deq import DEQ


class Output(NamedTuple):
    """Equilibrium of a batch of images."""

    states: tuple[State, ...]  # to be decoded, earliest first
    stats: SolverStats
    spectral_radius: jax.Array | None  # [B], in evaluation with `sradius_mode`


class MDEQ(nnx.Module):
    """An image model whose feature maps, at several resolutions, are one joint fixed point (Bai et al. 2020).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from deqjax.models.mdeq import MDEQ, MDEQConfig
      >>> from deqjax.nn.config import DEQConfig
      >>> model = MDEQ(MDEQConfig.published("cifar10_small"), DEQConfig(f_solver="anderson"), nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)

    Args:
      config: sizes and variant.
      deq: solver, gradient and weight normalisation.
      rngs: the "params" stream draws the initial weights.
    """

    def __init__(self, config: MDEQConfig, deq: DEQConfig, rngs: nnx.Rngs):
        self.config, self.deq = config, DEQ(deq)
        self.stem, self.cell = Stem(config, rngs), Cell(config, deq, rngs)
        self.head = {"classification": ClassificationHead, "segmentation": SegmentationHead}[config.head](config, rngs)

    def __call__(self, images: Float[Array, "B H0 W0 c"]) -> Float[Array, "B *space classes"]:
        """Logits in evaluation: of every image, or of every pixel of the finest map `[B, H, W, classes]`."""
        return self.decode(self.solve(self.encode(images)).states[-1])

    # Encode ----------------------------------------------------------------------------------------------------------

    def encode(self, images: Float[Array, "B H0 W0 c"], *, train: bool = False, key: Key[Array, ""] | None = None) -> Injection:
        """Images to the injection: all of f that does not depend on z.

        Args:
          images: channels last, normalised.
          train: batch normalisation by the batch, whose running statistics move on, and so do power iterations.
          key: draws the dropout masks; None drops nothing.

        Raises:
          ValueError: the number of channels or the size does not fit.
        """
        self._check_images(images)
        u = self.stem(images, train=train)
        masks = self.cell.sample_masks(key if train else None, images.shape[0])
        # The state and all sums are in the images' precision; only convolutions may be coarser.
        return Injection(u.astype(images.dtype), self.cell.effective(train=train), masks)

    def _check_images(self, images):
        config, (_, H, W, channels) = self.config, images.shape
        if channels != config.in_channels:
            raise ValueError(f"images of {channels} channels for a model of in_channels={config.in_channels}.")
        multiple = config.image_multiple
        if H % multiple or W % multiple or 0 in (H, W):
            raise ValueError(
                f"images of {H} x {W}: height and width must be multiples of {multiple}, so that {len(config.channels)} "
                f"feature maps after {config.downsample} halvings fit each other exactly. Crop, pad or resize them."
            )

    # Solve -----------------------------------------------------------------------------------------------------------

    def solve(
        self,
        injection: Injection,
        *,
        train: bool = False,
        unroll: int | None = None,
        solver_options: Mapping | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Output:
        """The feature maps of encoded images. Changes nothing in the model.

        Args:
          injection: of the images.
          train: supervised states with gradients, or the single result.
          unroll: apply f so many times instead of solving (the pre-training phase).
          solver_options, key: see `DEQ`.
        """
        f = lambda z: self.cell(z, injection)  # noqa: E731
        z_init = self.initial_state(injection)
        if unroll is None:
            return Output(*self.deq(f, z_init, train=train, solver_options=solver_options, key=key))
        z, _ = jax.lax.scan(lambda z, _: (f(z), None), z_init, length=unroll)
        return Output((z,), _measured(f, z, unroll), None)

    def initial_state(self, injection: Injection) -> State:
        """Zeros, where every solve of the originals starts."""
        B, H, W, _ = injection.u.shape
        shapes = [(B, H >> i, W >> i, C) for i, C in enumerate(self.config.channels)]
        # Derived from the injection, so that it is sharded like it.
        start = jnp.zeros_like(injection.u)[:, :1, :1, :1]
        return tuple(jnp.broadcast_to(start, shape) for shape in shapes)

    def trajectory(self, injection: Injection, steps: Sequence[int]) -> tuple[tuple[State, ...], SolverStats]:
        """The best states after so many evaluations of f, all from one solve, see `DEQ.trajectory`."""
        return self.deq.trajectory(lambda z: self.cell(z, injection), self.initial_state(injection), steps)

    # Decode ----------------------------------------------------------------------------------------------------------

    def decode(self, z: State, *, train: bool = False) -> Float[Array, "B *space classes"]:
        """Logits of a state; in training the head's batch normalisation goes by the batch and remembers it."""
        return self.head(z, train=train)

    def jacobian_loss(
        self,
        z: State,
        injection: Injection,
        key: Key[Array, ""] | None = None,
        *,
        n_probes: int = 2,
        probes: PyTree | None = None,
    ) -> Float[Array, ""]:
        """Jacobian regularisation (Bai et al. 2021) of f at a state taken as a constant, as in the released code."""
        f = lambda z: self.cell(z, injection)  # noqa: E731
        return jacobian_loss(f, jax.lax.stop_gradient(z), key, n_probes=n_probes, probes=probes)


def _measured(f, z, steps: int) -> SolverStats:
    """The residual of a state that no solver vouches for, from one application without gradients."""
    z = jax.lax.stop_gradient(z)
    absolute, relative = residuals(z, jax.lax.stop_gradient(f(z)))
    taken = jnp.full_like(absolute, steps, jnp.int32)
    status = jnp.where(jnp.isfinite(absolute), Status.STEP_LIMIT, Status.NON_FINITE).astype(jnp.int32)
    return SolverStats(absolute, relative, taken, taken, absolute[:, None], relative[:, None], status)
