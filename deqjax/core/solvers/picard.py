"""Picard (fixed-point) iteration, optionally damped."""

import dataclasses

from deqjax.core import batched
from deqjax.core.annotations import Array
from deqjax.core.solvers.base import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """z <- (1 - damping) z + damping f(z).

    Attributes:
      damping: weight of f(z), TorchDEQ's tau; 1 is the plain iteration.
    """

    damping: float | Array = 1.0

    def init(self, z):
        return ()

    def step(self, f, z, f_z, state):
        return batched.mix(z, f_z, self.damping), state
