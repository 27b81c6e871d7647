"""Learning rates, numerically those of the original training scripts."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import optax

from deqjax.core.naming import did_you_mean
from deqjax.training.errors import UserError

SCHEDULES = ("constant", "step", "cosine", "cosine_after_warmup", "poly", "onecycle", "inv_sqrt")


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
    check_name("schedule", name, SCHEDULES)
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


def check_name(setting: str, value: str, known) -> None:
    """Raises UserError unless the value of `config.optimizer.<setting>` is known."""
    if value not in known:
        raise UserError(f"config.optimizer.{setting}={value!r}{did_you_mean(value, known)} Known: {', '.join(known)}.")
