"""Segment memory: the states and injections of earlier segments, attended to but not solved for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Bool, Float


class Memory(NamedTuple):
    """The last M positions of every stream. The newest `length` rows, at the end, are valid.

    A fixed capacity with a valid length keeps shapes static while the memory fills up.
    """

    z: jax.Array  # [B, M, D]
    u: jax.Array  # [B, M, 3*H*dh]
    length: jax.Array  # scalar int32

    @classmethod
    def empty(cls, batch: int, capacity: int, d_model: int, dtype=jnp.float32) -> "Memory":
        return cls(
            jnp.zeros((batch, capacity, d_model), dtype),
            jnp.zeros((batch, capacity, 3 * d_model), dtype),
            jnp.zeros((), jnp.int32),
        )

    def append(self, z: Float[Array, "B L D"], u: Float[Array, "B L U"], capacity: int) -> "Memory":
        """The memory after a segment with states z `[B, L, D]` and injections u, detached, cut to `capacity` rows."""

        def last_rows(old, new):
            rows = jnp.concatenate([old, jax.lax.stop_gradient(new).astype(old.dtype)], axis=1)
            missing = max(capacity - rows.shape[1], 0)
            rows = jnp.pad(rows, ((0, 0), (missing, 0), (0, 0)))
            return rows[:, rows.shape[1] - capacity :]

        length = jnp.minimum(self.length + z.shape[1], capacity).astype(jnp.int32)
        return Memory(last_rows(self.z, z), last_rows(self.u, u), length)

    def reset_where(self, reset: Bool[Array, ""] | bool) -> "Memory":
        """Forgets everything where the scalar `reset` is true."""
        return self._replace(length=jnp.where(reset, 0, self.length).astype(jnp.int32))
