"""Deep equilibrium optical flow: encode, solve, decode."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float, Key, Shaped
from deqjax.core.stats import SolverStats
from deqjax.models.flow.attention import Attention
from deqjax.models.flow.cell import Cell, Injection, State
from deqjax.models.flow.config import FlowConfig
from deqjax.models.flow.correlation import correlate
from deqjax.models.flow.encoder import Encoder
from deqjax.models.flow.padding import pad, padding_of, unpad
from deqjax.models.flow.upsampling import SCALE, MaskHead, convex_upsample
from deqjax.nn.config import DEQConfig
from deqjax.nn.deq import DEQ
from deqjax.nn.dropout import VariationalDropout, apply_mask


class Output(NamedTuple):
    """Equilibrium of a batch of pairs."""

    states: tuple[State, ...]  # to be decoded, earliest first
    stats: SolverStats
    spectral_radius: jax.Array | None  # [B], in evaluation with `sradius_mode`


class Estimate(NamedTuple):
    """The flow of a batch of pairs of any size."""

    flow: jax.Array  # [B, H, W, 2], (x, y) in pixels, from the first frame to the second
    z: State  # of the padded frames, to go on from with the next pair of a video
    stats: SolverStats
    spectral_radius: jax.Array | None = None  # [B], with `sradius_mode`


class DEQFlow(nnx.Module):
    """Optical flow as a fixed point of RAFT's update operator (Bai et al. 2022).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from deqjax.models.flow import DEQFlow, FlowConfig
      >>> from deqjax.nn.config import DEQConfig
      >>> model = DEQFlow(FlowConfig(size="tiny"), DEQConfig(f_max_iter=4), nnx.Rngs(0))
      >>> frame = jnp.zeros((1, 30, 45, 3))
      >>> model(frame, frame).flow.shape
      (1, 30, 45, 2)

    Args:
      config: sizes and variant.
      deq: solver, gradient and weight normalisation.
      rngs: the "params" stream draws the initial weights.
    """

    def __init__(self, config: FlowConfig, deq: DEQConfig, rngs: nnx.Rngs):
        C, D, dtype = config.widths.hidden, config.widths.features, config.dtype
        self.config, self.deq = config, DEQ(deq)
        self.fnet = Encoder(D, "instance", rngs, dtype=dtype)
        self.cnet = Encoder(C, "batch", rngs, dtype=dtype)
        self.attention = Attention(C, 1, C, rngs, dtype=dtype) if config.gma else None
        self.cell = Cell(config, deq, rngs)
        self.mask = MaskHead(C, rngs, dtype=dtype)

    def __call__(
        self,
        image1: Shaped[Array, "B H W 3"],
        image2: Shaped[Array, "B H2 W2 3"],
        *,
        start: State | None = None,
        mode: str = "sintel",
        solver_options: Mapping | None = None,
    ) -> Estimate:
        """The flow of frames of any size, in evaluation.

        Args:
          image1, image2: RGB, 0 to 255.
          start: a state to begin with, see `deqjax.models.flow.video`; None is zero.
          mode: where frames are padded, see `padding_of`.
          solver_options: see `DEQ`.

        Raises:
          ValueError: the frames are empty, or differ in size.
        """
        self._check_sizes(image1, image2)
        padding = padding_of(*image1.shape[1:3], mode)
        image1, image2 = (pad(image.astype(jnp.result_type(image, jnp.float32)), padding) for image in (image1, image2))
        out = self.solve(self.encode(image1, image2), start=start, solver_options=solver_options)
        z = out.states[-1]
        return Estimate(unpad(self.decode(z), padding), z, out.stats, out.spectral_radius)

    # Encode ----------------------------------------------------------------------------------------------------------

    def encode(
        self,
        image1: Float[Array, "B H W 3"],
        image2: Float[Array, "B H2 W2 3"],
        *,
        train: bool = False,
        freeze: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> Injection:
        """Frames to the injection: all of f that does not depend on its state.

        Args:
          image1, image2: RGB, 0 to 255; height and width are multiples of 8.
          train: batch normalisation by the batch, whose running statistics move on, and so do power iterations.
          freeze: leave batch normalisation as in evaluation even so.
          key: draws which channels are dropped in training; None drops none.

        Raises:
          ValueError: sizes that differ or do not fit.
        """
        self._check_images(image1, image2)
        B, H, W, _ = image1.shape
        image1, image2 = (2 * (image / 255) - 1 for image in (image1, image2))
        # Pairs stay neighbours, so that a batch that is spread over devices stays where it is.
        both = self.fnet(jnp.stack([image1, image2], axis=1).reshape(2 * B, H, W, 3), train=train)
        context = self.cnet(image1, train=train and not freeze)
        if train and key is not None:
            dropout, keys = VariationalDropout.channels(self.config.dropout, 2), jax.random.split(key)
            both, context = (
                apply_mask(x, dropout.mask(k, x.shape, x.dtype)) for x, k in zip((both, context), keys, strict=True)
            )
        fmap1, fmap2 = jnp.moveaxis(both.reshape(B, 2, *both.shape[1:]), 1, 0)
        return self.inject(fmap1, fmap2, jax.nn.relu(context), train=train)

    def inject(self, fmap1, fmap2, context, *, train: bool = False) -> Injection:
        """The injection from features `[B, h, w, D]` of both frames and context `[B, h, w, C]`."""
        attention = None if self.attention is None else self.attention(context)
        weights, of_context = self.cell.effective(context, train=train)
        return Injection(correlate(fmap1, fmap2, self.config.correlation), of_context, attention, weights)

    def _check_sizes(self, image1, image2):
        if image1.shape != image2.shape:
            sizes = " and ".join(f"{image.shape[1]} x {image.shape[2]}" for image in (image1, image2))
            raise ValueError(f"frames of {sizes}: both must have the same size.")
        if 0 in image1.shape:
            raise ValueError(f"frames of {image1.shape[1]} x {image1.shape[2]}: there are no pixels.")

    def _check_images(self, image1, image2):
        self._check_sizes(image1, image2)
        H, W = image1.shape[1:3]
        if H % SCALE or W % SCALE:
            raise ValueError(
                f"frames of {H} x {W}: height and width must be multiples of {SCALE}; calling the model pads them, or use "
                "deqjax.models.flow.padding."
            )

    # Solve -----------------------------------------------------------------------------------------------------------

    def solve(
        self,
        injection: Injection,
        *,
        start: State | None = None,
        train: bool = False,
        solver_options: Mapping | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Output:
        """Hidden state and flow of encoded frames. Changes nothing in the model.

        Args:
          injection: of the frames.
          start: a state to begin with; None is zero.
          train: supervised states with gradients, or the single result.
          solver_options, key: see `DEQ`.
        """
        z_init = self.initial_state(injection) if start is None else start
        f = lambda z: self.cell(z, injection)  # noqa: E731
        return Output(*self.deq(f, z_init, train=train, solver_options=solver_options, key=key))

    def initial_state(self, injection: Injection) -> State:
        """No flow, and a hidden state of zeros."""
        # Derived from the injection, so that it is sharded like it.
        zeros = jnp.zeros_like(injection.context[0])
        return State(zeros[..., : self.config.widths.hidden], zeros[..., :2])

    def trajectory(
        self, injection: Injection, steps: Sequence[int], start: State | None = None
    ) -> tuple[tuple[State, ...], SolverStats]:
        """The best states after so many evaluations of f, all from one solve, see `DEQ.trajectory`.

        Args:
          injection: of the frames.
          steps: increasing.
          start: a state to begin with; None is zero.
        """
        z_init = self.initial_state(injection) if start is None else start
        return self.deq.trajectory(lambda z: self.cell(z, injection), z_init, steps)

    # Decode ----------------------------------------------------------------------------------------------------------

    def decode(self, z: State) -> Float[Array, "B H W 2"]:
        """The flow of a state at full resolution, (x, y) in pixels."""
        mask = self.mask(z.h)
        return convex_upsample(z.flow, mask.astype(z.flow.dtype))
