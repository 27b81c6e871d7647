"""Optimisers and learning-rate schedules, numerically those of PyTorch."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from deqjax.core.naming import did_you_mean
from deqjax.training.errors import UserError
from deqjax.training.state import leaf_path

SCHEDULES = ("constant", "step", "cosine", "cosine_after_warmup", "poly", "onecycle", "inv_sqrt")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad")


def learning_rate(config: Mapping) -> optax.Schedule:
    """The rate of update k = 0, 1, ...

    A linear warm-up over `warmup_steps` = w updates, then, with n = `max_steps` (not shifted by the warm-up):

    * constant: learning_rate.
    * step: learning_rate * decay_factor^(how many numbers of `decay_at` have been reached).
    * cosine: lr_min + (learning_rate - lr_min) / 2 * (1 + cos(pi k / n)).
    * cosine_after_warmup: max(lr_min, learning_rate / 2 * (1 + cos(pi (k + 1 - w) / (n - w)))).
    * poly: learning_rate * (1 - k / n)^0.9.
    * onecycle: linearly from learning_rate / 25 to learning_rate at update 0.05 n - 1, then to learning_rate / 250000 at
      update n - 1; it has its own warm-up.
    * inv_sqrt: learning_rate * k^-0.5, reached by a warm-up of learning_rate * k / warmup_steps^1.5.

    The warm-up takes the fraction (k + 1) / warmup_steps. With `first_update_full_lr` it is the deq-lm script's, in which
    a rate set after update k - 1 holds for update k: k / warmup_steps, and the full rate for update 0 (with inv_sqrt,
    whose factor holds from the start: zero).

    Args:
      config: learning_rate, and optionally schedule, warmup_steps, max_steps, lr_min, decay_at, decay_factor,
        first_update_full_lr.
    """
    peak, low = float(config["learning_rate"]), float(config.get("lr_min", 0.0))
    warmup, total = int(config.get("warmup_steps", 0)), int(config.get("max_steps", 0))
    name = config.get("schedule", "constant")
    as_in_script = bool(config.get("first_update_full_lr", False))
    _check("schedule", name, SCHEDULES)
    if name in ("cosine", "cosine_after_warmup", "poly", "onecycle") and total <= (
        warmup if name == "cosine_after_warmup" else 0
    ):
        raise UserError(
            f"config.optimizer.schedule={name!r} needs config.optimizer.max_steps, the length of the run, warm-up included."
        )

    factor, decay_at = float(config.get("decay_factor", 0.1)), [int(step) for step in config.get("decay_at", ())]
    if name == "step" and not decay_at:
        raise UserError("config.optimizer.schedule='step' needs config.optimizer.decay_at, the updates where the rate falls.")

    def schedule(count):
        k = jnp.asarray(count, float)
        done = k if as_in_script else k + 1
        if name == "inv_sqrt":
            later, scale = peak * jnp.maximum(k, 1) ** -0.5, warmup**-1.5 if warmup else 1.0
        elif name == "cosine":
            later, scale = low + (peak - low) / 2 * (1 + jnp.cos(math.pi * k / total)), 1 / max(warmup, 1)
        elif name == "cosine_after_warmup":
            fallen = peak / 2 * (1 + jnp.cos(math.pi * (k + 1 - warmup) / (total - warmup)))
            later, scale = jnp.maximum(low, fallen), 1 / max(warmup, 1)
        elif name == "onecycle":
            first, last, top = peak / 25, peak / 25e4, max(0.05 * total - 1, 1e-6)
            rising, falling = first + (peak - first) * k / top, peak + (last - peak) * (k - top) / (total - 1 - top)
            later, scale = jnp.maximum(jnp.where(k <= top, rising, falling), last), 1 / max(warmup, 1)
        elif name == "poly":
            later, scale = peak * jnp.maximum(1 - k / total, 0) ** 0.9, 1 / max(warmup, 1)
        else:
            fallen = sum((k >= step).astype(float) for step in decay_at) if name == "step" else 0
            later, scale = jnp.full_like(k, peak) * factor**fallen, 1 / max(warmup, 1)
        rate = jnp.where(k < warmup, peak * done * scale, later)
        return jnp.where(k == 0, peak, rate) if as_in_script and name != "inv_sqrt" else rate

    return schedule


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradient by min(1, max_norm / (norm + 1e-6)), PyTorch's formula."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def leave_untouched(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leaves a parameter alone whose gradient is zero in every entry: its value, its moments and its clock.

    What PyTorch's optimisers do to a parameter that took no part in a step (a cluster of the vocabulary without a token in
    the batch): its gradient is None there. Every parameter gets a state of its own, so that each has its own clock.

    Args:
      optimizer: one that treats parameters independently of each other.
    """

    def init(params):
        return jax.tree.map(optimizer.init, params)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        params = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        results = []
        for gradient, own, param in zip(leaves, structure.flatten_up_to(state), params, strict=True):
            touched = jnp.any(gradient != 0)
            moved, after = optimizer.update(gradient, own, param)
            keep = lambda new, old, touched=touched: jnp.where(touched, new, old)  # noqa: E731
            results.append((jnp.where(touched, moved, 0), jax.tree.map(keep, after, own)))
        moved, after = zip(*results, strict=True)
        return structure.unflatten(moved), structure.unflatten(after)

    return optax.GradientTransformation(init, update)


