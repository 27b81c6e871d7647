"""What training is to every multiscale model: unrolled phase, supervised states, Jacobian regularisation."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.models.mdeq import MDEQ, MDEQConfig, State
from deqjax.nn.config import DEQConfig
from deqjax.training.errors import UserError
from deqjax.training.metrics import Sums, vitals
from experiments.image_pictures import draw_anytime

# Of `config.training`, with defaults; all as in the authors' second version.
TRAINING = {
    "pretrain_steps": 0,  # steps at the beginning that unroll f instead of solving
    "pretrain_unroll": 10,
    "pretrain_jac_loss_weight": 0.0,
    "jac_stop_step": 0,  # from here on without regularisation; 0: never
    "jac_probes": 2,
    "f_max_iter_jitter": 0,  # regularised steps solve with -jitter ... +1 steps more than usual
}


def check_classes(classes: Sequence[str], n_classes: int) -> None:
    """Raises ValueError for data with other classes than the model's."""
    if len(classes) != n_classes:
        raise ValueError(f"model.n_classes={n_classes}, but the data have {len(classes)} classes.")


def check_length(images, batch_size: int) -> None:
    """Raises ValueError for a training set with too few images for a batch."""
    if len(images) < batch_size:
        raise ValueError(f"data.batch_size={batch_size}, but there are {len(images)} images.")


def check_pixels(data, n_channels: int, found: int) -> None:
    """Raises ValueError for images of other channels than the model's, or a normalisation that does not fit them."""
    if found != n_channels:
        raise ValueError(f"model.in_channels={n_channels}, but the images have {found}.")
    for name in ("mean", "std"):
        if len(data[name]) not in (1, found):
            raise ValueError(f"data.{name}={tuple(data[name])}: give one number, or one for each of {found} channels.")
    if min(data.std) <= 0:
        raise ValueError(f"data.std={tuple(data.std)}: must be positive.")


def check_pipeline(data, **least: int) -> None:
    """Raises ValueError for a number below the least that it may be, among those of every input pipeline and of more."""
    for name, minimum in {"batch_size": 1, "eval_batch_size": 1, "threads": 0, "ahead": 1, **least}.items():
        # No number of threads is one per core.
        if data[name] is not None and data[name] < minimum:
            raise ValueError(f"data.{name}={data[name]}: must be {minimum} or more.")


class Forward(NamedTuple):
    """A training forward pass."""

    states: tuple[State, ...]
    logits: list
    jacobian: jax.Array  # the weighted term
    vitals: dict


def forward(model: MDEQ, images, key, step, training: Mapping) -> Forward:
    """Encode, solve or unroll, decode every supervised state.

    Args:
      model: whose statistics move on.
      images: `[B, H, W, c]`.
      key: of masks, probes and whether to regularise.
      step: of training.
      training: see `TRAINING`.
    """
    deq = model.deq.config
    key_masks, key_probes, key_choice, key_jitter = jax.random.split(key, 4)
    injection = model.encode(images, train=True, key=key_masks)
    weight = jacobian_weight(deq, training, step)
    regularised = (weight > 0) & jax.random.bernoulli(key_choice, deq.jac_loss_freq)
    options = deq.training_options(step)
    if training["f_max_iter_jitter"]:
        jitter = jax.random.randint(key_jitter, (), -training["f_max_iter_jitter"], 2)
        limit = jnp.maximum(deq.f_max_iter + jnp.where(regularised, jitter, 0), 1)
        options = {**options, "f_max_iter": deq.f_max_iter + 1, "f_limit": limit}

    def solve(unroll=None):
        out = model.solve(injection, train=True, unroll=unroll, solver_options=options)
        return out.states, vitals(out.stats.sums())

    if training["pretrain_steps"]:
        unrolled = lambda: solve(training["pretrain_unroll"])  # noqa: E731
        states, measured = jax.lax.cond(step < training["pretrain_steps"], unrolled, solve)
    else:
        states, measured = solve()
    logits = [model.decode(z, train=True) for z in states]
    jacobian = jnp.zeros((), logits[-1].dtype)
    if regularises(deq, training):
        term = lambda: model.jacobian_loss(states[-1], injection, key_probes, n_probes=training["jac_probes"])  # noqa: E731
        jacobian = weight * jax.lax.cond(regularised, term, lambda: jnp.zeros((), logits[-1].dtype))
    return Forward(states, logits, jacobian, measured)


def regularises(deq: DEQConfig, training: Mapping) -> bool:
    """Whether the Jacobian term ever has a weight."""
    return bool(deq.jac_loss_weight or deq.jac_incremental or training["pretrain_jac_loss_weight"])


