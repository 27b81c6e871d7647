"""The equilibrium layer: which solver, which gradient, which states to supervise."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from deqjax.core.annotations import Array, Key, PyTree, State
from deqjax.core.gradients import adjoint_probe, damped
from deqjax.core.hoist import Hoisted, as_state, check_batch, hoist
from deqjax.core.implicit import Implicit
from deqjax.core.solve import solve
from deqjax.core.solvers import Picard
from deqjax.core.solvers.base import require, require_count, without_gradients
from deqjax.core.stability import spectral_radius
from deqjax.core.stats import SolverStats
from deqjax.nn.config import DEQConfig
from deqjax.nn.variables import AdjointProbe


class DEQOutput(NamedTuple):
    """States to decode, earliest first (one in evaluation); statistics; `[B]` spectral radius or None.

    The statistics are those of the last solve, but `steps` counts those of all solves.
    """

    states: tuple
    stats: SolverStats
    spectral_radius: jax.Array | None


class DEQ(nnx.Module):
    """Solves z = f(z) as its `DEQConfig` says, in training and in evaluation.

    In training the states carry the gradients of the configured rule. In evaluation there is one state, the solver's
    result itself; should it be differentiated, its gradient is the implicit one.
    """

    def __init__(self, config: DEQConfig | None = None, **settings):
        if config is not None and settings:
            raise TypeError(f"DEQ: a config and settings ({', '.join(settings)}); dataclasses.replace(config, ...) joins them.")
        self.config = DEQConfig.from_config(settings) if config is None else config
        if not isinstance(self.config, DEQConfig):
            raise TypeError(f"config={config!r}: must be a DEQConfig; DEQ.from_config(...) takes a mapping.")
        self.probe = AdjointProbe(adjoint_probe())

    @classmethod
    def from_config(cls, config) -> "DEQ":
        """From a mapping in TorchDEQ's vocabulary. Raises ValueError naming the nearest key for an unknown one."""
        return cls(DEQConfig.from_config(config))

    def __call__(
        self,
        f: Callable[[PyTree], PyTree],
        z_init: PyTree,
        *,
        train: bool,
        solver_options: Mapping | None = None,
        key: Key[Array, ""] | None = None,
        radius_start: State | None = None,
    ) -> DEQOutput:
        """Runs the layer.

        Args:
          f: maps states `[B, ...]` to states, closed over its injection.
          z_init: where to start.
          train: supervised states with gradients, or the single result.
          solver_options: this call's overrides: `f_max_iter` (the budget in evaluation as well), `eval_f_max_iter`, `f_tol`,
            `f_limit` (stop after so many steps of the budget, in the sliced core of each slice's; may be traced, as f_tol
            may), and options of the forward solver.
          key: draws the start of the spectral-radius estimate, or give the start itself as `radius_start`.

        Raises:
          ValueError: `train` or `f_max_iter` is traced.
        """
        untraced = not isinstance(train, jax.core.Tracer)
        require(untraced, "train", train, 'True or False, and not traced (jit\'s static_argnames="train")')
        z_init = as_state(z_init)
        check_batch(z_init)
        f = hoist(f, z_init)
        options = dict(solver_options or {})
        max_iter, eval_max_iter = options.pop("f_max_iter", None), options.pop("eval_f_max_iter", None)
        for name, value in (("f_max_iter", max_iter), ("eval_f_max_iter", eval_max_iter)):
            require_count(name, 0 if value is None else value, 0)
        if train:
            run = self._indexed if self.config.core == "indexing" else self._sliced
            return DEQOutput(*run(f, z_init, self.config.f_max_iter if max_iter is None else max_iter, options), None)
        if max_iter is None or eval_max_iter:
            given = {} if eval_max_iter is None else {"eval_f_max_iter": eval_max_iter}
            max_iter = dataclasses.replace(self.config, **given).eval_budget()
        require_count("f_max_iter", max_iter, 1)
        return self._evaluate(f, z_init, max_iter, options, key, radius_start)

    def trajectory(self, f: Callable[[PyTree], PyTree], z_init: PyTree, steps: Sequence[int]) -> tuple[tuple, SolverStats]:
        """The best state after each of several numbers of evaluations, all from one solve, as in evaluation but without a stop.

        Residuals are measured even where the solver does without. The states have no gradients.

        Args:
          f, z_init: as in a call.
          steps: the numbers of evaluations of f, increasing.
        """
        z_init = as_state(z_init)
        check_batch(z_init)
        f = hoist(f, z_init)
        solved = self._solve(f, jax.lax.stop_gradient(z_init), max(steps), 0.0, {"monitor": True}, tuple(steps))
        return solved.samples, solved.stats

    def _sliced(self, f, z, max_iter, options):
        """A solve per state, each starting from the last differentiable state of the one before."""
        budgets = self.config.step_lists(max_iter)
        states, stats, steps = [], None, 0
        for budget, gradient in zip(budgets, self.config.gradients(max_iter), strict=True):
            solved = self._solve(f, jax.lax.stop_gradient(z), budget, self.config.f_tol, options)
            states += gradient.attach(f, solved.value, self.probe[...], solved.method)
            z, stats = states[-1], solved.stats
            steps = steps + stats.steps
        return tuple(states), dataclasses.replace(stats, steps=steps)

    def _indexed(self, f, z, max_iter, options):
        """One solve, sampled on its way."""
        steps = self.config.step_lists(max_iter)
        solved = self._solve(f, jax.lax.stop_gradient(z), max_iter, self.config.f_tol, options, steps)
        states = []
        for z_hat, gradient in zip(solved.samples, self.config.gradients(max_iter), strict=True):
            states += gradient.attach(f, z_hat, self.probe[...], solved.method)
        return tuple(states), solved.stats

    def _evaluate(self, f, z, budget, options, key, radius_start):
        config = self.config
        tol = config.f_tol if config.eval_f_tol is None else config.eval_f_tol
        z_hat, _, stats, method = self._solve(f, jax.lax.stop_gradient(z), budget, tol, options)
        radius = None
        if config.sradius_mode:
            key = jax.random.key(0) if key is None else key
            radius = spectral_radius(f.detached(), z_hat, key, start=radius_start)
        states = Implicit(solver=self.config.backward_solver(), polish=False).attach(f, z_hat, self.probe[...], method)
        return DEQOutput(states, stats, radius)

    def _solve(self, f: Hoisted, z, budget, tol, options, sample_at=()):
        tol, limit = options.get("f_tol", tol), options.get("f_limit")
        options = {name: value for name, value in options.items() if name not in ("f_tol", "f_limit")}
        solver = self.config.forward_solver(budget, tol, options)
        if self.config.preset == "torchdeq" and isinstance(solver, Picard):
            # The original measures the residual of the damped map.
            tau, solver = without_gradients(solver).damping, dataclasses.replace(solver, damping=1.0)
            f = Hoisted(lambda constants, z, g=f.function: damped(lambda z: g(constants, z), tau)(z), f.constants)
        return solve(f.detached(), z, solver, sample_at, limit)
