"""What the training loop reads from a config, with defaults: a config need only name what it changes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from deqjax.training.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of a config besides `seed`, `optimizer` (see `deqjax.optim`) and those of the task.

    Attributes:
      steps: updates of the whole run.
      log_every, eval_every, checkpoint_every: in steps; 0 evaluates and saves at the end only, and checkpoints default to
        the evaluations.
      keep: how many of the best checkpoints to keep beside the latest two.
      best_metric, best_mode: which metric of the validation ranks checkpoints, and whether "min" or "max" is best.
      patience: stop after so many evaluations in a row without a new best; 0: never.
      max_bad_steps: a run ends at a line of its log before which more updates in a row than this were not finite.
      accumulate: compute the gradient of a batch in so many slices, in the memory of one.
      ema: decay of a moving average of the weights, which is then what is evaluated and exported; 0: none.
      mesh: sizes of the axes data, fsdp and model; -1 takes what is left.
      resume: working directory of another run, which this one continues; its best checkpoints are copied.
      init_from: weights to begin with, another run's working directory or a file that the task can import.
      tensorboard: write events to `workdir/tensorboard`.
      wandb: project to log to with Weights & Biases; empty: none. `WANDB_MODE=offline` needs no network.
    """

    steps: int
    log_every: int = 100
    eval_every: int = 0
    checkpoint_every: int | None = None
    keep: int = 1
    best_metric: str = "loss"
    best_mode: str = "min"
    patience: int = 0
    max_bad_steps: int = 20
    accumulate: int = 1
    ema: float = 0.0
    mesh: Any = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "model": 1})
    resume: str = ""
    init_from: str = ""
    tensorboard: bool = False
    wandb: str = ""

    @classmethod
    def read(cls, config: Mapping) -> "Settings":
        """Raises UserError for a number that is missing or cannot be."""
        needed = {
            "steps": "the number of updates of the whole run",
            "seed": "of everything random",
            "optimizer": "its name and learning_rate",
        }
        for name, what in needed.items():
            if config.get(name) is None:
                raise UserError(f"The config lacks config.{name}, {what}.")
        if not 0 <= config["seed"] < 2**32:
            raise UserError(f"config.seed={config['seed']}: must be from 0 to {2**32 - 1}.")
        settings = cls(**{name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None})
        least = {"steps": 0, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "keep": 0, "patience": 0}
        least |= {"max_bad_steps": 0, "accumulate": 1}
        for name, minimum in least.items():
            if (getattr(settings, name) or 0) < minimum:
                raise UserError(f"config.{name}={getattr(settings, name)}: must be {minimum} or more.")
        if settings.patience and not settings.eval_every:
            raise UserError(
                f"config.patience={settings.patience} counts evaluations, but with config.eval_every=0 only the end has one: "
                "set config.eval_every to the steps between two."
            )
        if not 0 <= settings.ema < 1:
            raise UserError(f"config.ema={settings.ema}: must be 0 (none) or a decay below 1, such as 0.999.")
        if settings.best_mode not in ("min", "max"):
            raise UserError(f"config.best_mode={settings.best_mode!r}: must be 'min' or 'max'.")
        if settings.checkpoint_every is None:
            settings = dataclasses.replace(settings, checkpoint_every=settings.eval_every)
        return settings

    @property
    def worst(self) -> float:
        """What every value of the metric is better than."""
        return math.inf if self.best_mode == "min" else -math.inf

    @classmethod
    def defaults(cls) -> dict:
        """Every key that has a default."""
        return {name: value for name, value in dataclasses.asdict(cls(steps=0)).items() if name != "steps"}


# These say how a run is carried out, not what it computes, so a resumed run may change them.
FREE_TO_CHANGE = (
    *("steps", "log_every", "eval_every", "checkpoint_every", "keep", "patience", "max_bad_steps"),
    *("mesh", "resume", "init_from", "tensorboard", "wandb"),
)
