"""Newton's method without matrices: the inner linear systems by GMRES."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.hoist import hoist
from deqjax.core.solvers.base import Solver, require, require_count
from deqjax.core.solvers.krylov import GMRES
from deqjax.core.solvers.line_search import step_length


class _State(NamedTuple):
    size: jax.Array  # [B] last residual
    forcing: jax.Array  # [B] last relative tolerance of the inner solve


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonKrylov(Solver):
    """z <- z + dz with (I - J) dz = f(z) - z solved only as well as it pays (Knoll and Keyes 2004).

    The inner tolerance is Eisenstat and Walker's second choice (1996): 0.9 (r / r_previous)^2, at most `forcing`, so that
    early systems are solved loosely and late ones tightly. Steps and budget count evaluations of f; every one comes with
    up to `inner_steps` products with its Jacobian and a few that measure, each about as dear. They are taken in forward
    mode, so a solve inside f needs `Implicit(forward_mode=True)`.

    Attributes:
      inner_steps: budget of Jacobian products per step.
      restart: dimension of GMRES's Krylov space, so many states of memory.
      forcing: largest inner tolerance, and the first.
      line_search: as in `Broyden`.
    """

    inner_steps: int = 20
    restart: int = 20
    forcing: float = 0.5
    line_search: str | None = None

    candidate: ClassVar[str] = "point"

    def __post_init__(self):
        super().__post_init__()
        require_count("inner_steps", self.inner_steps, 1)
        require_count("restart", self.restart, 1)
        require(0 < self.forcing < 1, "forcing", self.forcing, "between 0 and 1")
        require(self.line_search in (None, "sample", "batch"), "line_search", self.line_search, 'None, "sample" or "batch"')

    def init(self, z):
        zeros = jnp.zeros_like(batched.norm(z))
        return _State(zeros, zeros + self.forcing)

    def step(self, f, z, f_z, state):
        residual = batched.subtract(f_z, z)
        size = batched.norm(residual)
        ratio = jnp.where(state.size > 0, size / jnp.where(state.size > 0, state.size, 1), 1)
        forcing = 0.9 * jnp.square(ratio)
        # Not to tighten on the strength of one lucky step.
        previous = 0.9 * jnp.square(state.forcing)
        forcing = jnp.clip(jnp.where(previous > 0.1, jnp.maximum(forcing, previous), forcing), 1e-4, self.forcing)

        jacobian = hoist(jax.linearize(f, z)[1], z)
        inner = GMRES(max_steps=self.inner_steps, restart=self.restart)
        direction, _ = inner.solve(jacobian, residual, tol=forcing)
        if self.line_search is None:
            return jax.tree.map(jnp.add, z, direction), _State(size, forcing)
        length = step_length(f, z, residual, direction, self.line_search)
        return batched.add_scaled(z, length, direction), _State(size, forcing)
