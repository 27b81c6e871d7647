"""PSNR at equal numbers of parameters: equilibria beside explicit networks, same signal, steps and optimiser, in one table.

    python -m experiments.inr_table --config configs/inr_camera.py --workdir runs/inr_table

Trains every network of `config.table` in a folder of its own; the same command goes on where it was stopped. Writes
`table.json` into the working directory. A name is that of a published run (`DEQ-siren_like-1L128D`; without DEQ- the same
weights applied once), or `siren-{L}L{D}D` or `ffn-{L}L{D}D`.
"""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from deqjax.cli import parse, run
from deqjax.models.inr import INRConfig, representation
from deqjax.nn.config import DEQConfig
from deqjax.training.errors import UserError
from deqjax.training.metrics import read_log
from experiments.inr_signals import SignalTask
from experiments.many_runs import finish

_NAME = re.compile(r"(?P<deq>DEQ-)?(?P<kind>siren_like|fourier|gabor|siren|ffn)-(?P<L>\d+)L(?P<D>\d+)D")
# What a row of the table says of a finished run, and what the log calls it.
COLUMNS = {
    "PSNR": "psnr",
    "from training's states": "psnr_warm",
    "solver steps": "forward/steps",
    "at most": "forward/steps_max",
    "converged": "forward/converged",
    "largest gap": "warm/gap_max",
}


class TableTask(SignalTask):
    """Fitting with a config that lists networks to compare: to be trained, and nothing else."""

    modes = ("train",)
    free_to_change = (*SignalTask.free_to_change, "table")

    def __init__(self, config):
        if "table" not in config or config.data.kind not in ("image", "audio", "video"):
            raise UserError("the table takes a config of a signal with a list of networks (`table`), as configs/inr_camera.py.")
        super().__init__(config)


def train(argv):
    return run(TableTask, argv)


def main(argv=None):
    argv = list(sys.argv if argv is None else argv)
    try:
        options = parse(argv, TableTask.modes)
        table = options.config.table
        names = {name: settings(name, table.siren_scale) for name in table.networks}
    except (UserError, AttributeError):
        return train(argv)  # which says what is wrong
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    workdir, rows = Path(options.workdir), {}
    for name, changes in names.items():
        for seed in table.seeds:
            folder = workdir / f"{name}-seed-{seed}"
            status, result = finish(train, argv, folder, changes | {"seed": seed}, "test/psnr", TableTask.free_to_change)
            if result is None:
                return status  # the same command goes on from there
            rows.setdefault(name, []).append(last_test(folder))
            print(f"{name}, seed {seed}: {result:.2f} dB", flush=True)
    sizes = {name: parameters(options.config, changes) for name, changes in names.items()}
    (workdir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(markdown(rows, sizes))
    return 0


def settings(name: str, siren_scale: float) -> dict:
    """The settings of a network by its name. Raises ValueError if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None or (match["deq"] and match["kind"] in ("siren", "ffn")):
        raise ValueError(f"table.networks: {name!r} is not [DEQ-](siren_like|fourier|gabor)-(L)L(D)D, siren-.. or ffn-..")
    explicit = match["kind"] in ("siren", "ffn")
    chosen = {"model.network": match["kind"] if explicit else "deq" if match["deq"] else "one_pass"}
    chosen |= {"model.n_layers": int(match["L"]), "model.n_hidden": int(match["D"])}
    if not explicit:
        chosen["model.filter"] = match["kind"]
    if not match["deq"]:
        chosen["warm_start"] = False
    if match["kind"] == "siren":
        chosen["model.input_scale"] = siren_scale
    return chosen


def parameters(config, changes: dict) -> int:
    """How many numbers a network learns."""
    model = dict(config.model) | {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    task = SignalTask(config)
    sizes = INRConfig(n_in=len(task.signal.shape), n_out=task.signal.raw.shape[-1], **model)
    net = nnx.eval_shape(lambda: representation(sizes, DEQConfig.from_config(config.deq), nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))


def last_test(folder: Path) -> dict[str, float]:
    """The metrics of the final evaluation."""
    tests = [values for _, values in read_log(folder / "metrics.jsonl") if "test/psnr" in values]
    return {name.removeprefix("test/"): value for name, value in tests[-1].items()}


def markdown(rows: dict, sizes: dict) -> str:
    """A line per network: means over seeds, and the range where there are several."""
    lines = [f"| network | parameters | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for name, results in rows.items():
        cells = []
        for metric in COLUMNS.values():
            values = [result[metric] for result in results if metric in result]
            digits = 3 if metric.endswith("converged") else 2
            cell = f"{np.mean(values):.{digits}f}" if values else ""
            several = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 and metric == "psnr" else ""
            cells.append(cell + several)
        lines.append(f"| {name} | {sizes[name]:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
