"""Variational dropout: one mask per solve, the same at every step, in the phantom steps and in the backward solve.

Masks are drawn before the solve and belong to the injection, so that f stays a function of the state alone.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class VariationalDropout:
    """Inverted dropout with an explicit mask.

    Attributes:
      rate: probability that an entry is dropped, 0 to 1.
      shared: axes along which all entries share their fate; `()` drops single entries. `channels` and `tokens` name the
        usual ones.
    """

    rate: float
    shared: tuple[int, ...] = ()

    def __post_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"dropout rate {self.rate}: must lie between 0 and 1.")

    @classmethod
    def channels(cls, rate: float, n_axes: int) -> "VariationalDropout":
        """Drops whole channels of `[B, *axes, C]`, with n_axes of tokens, pixels or voxels in between."""
        return cls(rate, tuple(range(1, 1 + n_axes)))

    @classmethod
    def tokens(cls, rate: float, n_axes: int) -> "VariationalDropout":
        """Drops whole tokens, pixels or voxels of `[B, *axes, C]`."""
        return cls(rate, (1 + n_axes,))

    def mask(self, key: Key[Array, ""] | None, shape: Sequence[int], dtype=jnp.float32) -> Float[Array, "..."] | None:
        """A mask that broadcasts against `shape`, with entries 0 or 1 / (1 - rate); None when nothing is dropped.

        Args:
          key: random key; None means evaluation.
        """
        if key is None or self.rate == 0:
            return None
        if not all(-len(shape) <= axis < len(shape) for axis in self.shared):
            raise ValueError(f"shared={self.shared}: not all of these are axes of {tuple(shape)}.")
        shared = {axis % len(shape) for axis in self.shared}
        shape = tuple(1 if axis in shared else n for axis, n in enumerate(shape))
        if self.rate == 1:
            return jnp.zeros(shape, dtype)
        keep = 1 - self.rate
        return jax.random.bernoulli(key, keep, shape).astype(dtype) / jnp.asarray(keep, dtype)


def apply_mask(x: Float[Array, "..."], mask: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """x times its mask; x itself without one."""
    return x if mask is None else x * mask.astype(x.dtype)
