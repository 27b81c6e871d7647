"""The settings of an equilibrium layer, in the vocabulary that TorchDEQ users know."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax.core import FrozenDict

from deqjax.core.annotations import Array, ArrayLike
from deqjax.core.gradients import Gradient, Phantom
from deqjax.core.implicit import Implicit
from deqjax.core.naming import did_you_mean
from deqjax.core.solvers import Broyden, Solver, get_solver, solver_names, with_options
from deqjax.core.solvers.base import require, require_count
from deqjax.core.solvers.krylov import LINEAR_SOLVERS, LinearSolver
from deqjax.core.solvers.shine import SHINE
from deqjax.core.solvers.torchdeq import torchdeq_solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEQConfig:
    """Every setting of `DEQ` and of the weight normalisation inside its cell.

    Attributes:
      preset: None for this library's solver defaults, "torchdeq" for the original's, evaluation by evaluation.
      core: "sliced" runs a fresh solve per supervised state; "indexing" samples them from one solve.
      f_solver, f_max_iter, f_tol, f_stop_mode: the forward solve.
      f_tol_start, f_tol_anneal_steps: tolerance at the first training step, and the number of steps over which it falls
        geometrically to f_tol.
      no_stat: True takes plain steps without residuals or stopping (Picard only), as "simple_fixed_point_iter" always does.
      f_options, b_options: further options of the solvers, e.g. `{"memory": 5}`.
      b_solver, b_max_iter, b_tol, b_stop_mode: the adjoint solve; besides the forward solvers there are "gmres",
        "bicgstab", "normal_cg" and, if the forward solver is Broyden's, "shine". b_stop_mode is "rel" if not given: an
        absolute tolerance makes gradients depend on the scale of the loss; with the preset "torchdeq" it is "abs".
      eval_factor, eval_f_max_iter: budget of evaluation, as a multiple of f_max_iter or, if positive, outright.
      eval_f_tol: tolerance of evaluation; None takes f_tol.
      ift, hook_ift: implicit gradient for the last state, its Jacobian at f(z*) or at z*.
      grad, tau: steps and damping of the phantom gradient; `grad` may list one number per state.
      sup_gap, sup_loc: phantom states to supervise: every so many, or these and the last.
      n_states, indexing: how many states to supervise along the solve, evenly, or at which steps.
      gamma: decay of the correction's weights.
      remat: recompute the activations of phantom steps in the backward pass.
      norm_*, sn_n_power_iters: weight normalisation, see `deqjax.nn.normalization`.
      jac_loss_weight, jac_loss_freq, jac_incremental: Jacobian regularisation: weight, probability per training step,
        and number of steps after which the weight grows by 0.1 (0: never).
      sradius_mode: estimate the spectral radius in evaluation.
    """

    preset: str | None = None
    core: str = "sliced"
    f_solver: str = "fixed_point_iter"
    f_max_iter: int = 40
    f_tol: float = 1e-3
    f_stop_mode: str = "abs"
    f_tol_start: float | None = None
    f_tol_anneal_steps: int = 0
    no_stat: bool | None = None
    f_options: Mapping = dataclasses.field(default_factory=dict)
    b_solver: str = "fixed_point_iter"
    b_max_iter: int = 40
    b_tol: float = 1e-6
    b_stop_mode: str | None = None
    b_options: Mapping = dataclasses.field(default_factory=dict)
    eval_factor: float = 1.0
    eval_f_max_iter: int = 0
    eval_f_tol: float | None = None
    ift: bool = False
    hook_ift: bool = False
    grad: int | Sequence[int] = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: Sequence[int] = ()
    n_states: int = 1
    indexing: Sequence[int] = ()
    gamma: float = 0.8
    remat: bool = False
    norm_type: str = "weight_norm"
    norm_no_scale: bool = False
    norm_clip: bool = False
    norm_clip_value: float = 1.0
    norm_target_norm: float = 1.0
    sn_n_power_iters: int = 1
    jac_loss_weight: float = 0.0
    jac_loss_freq: float = 0.0
    jac_incremental: int = 0
    sradius_mode: bool = False

    @classmethod
    def from_config(cls, config: Mapping) -> "DEQConfig":
        """From a mapping (a dict or an `ml_collections.ConfigDict`).

        Raises:
          ValueError: a key is unknown; the nearest known one is named.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in config:
            if key not in known:
                raise ValueError(f"unknown DEQ setting {key!r}{did_you_mean(key, known)} Known: {', '.join(known)}.")
        return cls(**{key: config[key] for key in config})

    def __post_init__(self):
        # Hashable, so that a module that holds a config can be a static argument of `jit`.
        if self.b_stop_mode is None:
            object.__setattr__(self, "b_stop_mode", "abs" if self.preset == "torchdeq" else "rel")
        for name in ("f_options", "b_options"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        for name in ("grad", "sup_loc", "indexing"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, int) else tuple(value))
        solvers = (*solver_names(), "simple_fixed_point_iter")
        _choice("f_solver", self.f_solver, solvers)
        _choice("b_solver", self.b_solver, (*solvers, *LINEAR_SOLVERS, "shine"))
        _choice("core", self.core, ("sliced", "indexing"))
        _choice("preset", self.preset, (None, "torchdeq"))
        _choice("norm_type", self.norm_type, ("weight_norm", "spectral_norm", "none"))
        for name, least in (("f_max_iter", 0), ("eval_f_max_iter", 0), ("b_max_iter", 1), ("n_states", 1)):
            require_count(name, getattr(self, name), least)
        for name in ("jac_loss_weight", "jac_incremental"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.jac_loss_freq <= 1, "jac_loss_freq", self.jac_loss_freq, "from 0 to 1, the share of training steps")
        if self.core == "indexing" and self.f_max_iter < 1:
            raise ValueError('core="indexing" takes its states from the solve, but f_max_iter=0 solves nothing; use "sliced".')
        if any(not 1 <= step <= self.f_max_iter for step in self.indexing):
            raise ValueError(f"indexing={self.indexing}: steps must lie between 1 and f_max_iter={self.f_max_iter}.")
        if list(self.indexing) != sorted(self.indexing):
            raise ValueError(f"indexing={self.indexing}: steps must not decrease.")
        if (self.f_tol_start is None) != (self.f_tol_anneal_steps == 0) or self.f_tol_anneal_steps < 0:
            raise ValueError(
                f"f_tol_start={self.f_tol_start} and f_tol_anneal_steps={self.f_tol_anneal_steps}: an annealed tolerance needs "
                "both, a number and 1 or more steps."
            )
        if self.f_tol_start is not None and min(self.f_tol_start, self.f_tol) <= 0:
            raise ValueError(
                f"f_tol_start={self.f_tol_start}, f_tol={self.f_tol}: a tolerance that falls geometrically is positive."
            )
        if self.no_stat and self.f_solver not in ("picard", "fixed_point_iter", "simple_fixed_point_iter"):
            raise ValueError(
                f'no_stat=True, but f_solver={self.f_solver!r} cannot do without residuals: use "fixed_point_iter".'
            )
        if self.b_solver == "shine" and (self.f_solver != "broyden" or self.preset == "torchdeq"):
            raise ValueError(
                'b_solver="shine" reuses what the forward solve learnt: it needs f_solver="broyden", without preset="torchdeq".'
            )
        # Whatever else is wrong with a solver or a gradient shows when it is made.
        self.forward_solver(self.f_max_iter, self.f_tol)
        self.backward_solver()
        self.gradients()

    # What the settings stand for -------------------------------------------------------------------------------------

    def eval_budget(self) -> int:
        """Solver steps in evaluation.

        Raises:
          ValueError: there are none.
        """
        budget = self.eval_f_max_iter if self.eval_f_max_iter > 0 else int(self.f_max_iter * self.eval_factor)
        if budget < 1:
            raise ValueError(
                f"evaluation would take no solver step (f_max_iter={self.f_max_iter}, eval_factor={self.eval_factor}): set "
                "eval_f_max_iter, for a model that is trained by unrolling to the number of steps that it was trained with."
            )
        return budget

    def training_options(self, step: ArrayLike) -> dict:
        """What changes in the course of training, as `solver_options` of one call."""
        if self.f_tol_start is None:
            return {}
        progress = jnp.minimum(step / self.f_tol_anneal_steps, 1.0)
        return {"f_tol": self.f_tol_start * (self.f_tol / self.f_tol_start) ** progress}

    def forward_solver(self, max_iter: int, tol: float | Array, options: Mapping | None = None) -> Solver:
        """The solver of the forward problem; `options` come before `f_options`."""
        options = {**({"monitor": False} if self.no_stat else {}), **self.f_options, **(options or {})}
        return self._solver(self.f_solver, max_iter, tol, self.f_stop_mode, options)

    def backward_solver(self) -> Solver | LinearSolver | SHINE:
        """The solver of the adjoint system."""
        if self.b_solver == "shine":
            return SHINE(solver=Broyden(tol=self.b_tol, stop_mode=self.b_stop_mode), **self.b_options)
        if self.b_solver in LINEAR_SOLVERS:
            # Their tolerance is relative to the cotangent, whatever b_stop_mode.
            options = {"max_steps": self.b_max_iter, "tol": self.b_tol, **self.b_options}
            return with_options(LINEAR_SOLVERS[self.b_solver], self.b_solver, options)
        return self._solver(self.b_solver, self.b_max_iter, self.b_tol, self.b_stop_mode, self.b_options)

    def _solver(self, name, max_iter, tol, stop_mode, options):
        if self.preset == "torchdeq" or name == "simple_fixed_point_iter":
            return torchdeq_solver(name, max_iter, tol, stop_mode, **options)
        return get_solver(name, **{"max_steps": max_iter, "tol": tol, "stop_mode": stop_mode, **options})

    def gradients(self, f_max_iter: int | None = None) -> list[Gradient]:
        """A rule for each solved state (a phantom rule may supervise several)."""
        n_solved = len(self.step_lists(self.f_max_iter if f_max_iter is None else f_max_iter))
        rules: list[Gradient] = [
            Phantom(
                steps=steps,
                damping=self.tau,
                sample_every=max(self.sup_gap, 0),
                # The original returns the last state twice if it is listed.
                sample_at=tuple(k for k in self.sup_loc if k != steps or self.preset == "torchdeq"),
                remat=self.remat,
            )
            for steps in self.phantom_steps(n_solved)
        ]
        if self.ift or self.hook_ift:
            rules[-1] = Implicit(solver=self.backward_solver(), jacobian_at="point" if self.hook_ift else "image")
        return rules

    @property
    def n_supervised(self) -> int:
        """How many states a training forward pass returns."""
        return sum(rule.n_states for rule in self.gradients())

    def step_lists(self, f_max_iter: int) -> tuple[int, ...]:
        """When states are supervised: evaluation counts for the indexing core, budgets of each slice for the sliced one."""
        n = self.n_states
        at = [step for step in self.indexing if step <= f_max_iter]
        if self.core == "sliced" and (self.preset == "torchdeq" or f_max_iter == 0):
            # The original drops the remainder, and has slices of no steps where steps are listed twice.
            bounds = [0, *at, f_max_iter]
            return (f_max_iter // n,) * n if n > 1 else tuple(b - a for a, b in itertools.pairwise(bounds))
        if n > 1:
            n = min(f_max_iter, n)
            at = [f_max_iter - k * (f_max_iter // n) for k in range(n)]
        ends = sorted({*at, f_max_iter})
        return tuple(ends) if self.core == "indexing" else tuple(b - a for a, b in itertools.pairwise([0, *ends]))

    def phantom_steps(self, n_states: int) -> tuple[int, ...]:
        """`grad` for each of the supervised states."""
        steps = (self.grad,) if isinstance(self.grad, int) else self.grad
        if len(steps) == 1:
            return steps * n_states
        if len(steps) != n_states:
            raise ValueError(f"grad={steps} lists {len(steps)} numbers for {n_states} states: give one, or one per state.")
        return steps


def _choice(name, value, allowed):
    if value not in allowed:
        hint = did_you_mean(value, filter(None, allowed))
        raise ValueError(f"{name}={value!r}{hint} It must be one of {', '.join(map(repr, allowed))}.")


# Leaves weights as they are.
PLAIN = DEQConfig(norm_type="none")
