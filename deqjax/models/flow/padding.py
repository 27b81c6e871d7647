"""Pictures of any size for a network that needs multiples of eight."""

import jax.numpy as jnp

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.upsampling import SCALE

Padding = tuple[int, int, int, int]  # left, right, top, bottom


def padding_of(H: int, W: int, mode: str = "sintel") -> Padding:
    """How much to add on every side.

    Args:
      H, W: size of the pictures.
      mode: "sintel" splits what is added between top and bottom; "kitti", whose upper part is sky, adds it below.

    Raises:
      ValueError: no such mode.
    """
    if mode not in ("sintel", "kitti"):
        raise ValueError(f'mode={mode!r}: must be "sintel" or "kitti".')
    down, right = -H % SCALE, -W % SCALE
    top = down // 2 if mode == "sintel" else 0
    return right // 2, right - right // 2, top, down - top


def pad(images: Float[Array, "B H W C"], padding: Padding) -> Float[Array, "B h w C"]:
    """Repeats the pixels at the border."""
    left, right, top, bottom = padding
    return jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)), mode="edge")


def unpad(x: Float[Array, "B h w C"], padding: Padding) -> Float[Array, "B H W C"]:
    """Cuts off what was added."""
    left, right, top, bottom = padding
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
