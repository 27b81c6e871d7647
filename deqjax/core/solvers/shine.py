"""SHINE: the adjoint system by the inverse that the forward solve has already estimated."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deqjax.core import batched
from deqjax.core.annotations import State
from deqjax.core.hoist import Hoisted
from deqjax.core.solve import solve
from deqjax.core.solvers.base import Solver, require_count
from deqjax.core.solvers.broyden import Broyden, BroydenState, inverse_transposed
from deqjax.core.stats import SolverStats


class _Transposed(NamedTuple):
    """The state of a Broyden solve, for systems with the Jacobian rather than its transpose."""

    state: BroydenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHINE:
    """Shares the inverse estimate of the forward Broyden solve with the backward pass (Ramzi et al. 2022, arXiv 2106.00553).

    Serves as `Implicit(solver=SHINE())` when the forward solver is `Broyden`, best with `memory=None`, so that nothing is
    forgotten. Costs no product with the Jacobian, and is no exact gradient: on maps without structure the estimate is
    hardly better than the Jacobian-free gradient. `refine` improves on it.

    Attributes:
      refine: products with the Jacobian that `solver` may take from the estimate on; Broyden's first one only measures it.
      solver: for the refinement.
      fallback: a sample whose estimate is longer than so many times its right-hand side starts from that instead.
    """

    refine: int = 0
    solver: Solver = Broyden(tol=1e-6)
    fallback: float = 1.3

    def __post_init__(self):
        require_count("refine", self.refine, 0)

    def solve(self, linear: Hoisted, c: State, method=None) -> tuple[State, SolverStats]:
        """Solves u = A u + c, given the state of the forward solve.

        Raises:
          TypeError: the forward solver was not Broyden's.
        """
        if not isinstance(method, BroydenState | _Transposed):
            raise TypeError(
                "SHINE reuses what the forward Broyden solve learnt, but the forward solver is another: use "
                "solver=Broyden(memory=None), or another adjoint solver in Implicit."
            )
        # With g = f - z the adjoint solution is -(dg/dz)^-T c.
        u = jax.tree.map(jnp.negative, _apply_inverse(method, c))
        size = batched.norm(u)
        sound = jnp.isfinite(size) & (size <= self.fallback * batched.norm(c))
        u = batched.select(sound, u, c)
        solver = dataclasses.replace(self.solver, max_steps=max(self.refine, 1))
        solved = solve(linear.plus(c), u, solver)
        # Without refinement the one evaluation only measures the residual.
        return (solved.value if self.refine else u), solved.stats

    def transposed(self, method):
        """What `solve` needs for the transposed system, as it arises from differentiating again."""
        return method.state if isinstance(method, _Transposed) else _Transposed(method)


def _apply_inverse(method, c: State) -> State:
    if isinstance(method, BroydenState):
        return inverse_transposed(method, c)
    return jax.linear_transpose(lambda u: inverse_transposed(method.state, u), c)(c)[0]
