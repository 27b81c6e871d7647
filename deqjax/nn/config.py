"""The settings of an equilibrium layer, in the vocabulary that TorchDEQ users know."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from flax.core import FrozenDict

from deqjax.core.naming import did_you_mean
from deqjax.core.solvers import solver_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEQConfig:
    """Every setting of `DEQ` and of the weight normalisation inside its cell.

    Attributes:
      preset: None for this library's solver defaults, "torchdeq" for the original's, evaluation by evaluation.
      core: "sliced" runs a fresh solve per supervised state; "indexing" samples them from one solve.
      f_solver, f_max_iter, f_tol, f_stop_mode: the forward solve.
      f_options, b_options: further options of the solvers, e.g. `{"memory": 5}`.
      b_solver, b_max_iter, b_tol, b_stop_mode: the adjoint solve.
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
    f_options: Mapping = dataclasses.field(default_factory=dict)
    b_solver: str = "fixed_point_iter"
    b_max_iter: int = 40
    b_tol: float = 1e-6
    b_stop_mode: str = "abs"
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
                raise ValueError(f"unknown DEQ setting {key!r}{did_you_mean(key, known)}. Known: {', '.join(known)}.")
        return cls(**{key: config[key] for key in config})

    def __post_init__(self):
        # Hashable, so that a module that holds a config can be a static argument of `jit`.
        for name in ("f_options", "b_options"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        for name in ("grad", "sup_loc", "indexing"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, int) else tuple(value))
        _choice("core", self.core, ("sliced", "indexing"))
        _choice("preset", self.preset, (None, "torchdeq"))
        for solver in (self.f_solver, self.b_solver):
            if solver != "simple_fixed_point_iter":
                solver_class(solver)
        _choice("norm_type", self.norm_type, ("weight_norm", "spectral_norm", "none"))

    def step_lists(self, f_max_iter: int) -> tuple[int, ...]:
        """When states are supervised: evaluation counts for the indexing core, budgets of each slice for the sliced one."""
        n = self.n_states
        if self.core == "indexing":
            if n > 1:
                n = min(f_max_iter, n)
                gap = f_max_iter // n
                return tuple(f_max_iter - (n - 1 - k) * gap for k in range(n))
            return tuple(sorted({*self.indexing, f_max_iter}))
        if n > 1:
            return (f_max_iter // n,) * n
        bounds = [0, *self.indexing, f_max_iter]
        return tuple(b - a for a, b in itertools.pairwise(bounds))

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
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
