"""Where to begin with the next pair of a video: at what is known from the last one."""

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Float
from deqjax.models.flow.cell import State


def forward_interpolate(flow: Float[Array, "B h w 2"]) -> Float[Array, "B h w 2"]:
    """The flow carried along by itself: each pixel takes the vector whose target is nearest to it.

    Targets that do not lie strictly within the frame are left out; if none does, the result is zero. Among equally near
    ones the first counts. Memory is linear in the number of pixels times the width.
    """

    def of_sample(flow_hw2):
        h, w, _ = flow_hw2.shape
        columns, rows = jnp.arange(w, dtype=flow.dtype), jnp.arange(h, dtype=flow.dtype)
        x = (columns[None, :] + flow_hw2[..., 0]).reshape(-1)
        y = (rows[:, None] + flow_hw2[..., 1]).reshape(-1)
        kept = (x > 0) & (x < w) & (y > 0) & (y < h)

        def nearest(row):
            distance = jnp.square(columns[:, None] - x) + jnp.square(row - y)
            return jnp.argmin(jnp.where(kept, distance, jnp.inf), axis=1)

        vectors = flow_hw2.reshape(-1, 2)[jax.lax.map(nearest, rows)]
        return jnp.where(jnp.any(kept), vectors, 0)

    return jax.vmap(of_sample)(flow)


def next_start(z: State, *, warm_start: bool = False, fixed_point_reuse: bool = False) -> State | None:
    """The state to begin with, given the solution of the pair before; None for zeros.

    Args:
      z: that solution.
      warm_start: take its flow, carried along by itself.
      fixed_point_reuse: take its hidden state as well. With both, the flow counts twice, as in the original.
    """
    if not (warm_start or fixed_point_reuse):
        return None
    flow = forward_interpolate(z.flow) * (warm_start + fixed_point_reuse)
    return State(z.h if fixed_point_reuse else jnp.zeros_like(z.h), flow)
