"""Several runs of one experiment by one command, each in a folder of its own, finished ones left alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

from deqjax.training.metrics import read_log


def finish(
    experiment: Callable, argv: list[str], folder: Path, settings: Mapping, metric: str, steps: int
) -> tuple[int, float | None]:
    """Trains, or goes on training, with the command line's own settings and some more.

    Args:
      experiment: its `main`.
      argv: of the command; its --mode and --workdir are replaced.
      folder: of this run.
      settings: of the config, by their dotted names.
      metric: of the test, as the log has it.
      steps: length of a finished run.

    Returns:
      The exit status and the metric; None if the run is not finished, after a mistake or because it was told to stop.
    """
    result = final_value(folder, metric, steps)
    if result is not None:
        return 0, result
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    status = experiment([*without(argv, ("mode", "workdir")), *flags, f"--workdir={folder}"])
    return status, final_value(folder, metric, steps) if status == 0 else None


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