def tie_updates(groups: Sequence[Sequence[tuple[str, ...]]]) -> optax.GradientTransformation:
    """Gives all leaves of a group the sum of their updates.

    What an optimiser does to one tensor that it holds under several names, as the original does to tied projections.
    Comes after the optimiser proper.

    Args:
      groups: paths of leaves, e.g. `[(("embed", "proj_0"), ("head", "proj_0"))]`.

    Raises:
      ValueError: no parameter has such a path.
    """

    def update(updates, state, params=None):
        by_path = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]}
        totals = {}
        for group in groups:
            if missing := [path for path in group if tuple(path) not in by_path]:
                raise ValueError(f"no parameter {'/'.join(missing[0])} to tie; there are {', '.join(map('/'.join, by_path))}.")
            totals |= dict.fromkeys(map(tuple, group), sum(by_path[tuple(path)] for path in group))
        return jax.tree_util.tree_map_with_path(lambda path, leaf: totals.get(leaf_path(path), leaf), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def build_optimizer(config: Mapping, tied: Sequence[Sequence[tuple[str, ...]]] = ()) -> optax.GradientTransformation:
    """The optimiser of `config.optimizer`.

    Args:
      config: name, learning_rate (see `learning_rate` for its schedule); optionally b1, b2, eps, decay (rmsprop's alpha),
        momentum, nesterov, weight_decay (part of the gradient, as in PyTorch; adamw alone decouples it), clip (of the
        gradient's norm; 0: none) and clip_value (of every entry of the gradient; 0: none).
      tied: see `tie_updates`.
    """
    name = config.get("name", "adam")
    _check("name", name, OPTIMIZERS)
    decay = float(config.get("weight_decay", 0.0))
    parts = []
    if decay and name != "adamw":
        parts.append(optax.add_decayed_weights(decay))
    if name in ("adam", "adamw"):
        parts.append(optax.scale_by_adam(config.get("b1", 0.9), config.get("b2", 0.999), config.get("eps", 1e-8)))
    elif name == "rmsprop":
        parts.append(optax.scale_by_rms(config.get("decay", 0.99), config.get("eps", 1e-8), eps_in_sqrt=False))
    elif name == "adagrad":
        parts.append(_scale_by_adagrad(config.get("eps", 1e-10)))
    if name in ("sgd", "rmsprop") and config.get("momentum", 0.0):
        parts.append(optax.trace(config["momentum"], nesterov=config.get("nesterov", False)))
    if decay and name == "adamw":
        parts.append(optax.add_decayed_weights(decay))
    clip = [clip_by_global_norm(float(config["clip"]))] if config.get("clip", 0.0) else []
    clip += [optax.clip(float(config["clip_value"]))] if config.get("clip_value", 0.0) else []
    tie = [tie_updates(tied)] if tied else []
    rate = optax.scale_by_learning_rate(learning_rate(config))
    return optax.chain(*clip, leave_untouched(optax.chain(*(parts or [optax.identity()]))), rate, *tie)


def _scale_by_adagrad(eps: float) -> optax.GradientTransformation:
    """g / (sqrt(sum of g^2) + eps); optax has eps under the root."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, sums, params=None):
        sums = jax.tree.map(lambda s, g: s + jnp.square(g), sums, updates)
        return jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + eps), sums, updates), sums

    return optax.GradientTransformation(init, update)


def _check(setting, value, known):
    if value not in known:
        raise UserError(f"config.optimizer.{setting}={value!r}{did_you_mean(str(value), known)}. Known: {', '.join(known)}.")
