"""Curves of one or several runs, as a picture and as one page that needs no network.

    python -m experiments.report WORKDIR [WORKDIR ...] [--out DIR]

Reads `metrics.jsonl` and `config.json` of each working directory, of running and finished runs alike, and writes `report.png`
and `report.html` to `--out` (default: the first working directory).
"""

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from pathlib import Path

from deqjax.training.metrics import read_log

# Title, unit on the vertical axis, logarithmic?, and the metrics drawn: those that end in one of these names.
PANELS = (
    ("loss", "", False, ("/loss",)),
    ("perplexity, accuracy, error", "", False, ("/perplexity", "/accuracy", "/error", "/psnr", "/f1", "/epe", "/miou")),
    ("learning rate", "", False, ("train/lr",)),
    ("gradient norm", "", True, ("train/grad_norm",)),
    ("solver steps", "evaluations of f", False, ("forward/steps", "backward/steps")),
    ("relative residual", "|f(z) - z| / |f(z)|", True, ("forward/rel", "backward/rel")),
    ("spectral radius", "", False, ("spectral_radius",)),
    ("fraction converged", "", False, ("forward/converged", "backward/converged")),
    ("skipped updates, non-finite solves", "", False, ("/skipped", "/non_finite")),
    ("speed", "steps per second", False, ("time/steps_per_s",)),
)
Curves = dict[str, tuple[list[float], list[float]]]


def read_run(workdir: Path) -> tuple[Curves, dict]:
    """The curves of a run, `{name: (steps, values)}`, and its config by dotted key; {} if there is none.

    Raises:
      FileNotFoundError: there is no `metrics.jsonl`.
    """
    curves: Curves = {}
    for step, entry in read_log(workdir / "metrics.jsonl"):
        for name, value in entry.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    try:
        config = dict(_flat(json.loads((workdir / "config.json").read_text())))
    except (OSError, ValueError, AttributeError, RecursionError):
        config = {}
    return curves, config


def _flat(config: dict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def draw(runs: dict[str, Curves]) -> bytes:
    """All panels that have something to show, as a PNG.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Drawing needs Matplotlib: pip install "deqjax[viz]"') from error

    shown = [(panel, lines) for panel in PANELS if (lines := _lines(runs, panel[3]))]
    n_rows = max(-(-len(shown) // 2), 1)
    figure = Figure(figsize=(13, 3.6 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, ((title, unit, logarithmic, _), lines) in enumerate(shown):
        axes = figure.add_subplot(n_rows, 2, i + 1)
        for label, (steps, values) in lines.items():
            # A curve of few points, an evaluation say, would not be seen without them.
            axes.plot(steps, values, label=label, linewidth=1.2, marker="o" if len(steps) < 25 else None, markersize=3)
        if logarithmic and any(0 < value < math.inf for _, values in lines.values() for value in values):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _lines(runs: dict[str, Curves], endings: tuple[str, ...]) -> Curves:
    """Of each run the curves with such names; the run's name is part of the label where there are several."""
    return {
        f"{run} {name}" if len(runs) > 1 else name: curve
        for run, curves in runs.items()
        for name, curve in sorted(curves.items())
        if name.endswith(endings)
    }


def page(runs: dict[str, Curves], configs: dict[str, dict], picture: bytes) -> str:
    """An HTML page with everything in it: the picture, the last and the best values, the settings."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in sorted(curves)))
    last = [[name, *(_summary(curves.get(name)) for curves in runs.values())] for name in names]
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    settings = [[key, *(str(config.get(key, "")) for config in configs.values())] for key in keys]
    differing = [row for row in settings if len(set(row[1:])) > 1]
    title = ", ".join(runs)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append(f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    if differing:
        parts += ["<h2>Settings that differ</h2>", _table(["setting", *runs], differing)]
    parts += ["<h2>Metrics</h2>", "<p>The last value and its step; smallest and largest.</p>", _table(["metric", *runs], last)]
    parts.append(f"<details><summary>All settings</summary>{_table(['setting', *runs], settings)}</details>")
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:1300px}img{max-width:100%}td,th{padding:2px 12px;text-align:left}"
        "tr:nth-child(even){background:#f2f2f2}table{border-collapse:collapse;font-size:small}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n'


def _summary(curve) -> str:
    if curve is None:
        return ""
    steps, values = curve
    numbers = [value for value in values if not math.isnan(value)] or values
    return f"{values[-1]:.5g} (step {steps[-1]}); {min(numbers):.4g} to {max(numbers):.4g}"


def _table(head, rows) -> str:
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"  # noqa: E731
    return "<table>" + "\n".join([row(head, "th"), *(row(cells, "td") for cells in rows)]) + "</table>"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", nargs="+", type=Path, help="working directory of a run")
    parser.add_argument("--out", type=Path, help="where to write report.png and report.html [the first WORKDIR]")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv[1:])
    try:
        paths = dict.fromkeys(path.absolute() for path in options.workdir)
        # As much of the path as tells the runs apart.
        shared = os.path.commonpath(paths) if len(paths) > 1 else next(iter(paths)).parent
        read = {os.path.relpath(path, shared): read_run(path) for path in paths}
        runs, configs = ({name: run[i] for name, run in read.items()} for i in (0, 1))
        if not any(runs.values()):
            raise ValueError("no metrics have been written yet")
        picture = draw(runs)
        out = options.out or options.workdir[0]
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("report.png", picture), ("report.html", page(runs, configs, picture).encode())):
            (out / name).write_bytes(content)
            print(f"Wrote {out / name}")
    except (OSError, ValueError, ImportError) as error:
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        print(f"Error: {getattr(error, 'strerror', None) or error}{where}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
