"""Numbers of a run: sums and counts, where they are written, and the speed."""

import contextlib
import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from deqjax.training.console import peak_memory, say
from deqjax.training.errors import UserError


class Sums:
    """Adds up metrics of the form `{name: (sum, count)}` over batches of any size; exact, unlike a mean of means."""

    def __init__(self):
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping) -> "Sums":
        for name, (value, count) in jax.device_get(dict(metrics)).items():
            total, counted = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (total + float(value), counted + float(count))
        return self

    def means(self) -> dict[str, float]:
        """The mean of each metric that was counted at all."""
        return {name: total / count for name, (total, count) in self.totals.items() if count}


def vitals(*solves: Mapping, side: str = "forward") -> dict:
    """How forward or backward solves went, as metrics, from the sums of their statistics (`SolverStats.sums`)."""
    samples = sum(sums["samples"] for sums in solves)
    names = [name for name in solves[0] if name != "samples"] if solves else []
    return {f"{side}/{name}": (sum(sums[name] for sums in solves), samples) for name in names}


class MetricWriter:
    """Appends a JSON object per line to `workdir/metrics.jsonl`; on request, writes to TensorBoard and Weights & Biases too.

    Only the first process writes. What depends on clock and machine is under keys that start with `time/`; everything else
    is the same in a run that was interrupted and resumed as in one that was not.
    """

    def __init__(self, workdir, start_step: int = 0, tensorboard: bool = False, wandb: str = "", config: Mapping | None = None):
        """Args:
        workdir: the run's directory.
        start_step: where the run goes on from; later lines are dropped, for they will be written again. The log of a run
          that begins anew is kept beside it.
        tensorboard: write events to `workdir/tensorboard` (needs tensorboardX).
        wandb: Weights & Biases project; empty: none.
        config: what to show there as the run's settings.

        Raises:
          UserError: what was requested is not installed.
        """
        self._file = self._events = self._run = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if start_step == 0 and path.exists() and path.stat().st_size:
            os.replace(path, _free_name(path))
        _keep_until(path, start_step)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            SummaryWriter = _optional("tensorboardX", "config.tensorboard").SummaryWriter
            self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start_step + 1)
        if wandb:
            module, identity = _optional("wandb", "config.wandb"), Path(workdir) / "wandb_id"
            try:
                if not (identity.exists() and identity.read_text()):
                    identity.write_text(os.urandom(4).hex())
                self._run = module.init(
                    project=wandb,
                    dir=str(workdir),
                    id=identity.read_text(),
                    name=Path(workdir).name,
                    resume="allow",
                    config=dict(config or {}),
                )
                # Its own counter may not go back, as ours does after a crash.
                self._run.define_metric("*", step_metric="step")
            except Exception as error:  # a service: whatever happens there must not cost a run
                say(f"Weights & Biases is left out of this run: {error}. WANDB_MODE=offline needs no network.")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        try:
            self._file.write(_line(int(step), numbers))
            if self._events is not None:
                for name, value in numbers.items():
                    self._events.add_scalar(name, value, int(step))
        except OSError as error:
            raise UserError(f"Cannot write to {self._file.name}, so the run stops here: {error.strerror}.") from error
        if self._run is not None:
            try:
                self._run.log({"step": int(step), **numbers})
            except Exception as error:  # as above
                say(f"Weights & Biases is left out from step {step} on: {error}.")
                self._run = None

    def close(self) -> None:
        for finish in [
            getattr(self._file, "close", None),
            getattr(self._events, "close", None),
            getattr(self._run, "finish", None),
        ]:
            # A line that could not be written was reported then; closing tries once more.
            with contextlib.suppress(OSError):
                if finish is not None:
                    finish()


def _optional(module: str, setting: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{setting} needs {module}: pip install "deqjax[log]", or switch it off.') from error


def read_log(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The lines of a `metrics.jsonl`, as `(step, values)`.

    Damaged ones are left out: a run that is being written to, or was killed, may end in half a line.
    """
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            values = json.loads(line)
            step = int(values.pop("step"))
            entries.append((step, {name: float(value) for name, value in values.items()}))
    return entries


def _line(step: int, values: Mapping[str, float]) -> str:
    """JSON has no infinities, so numbers that are not finite are written as strings."""
    return json.dumps({"step": step} | {name: x if math.isfinite(x) else str(x) for name, x in values.items()}) + "\n"


def _free_name(path: Path) -> Path:
    """`metrics.before.jsonl`, or with a number if that is another log."""
    names = (path.with_name(f"metrics.before{f'-{n}' if n else ''}.jsonl") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _keep_until(path: Path, last: int) -> None:
    """Drops lines past a step, damaged ones, and test results, which every finished run writes anew."""
    if not path.exists():
        return
    is_kept = lambda step, values: step <= last and not any(name.startswith("test/") for name in values)  # noqa: E731
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(_line(*entry) for entry in read_log(path) if is_kept(*entry)))
    os.replace(replacement, path)


class Progress:
    """Steps per second and time to go, without compilation, evaluation and checkpoints."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._last: tuple[float, int] | None = None
        self._paused = 0.0

    @contextlib.contextmanager
    def pause(self):
        """What happens inside does not count."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def tick(self, step: int) -> dict[str, float]:
        """Speed since the last call, and memory; empty at the first."""
        now, speed = time.monotonic(), {}
        if self._last is not None and step > self._last[1]:
            rate = (step - self._last[1]) / max(now - self._last[0] - self._paused, 1e-9)
            speed = {
                "time/steps_per_s": rate,
                "time/eta_s": max(self._total - step, 0) / rate,
                "time/memory_gib": peak_memory(),
            }
        self._last, self._paused = (now, step), 0.0
        return speed