def jacobian_weight(deq: DEQConfig, training: Mapping, step):
    """The weight of the Jacobian term at a step: of the unrolled phase, then growing by 0.1 now and then, at last zero."""
    begun = step - training["pretrain_steps"]
    weight = jnp.asarray(deq.jac_loss_weight, float)
    if deq.jac_incremental:
        weight = weight + 0.1 * (begun // deq.jac_incremental)
    if training["jac_stop_step"]:
        weight = jnp.where(step >= training["jac_stop_step"], 0.0, weight)
    return jnp.where(begun < 0, training["pretrain_jac_loss_weight"], weight)


def supervised(model: MDEQ, out: Forward, criterion: Callable, count) -> tuple[jax.Array, dict]:
    """The loss to minimise and the metrics.

    Args:
      criterion: mean loss of one state's logits.
      count: over how much it is a mean.
    """
    total, values = fixed_point_correction(criterion, out.logits, gamma=model.deq.config.gamma, return_values=True)
    count = jnp.asarray(count, total.dtype)
    metrics = {"loss": (total * count, count), "jacobian": (out.jacobian, jnp.ones_like(total)), **out.vitals}
    if len(out.logits) > 1:
        # The loss is then a weighted sum over states; this is the last one's.
        metrics["loss_last"] = (values[-1] * count, count)
    return total + out.jacobian.astype(total.dtype), metrics


def radius_metric(spectral_radius, counted) -> dict:
    """The mean spectral radius of the images that count; nothing where it was not estimated."""
    if spectral_radius is None:
        return {}
    return {"forward/spectral_radius": (jnp.sum(jnp.where(counted, spectral_radius, 0)), jnp.sum(counted))}


def summed(results: list[dict]) -> dict[str, float]:
    """Means of metrics over batches, fetched at the end so that no batch waits for the host."""
    sums = Sums()
    for metrics in jax.device_get(results):
        sums.add(metrics)
    return sums.means()


def check_training(config) -> dict:
    """`config.training` with defaults.

    Raises:
      ValueError: an unknown or impossible setting, or settings that do not go together.
    """
    given = dict(config.get("training", {}))
    if unknown := sorted(set(given) - set(TRAINING)):
        raise ValueError(f"unknown settings of config.training: {', '.join(unknown)}. Known: {', '.join(TRAINING)}.")
    training, deq = TRAINING | given, DEQConfig.from_config(config.deq)
    for name, least in (("pretrain_unroll", 1), ("jac_probes", 1), *((name, 0) for name in TRAINING)):
        if training[name] < least:
            raise ValueError(f"training.{name}={training[name]}: must be {least} or more.")
    if training["pretrain_steps"] and deq.n_supervised > 1:
        raise ValueError(
            f"training.pretrain_steps={training['pretrain_steps']}: the unrolled phase has one state to supervise, but the deq "
            f"settings have {deq.n_supervised}. Set pretrain_steps=0, or supervise one state."
        )
    if training["f_max_iter_jitter"] and (
        deq.n_supervised > 1 or not deq.forward_solver(deq.f_max_iter, deq.f_tol).monitor or not regularises(deq, training)
    ):
        raise ValueError(
            "training.f_max_iter_jitter varies the solve of regularised steps: it needs deq.jac_loss_weight, one supervised "
            "state and a solver with residuals."
        )
    return training


def architecture(model) -> MDEQConfig:
    """The network of `config.model`: a published size, if one is named, with whatever else is set there."""
    changes = {name: value for name, value in model.items() if value is not None and name != "size"}
    return MDEQConfig.published(model.size, **changes) if model.size else MDEQConfig(**changes)


# Accuracy at every number of steps -----------------------------------------------------------------------------------


def along_one_solve(task, model: MDEQ) -> list[tuple[int, list]]:
    """The numbers of steps of `config.anytime`, each with what `trajectory` gives for them, batch by batch.

    Args:
      task: its `evaluation(split)` gives the batches, its `scores(logits, batch)` are measured.

    Raises:
      UserError: there is no such split, or the steps do not increase from 1 or more.
    """
    options = task.config.anytime
    if options.split not in task.splits:
        raise UserError(f"config.anytime.split={options.split!r}: must be one of {', '.join(task.splits)}.")
    # All that evaluation takes; of TorchDEQ's Broyden that is one more than the budget.
    most = task.deq.forward_solver(task.deq.eval_budget(), 0.0).max_steps
    steps = tuple(options.steps) or tuple(range(1, most + 1))
    if any(a >= b for a, b in itertools.pairwise((0, *steps))):
        raise UserError(f"config.anytime.steps={steps}: must be numbers that increase, the first of them 1 or more.")
    graph, state = nnx.split(model)
    measure = jax.jit(lambda state, batch: trajectory(nnx.merge(graph, state), batch, steps, task.scores))
    results = [jax.device_get(measure(state, batch)) for batch in task.evaluation(options.split)]
    return [(n, [jax.tree.map(lambda x, k=k: x[k], result) for result in results]) for k, n in enumerate(steps)]


def trajectory(model: MDEQ, batch, steps: tuple[int, ...], scores: Callable):
    """What `scores(logits, batch)` gives for the states after so many steps of one solve, and the relative residuals there.

    Both have a leading axis of the steps; the residuals are sums and counts over the images that count.
    """
    samples, stats = model.trajectory(model.encode(batch["images"]), steps)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *samples)
    results = jax.lax.map(lambda z: scores(model.decode(z), batch), stacked)
    residual_BS = jax.lax.cummin(stats.rel_trace, axis=1)[:, jnp.asarray(steps) - 1]
    counted = batch["counted"].astype(residual_BS.dtype)
    return results, (counted @ residual_BS, jnp.full(len(steps), jnp.sum(counted)))


def report_anytime(rows: list[dict], metric: str, folder) -> str:
    """The table of a metric against solver steps; written to `anytime.json` and drawn to `anytime.png` in the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anytime.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw_anytime(rows, metric, folder / "anytime.png")
    line = "{steps:4d}  {metric} {value:.4f}  loss {loss:.4f}  relative residual {residual:.2e}"
    table = [line.format(metric=metric, value=row[metric], **row) for row in rows]
    return "\n".join([*table, f"Wrote anytime.json and anytime.png to {folder}."])
