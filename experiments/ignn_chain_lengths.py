"""Accuracy against chain length: the implicit network beside explicit ones, several seeds, and the picture of it.

    python -m experiments.ignn_chain_lengths --config configs/ignn_chains.py --workdir runs/chain_lengths

Trains every network of `config.sweep` (explicit_layers 0 is the implicit one) in a folder of its own; the same command goes on
where it was stopped. Writes `accuracy.json` and `accuracy.png` into the working directory.
"""

import json
import sys
from pathlib import Path

import numpy as np

from deqjax.cli import parse, run
from deqjax.training.errors import UserError
from experiments.ignn_nodes import NodeTask
from experiments.many_runs import finish
from experiments.pyplot import pyplot


class ChainTask(NodeTask):
    """Node classification with a config that can be swept over chain lengths: to be trained, and nothing else."""

    modes = ("train",)
    free_to_change = (*NodeTask.free_to_change, "sweep")

    def __init__(self, config):
        if config.data.name != "chains" or "sweep" not in config:
            raise UserError("the sweep over lengths takes a config of chains with a `sweep`, as configs/ignn_chains.py.")
        super().__init__(config)


def train(argv):
    return run(ChainTask, argv)


def main(argv=None):
    argv = list(sys.argv if argv is None else argv)
    try:
        options = parse(argv, ChainTask.modes)
        sweep = options.config.sweep
    except (UserError, AttributeError):
        return train(argv)  # which says what is wrong
    workdir, accuracy = Path(options.workdir), {}
    for length in sweep.lengths:
        for layers in (0, *sweep.explicit_layers):
            for seed in sweep.seeds:
                folder = workdir / f"length-{length}-layers-{layers}-seed-{seed}"
                settings = {"data.length": length, "explicit_layers": layers, "seed": seed}
                status, result = finish(train, argv, folder, settings, "test/accuracy", ChainTask.free_to_change)
                if result is None:
                    return status  # the same command goes on from there
                accuracy.setdefault(layers, {}).setdefault(length, []).append(result)
                print(f"length {length}, {label(layers)}, seed {seed}: test accuracy {result:.3f}", flush=True)
    (workdir / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    print(table(accuracy))
    try:
        draw(accuracy, options.config.data.classes, workdir / "accuracy.png")
    except UserError as error:
        print(f"No picture: {error}", file=sys.stderr)
        return 2
    print(f"Drew {workdir / 'accuracy.png'}.")
    return 0


def label(layers: int) -> str:
    return f"GCN, {layers} layers" if layers else "IGNN"


def table(accuracy: dict) -> str:
    """Mean and range over seeds, a line per network."""
    lengths = list(next(iter(accuracy.values())))
    rows = [f"| test accuracy at length | {' | '.join(map(str, lengths))} |", f"|---|{'---|' * len(lengths)}"]
    for layers, by_length in accuracy.items():
        cells = [f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in by_length.values()]
        rows.append(f"| {label(layers)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(accuracy: dict, n_classes: int, path: Path) -> None:
    """The picture: means as lines, the range over seeds around them, chance dashed."""
    plt = pyplot()
    figure = plt.figure(figsize=(6, 4))
    ax = figure.add_subplot()
    for layers, by_length in accuracy.items():
        lengths = list(by_length)
        values = [np.asarray(by_length[length]) for length in lengths]
        (line,) = ax.plot(lengths, [v.mean() for v in values], marker="o", label=label(layers))
        ax.fill_between(lengths, [v.min() for v in values], [v.max() for v in values], alpha=0.2, color=line.get_color())
    ax.axhline(1 / n_classes, color="grey", linestyle="--", linewidth=1, label="chance")
    ax.set_xlabel("nodes in a chain")
    ax.set_ylabel("test accuracy")
    ax.set_ylim(0, 1.05)
    ax.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
