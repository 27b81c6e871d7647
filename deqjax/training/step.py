"""The training step, and all that can be known of a run before it starts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deqjax.core.gradients import PROBE_ENTRIES
from deqjax.nn.variables import AdjointProbe
from deqjax.optim.optimizer import build_optimizer
from deqjax.training.accumulate import accumulated
from deqjax.training.errors import UserError
from deqjax.training.layout import parameter_shardings, state_shardings
from deqjax.training.mesh import check_divisible, replicated
from deqjax.training.metrics import vitals
from deqjax.training.settings import Settings
from deqjax.training.state import TrainState, merged, named_leaves
from deqjax.training.task import Task


class Program(NamedTuple):
    """What can be known without running anything: the model's structure, and shape and place of every array."""

    mesh: Any
    graphdef: Any
    probes: Any  # shapes
    optimizer: optax.GradientTransformation
    init: Any
    shapes: TrainState
    shardings: TrainState
    gathered: Any  # the parameters' shardings during a step and in a model

    def model(self, state: TrainState) -> nnx.Module:
        """A model of its own with the state's arrays, the averaged weights if there are any."""
        weights = jax.device_put(state.weights, self.gathered)
        return merged(self.graphdef, weights, zeros_like(self.probes), state.variables)


def zeros_like(shapes):
    """Zeros for a tree of shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def prepare(task: Task, config: Mapping, mesh, batch=None) -> Program:
    """Shapes, places and the compiled initialisation.

    Without a batch there will be no training: no metrics, no optimiser, and memories need not be shared out.
    """
    seed, training = int(config["seed"]), batch is not None
    optimizer = build_optimizer(config["optimizer"], getattr(task, "tied_updates", ())) if training else optax.identity()
    settings = Settings.read(config) if training else None
    new_model = lambda: task.model(nnx.Rngs(seed))  # noqa: E731
    try:
        abstract = nnx.eval_shape(new_model)
    except ValueError as error:
        raise UserError(f"The model cannot be built from this config: {error}") from error
    graphdef, params, probes, variables = nnx.split(abstract, nnx.Param, AdjointProbe, ...)
    metric_names: tuple[str, ...] = ()
    if training:
        for name, array in batch.items():
            check_divisible(mesh, array.shape[0] if array.ndim else 0, f"The batch's {name!r}", settings.accumulate)
        loss = loss_function(task, graphdef, seed)
        metrics = jax.eval_shape(loss, params, probes, variables, batch, jnp.zeros((), jnp.int32))[1][0]
        backward = vitals(dict.fromkeys(PROBE_ENTRIES, 0), side="backward") if jax.tree.leaves(probes) else ()
        metric_names = (*metrics, *backward)

    def create() -> TrainState:
        _, params, _, variables = nnx.split(new_model(), nnx.Param, AdjointProbe, ...)
        best, ema = (settings.worst, settings.ema > 0) if training else (0.0, False)
        return TrainState.create(params, variables, optimizer, metric_names, best, ema)

    shapes, layout = jax.eval_shape(create), getattr(task, "layout", ())
    shardings = state_shardings(mesh, shapes, layout) if training else jax.tree.map(lambda _: replicated(mesh), shapes)
    gathered = parameter_shardings(mesh, shapes.params, layout, gathered=True)
    init = jax.jit(create, out_shardings=shardings)
    return Program(mesh, graphdef, probes, optimizer, init, shapes, shardings, gathered)


def loss_function(task: Task, graphdef, seed: int):
    """`Task.loss` as a pure function: (params, probes, variables, batch, step, slice) -> (loss, (metrics, variables))."""

    def loss(params, probes, variables, batch, step, part=None):
        model = merged(graphdef, params, probes, variables)
        key = jax.random.fold_in(jax.random.key(seed), step)
        value, metrics = task.loss(model, batch, key if part is None else jax.random.fold_in(key, part), step)
        updated = named_leaves(nnx.split(model, nnx.Param, AdjointProbe, ...)[3])
        before = named_leaves(variables)
        for path in sorted(before.keys() | updated.keys()):
            old, new = before.get(path), updated.get(path)
            if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
                was, now = ("absent" if x is None else f"{x.dtype}{list(x.shape)}" for x in (old, new))
                raise TypeError(f"the loss may not change the shape or dtype of model state: {'/'.join(path)}: {was} -> {now}")
        variables = jax.tree.unflatten(jax.tree.structure(variables), [updated[path] for path in before])
        return value, (metrics, variables)

    return loss


def step_function(task: Task, config: Mapping, program: Program, log_every: int):
    """One update: (state, batch) -> (state, the metrics' sums since the last log line, a report of this step)."""
    loss = loss_function(task, program.graphdef, int(config["seed"]))
    settings = Settings.read(config)
    gradient = accumulated(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), settings.accumulate)

    def update(state: TrainState, batch):
        # A solve applies the same weights at every step, so what is split over fsdp is put together once, before it.
        params = jax.lax.with_sharding_constraint(state.params, program.gathered)
        (value, (metrics, variables)), (grads, measured) = gradient(
            params, zeros_like(program.probes), state.variables, batch, state.step
        )
        # Whole gradients too: otherwise their split would reach back into the solve. Each device then updates its part.
        grads = jax.lax.with_sharding_constraint(grads, program.gathered)
        grad_norm = optax.tree.norm(grads)
        updates, opt = program.optimizer.update(grads, state.opt, state.params)
        # A sound gradient may still make an update that is not, as by a rate far too large.
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - settings.ema) if settings.ema else ()

        # A bad step leaves no trace in the state, memories and statistics included.
        keep = lambda new, old: jax.tree.map(lambda n, o: jax.lax.select(finite, n.astype(o.dtype), o), new, old)  # noqa: E731
        if jax.tree.leaves(measured):
            # The "gradient" of a probe: statistics of the backward solve, summed over samples.
            backward = dict(zip(PROBE_ENTRIES, sum(jax.tree.leaves(measured)), strict=True))
            metrics = metrics | vitals(backward, side="backward")

        fresh, sums = state.step % log_every == 0, {}
        for name, (total, count) in metrics.items():
            good = jnp.isfinite(total)
            added = (jnp.where(good, total, 0), jnp.where(good, count, 0))
            sums[name] = tuple(
                jnp.where(fresh, 0, old) + jnp.asarray(new, old.dtype) for new, old in zip(added, state.sums[name], strict=True)
            )
        bad = (~finite).astype(jnp.int32)
        skipped, in_a_row = state.skipped + bad, (state.skipped_in_a_row + bad) * bad
        new_state = state.replace(
            step=state.step + 1,
            params=keep(params, state.params),
            variables=keep(variables, state.variables),
            opt=keep(opt, state.opt),
            ema=keep(ema, state.ema),
            sums=sums,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        return new_state, sums, {"grad_norm": grad_norm, "skipped": skipped, "skipped_in_a_row": in_a_row}

    return update
