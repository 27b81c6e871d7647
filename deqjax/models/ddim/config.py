"""Sizes of the denoising U-Net."""

import dataclasses
from collections.abc import Sequence

GROUPS = 32  # of every group normalisation


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of Ho et al. (2020), as in the DDIM code base.

    Attributes:
      image_size: R, height and width of the images in pixels.
      image_channels: C of the images, and of the predicted noise.
      width: channels at full resolution.
      multipliers: channels of each level, in multiples of `width`; the resolution halves from one level to the next.
      n_blocks: residual blocks of a level on the way down; there is one more on the way up.
      attention: resolutions at which every block is followed by self-attention. The bottleneck always has it.
      dropout: rate inside the residual blocks, in training.
      resample_conv: change resolution by convolutions; otherwise by averages on the way down and repetition on the way up.
      init: "ddpm" (Glorot's, with blocks that begin as the identity) or "torch" (the default of PyTorch's layers).
    """

    image_size: int
    image_channels: int = 3
    width: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    n_blocks: int = 2
    attention: Sequence[int] = (16,)
    dropout: float = 0.0
    resample_conv: bool = True
    init: str = "ddpm"

    def __post_init__(self):
        for name in ("multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in (("image_size", 1), ("image_channels", 1), ("width", 1), ("n_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers={self.multipliers}: must be one or more numbers of 1 or more.")
        if self.width % GROUPS:
            raise ValueError(f"width={self.width}: must be a multiple of {GROUPS}, the groups of every normalisation.")
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size={self.image_size} cannot be halved {halvings} times, as {len(self.multipliers)} levels need: "
                f"choose a multiple of {2**halvings}, or fewer multipliers."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie between 0 and 1.")
        if self.init not in ("ddpm", "torch"):
            raise ValueError(f'init={self.init!r}: must be "ddpm" or "torch".')

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(self.image_size >> level for level in range(len(self.multipliers)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * m for m in self.multipliers)
