"""Several runs of one experiment by one command, each in a folder of its own, finished ones left alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deqjax.cli import parse
from deqjax.training.metrics import read_log
from deqjax.training.start import changes


def finish(
    experiment: Callable, argv: list[str], folder: Path, settings: Mapping, metric: str, free: Sequence[str] = ()
) -> tuple[int, float | None]:
    """Trains, or goes on training, with the command line's own settings and some more.

    A finished run is left alone if its config is the one asked for; if not, the experiment refuses to go on with it.

    Args:
      experiment: its `main`.
      argv: of the command; its --mode and --workdir are replaced.
      folder: of this run.
      settings: of the config, by their dotted names.
      metric: of the test, as the log has it.
      free: see `Task.free_to_change`.

    Returns:
      The exit status and the metric; None if the run is not finished, after a mistake or because it was told to stop.
    """
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    argv = [*without(argv, ("mode", "workdir")), *flags, f"--workdir={folder}"]
    config = parse(argv).config
    result = final_value(folder, metric, config.steps)
    # From another place come other data, perhaps: the run itself compares them, when it is told to go on.
    if result is not None and _has_config(folder, config.to_dict(), [name for name in free if name != "data.dir"]):
        return 0, result
    status = experiment(argv)
    # A run that begins or goes on takes results of a test out of its log, so there are some only if it came to its end: perhaps
    # before its last step (config.patience).
    return status, final_value(folder, metric, 0) if status == 0 else None


def _has_config(folder: Path, config: Mapping, free: Sequence[str]) -> bool:
    """Whether a run was made with this config, as far as it says what is computed."""
    path = folder / "config.json"
    before, now = json.loads(path.read_text()) if path.is_file() else {}, json.loads(json.dumps(config, default=str))
    return all(allowed for _, allowed in changes(before, now, free))


def final_value(folder: Path, metric: str, steps: int) -> float | None:
    """What a run found in its final evaluation after so many steps; None if it has not got there."""
    path = folder / "metrics.jsonl"
    entries = read_log(path) if path.is_file() else []
    return next((values[metric] for step, values in reversed(entries) if metric in values and step >= steps), None)


def without(argv: list[str], options) -> list[str]:
    """The command line without some options, given as `--name=value` or `--name value`."""
    kept, skip = [], False
    for arg in argv:
        name, equals, _ = arg.partition("=")
        if skip:
            skip = False
        elif name.lstrip("-") in options and name.startswith("-"):
            skip = not equals
        else:
            kept.append(arg)
    return kept
