"""What a solve reports: residuals, steps and, per sample, how it ended."""

import dataclasses
import enum

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Bool, PyTree


class Status(enum.IntEnum):
    """How one sample's solve ended. `explanation` says what to do about it."""

    CONVERGED = 0
    STEP_LIMIT = 1
    DIVERGED = 2
    NON_FINITE = 3

    @property
    def explanation(self) -> str:
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.CONVERGED: "the residual fell below `tol`.",
    Status.STEP_LIMIT: "`max_steps` evaluations did not reach `tol`; raise `max_steps`, loosen `tol`, or use Anderson "
    "or Broyden if this was Picard. By default the best iterate is returned.",
    Status.DIVERGED: "the residual grew away from its start: f does not contract here. Damp the solver (`damping`), use "
    "Broyden, or make f better behaved (weight normalisation, Jacobian regularisation). By default the best iterate is "
    "returned.",
    Status.NON_FINITE: "f returned NaN or infinity, or a state whose square overflows; by default the best finite iterate is "
    "returned. Look for overflow in f, lower the learning rate, or damp the solver.",
}

# What samples have done, in a sentence.
_ENDS = {
    Status.CONVERGED: "converged",
    Status.STEP_LIMIT: "reached the step limit",
    Status.DIVERGED: "diverged",
    Status.NON_FINITE: "became non-finite",
}

# A sample that has not converged and ends this many times above its first absolute residual counts as diverged, unless its
# relative residual is small.
DIVERGENCE_FACTOR = 10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverStats:
    """Statistics of a solve over B samples with a budget of N evaluations of f.

    Attributes:
      abs_lowest, rel_lowest: `[B]` smallest residuals `|f(z) - z|` and `|f(z) - z| / (|f(z)| + 1e-9)`; of a solve that returns
        its last state (`return_final`, `monitor=False`, `Unrolled`, `Reversible`) the last ones.
      best_step: `[B]` evaluation that gave the returned state, counted from 1 (0: none was accepted).
      steps: `[B]` evaluations of f until the sample was finished.
      abs_trace, rel_trace: `[B, N]` residual at each evaluation, padded with the lowest once the sample is finished.
      status: `[B]` integers, see `Status`.
    """

    abs_lowest: PyTree
    rel_lowest: PyTree
    best_step: PyTree
    steps: PyTree
    abs_trace: PyTree
    rel_trace: PyTree
    status: PyTree

    @property
    def converged(self) -> jax.Array:
        """`[B]` booleans."""
        return self.status == Status.CONVERGED

    def sums(self, counted: Bool[Array, " B"] | None = None) -> dict[str, jax.Array]:
        """The vitals as sums over the batch, with the number of samples under `samples`; divide to get means.

        Args:
          counted: the samples to count, where others only fill a batch up; all by default.
        """
        columns = {
            "abs": self.abs_lowest,
            "rel": self.rel_lowest,
            "steps": self.steps,
            "converged": self.converged,
            "non_finite": self.status == Status.NON_FINITE,
        }
        dtype = self.abs_lowest.dtype
        if counted is None:
            samples = jnp.asarray(self.status.size, dtype)
        else:
            samples = jnp.sum(counted.astype(dtype))
            columns = {name: jnp.where(counted, x, 0) for name, x in columns.items()}
        return {name: jnp.sum(x.astype(dtype)) for name, x in columns.items()} | {"samples": samples}

    def explain(self) -> str:
        """One line per status that occurred, with its count and advice.

        Raises:
          TypeError: the values are traced.
        """
        if isinstance(self.status, jax.core.Tracer):
            raise TypeError("explain() needs numbers, and under jit or vmap there are none yet: call it on what they return.")
        lines = []
        for status in Status:
            count = int((self.status == status).sum())
            if count:
                lines.append(f"{count} of {self.status.size} samples {_ENDS[status]}: {status.explanation}")
        return "\n".join(lines)
