"""Sizes and variants of the flow networks, the published ones by name."""

import dataclasses
from typing import NamedTuple

from deqjax.core.naming import did_you_mean


class Widths(NamedTuple):
    """Channels of a network."""

    hidden: int  # C, of the hidden state and of the context
    features: int  # D, of the maps that are correlated
    correlation: tuple[int, int]  # of the motion encoder's two convolutions of the correlations
    flow: tuple[int, int]  # ... and of the flow
    motion: int  # of its output


SIZES = {
    "tiny": Widths(32, 64, (64, 48), (32, 16), 32),
    "base": Widths(128, 256, (256, 192), (128, 64), 128),
    "large": Widths(192, 256, (384, 288), (192, 96), 192),
    "huge": Widths(256, 256, (512, 384), (256, 128), 256),
    "gigantic": Widths(384, 256, (640, 480), (320, 160), 320),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """A flow network.

    Attributes:
      size: a name in `SIZES`; "base" and "huge" are the paper's B and H.
      gma: global motion aggregation: the motion features of similar pixels join those of each.
      all_grad: let gradients through the flow that f is given. Without, f takes it as a constant, and so does the sum of
        flow and update.
      old_version: the flow head of the first release, never wider than 256.
      correlation: "volume" keeps the correlations of all pairs of pixels, N^2 numbers; "on_demand" computes at every step
        those that it looks up, in memory linear in N. The results are equal.
      dropout: rate at which whole channels of the encoders' outputs are dropped in training.
      dtype: "bfloat16" for convolutions and attention; correlation, sums and the state stay in float32.
    """

    size: str = "base"
    gma: bool = False
    all_grad: bool = False
    old_version: bool = False
    correlation: str = "volume"
    dropout: float = 0.0
    dtype: str | None = None

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}{did_you_mean(self.size, SIZES)} Sizes: {', '.join(SIZES)}.")
        for name, allowed in (
            ("correlation", ("volume", "on_demand")),
            ("dtype", (None, "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie between 0 and 1.")

    @property
    def widths(self) -> Widths:
        return SIZES[self.size]

    @property
    def head_width(self) -> int:
        """Channels inside the flow head."""
        wide = 2 * self.widths.motion
        return min(256, wide) if self.old_version else wide
