"""From the grid of an eighth to full resolution, by learned weights of neighbours."""

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.layers import Conv

SCALE = 8


class MaskHead(nnx.Module):
    """From the hidden state to the weights, as logits: for each pixel, of 9 neighbours for 8 x 8 finer pixels."""

    def __init__(self, C: int, rngs: nnx.Rngs, *, dtype: str | None = None):
        self.conv1, self.conv2 = Conv(C, 256, 3, rngs, dtype=dtype), Conv(256, 9 * SCALE**2, 1, rngs, dtype=dtype)

    def __call__(self, h: Float[Array, "B h w C"]) -> Float[Array, "B h w 576"]:
        # A quarter, to balance gradients (Teed and Deng 2020).
        return 0.25 * self.conv2(jax.nn.relu(self.conv1(h)))


def convex_upsample(flow: Float[Array, "B h w 2"], mask: Float[Array, "B h w 576"]) -> Float[Array, "B H W 2"]:
    """Every fine vector as a convex combination of the nine coarse ones around it, in pixels of the fine grid.

    Neighbours outside the grid count as zero, so vectors at the border shrink a little: so it is in the original.

    Args:
      flow: in pixels of the coarse grid.
      mask: logits; channel 64 k + 8 y + x weighs neighbour k = 3 (dy + 1) + (dx + 1) for the fine pixel (y, x) of the square.
    """
    B, h, w, _ = flow.shape
    weights = jax.nn.softmax(mask.reshape(B, h, w, 9, SCALE, SCALE), axis=3)
    padded = jnp.pad(SCALE * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.stack([padded[:, dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)], axis=3)
    fine = jnp.einsum("Bhwkyx,Bhwkc->Bhywxc", weights, neighbours, precision=jax.lax.Precision.HIGHEST)
    return fine.reshape(B, SCALE * h, SCALE * w, 2)
