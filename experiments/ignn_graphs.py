"""Graph classification with implicit graph networks, by cross-validation.

    python -m experiments.ignn_graphs --config configs/ignn_demo_graphs.py
    python -m experiments.ignn_graphs --config configs/ignn_mutag.py --mode folds

Modes: train (and resume) one fold, `config.data.fold`; eval; folds (trains all of them, each in a folder of its own under
--workdir, and prints mean and standard deviation); export (the weights as a state dict, to `config.export_path`).
`config.explicit_layers=T` trains a graph convolutional network of T layers instead.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.cli import parse, run
from deqjax.data.graphs import check_well_posed
from deqjax.data.letters import letters
from deqjax.data.tu import SETS, folds, tu
from deqjax.models.ignn import GCN, IGNN, IGNNConfig, choose_bucket, fit_buckets, stack
from deqjax.nn.config import DEQConfig
from deqjax.training.errors import UserError
from deqjax.training.mesh import batch_devices, make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums, vitals
from experiments.graph_checkpoints import export_weights, import_weights
from experiments.graph_metrics import accuracy, solve_sums
from experiments.ignn_nodes import as_single, graphs_of
from experiments.many_runs import finish

DATA = ("letters", *SETS)


class GraphTask:
    """What the training loop needs to know about graph classification."""

    name = "ignn_graphs"
    modes = ("train", "eval", "folds", "export")
    free_to_change = ("data.dir", "export_path")

    def __init__(self, config, graph_set=None):
        """Reads or generates the data that the config names, unless it is given.

        Raises:
          DataError: the data are missing or damaged, or the layer would not be well-posed on them.
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.deq = DEQConfig.from_config(config.deq)
        self.deq.eval_budget()
        found = read(config) if graph_set is None else graph_set
        if config.model.spectral_radius is not None:
            check_well_posed(found.graphs, config.model.kappa, config.model.spectral_radius)
        self.graphs, self.labels = [as_single(graph) for graph in found.graphs], found.labels.astype(np.int32)
        self.splits = split(self.labels, config.data.fold, config.data.folds, config.data.select, config.data.data_seed)
        self.architecture = IGNNConfig(network="graphs", n_features=found.n_features, n_classes=found.n_classes, **config.model)
        self.buckets = fit_buckets(self.graphs, config.data.buckets)
        self.rows = batch_devices(make_mesh(config.get("mesh")))
        self.items_per_step = ("graphs", config.data.batch_size)
        self.fingerprint = [config.data.name, config.data.fold, len(self.graphs), found.n_features]
        self._evaluate_batch = jax.jit(self._metrics, static_argnums=0)

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        config = self.architecture
        if self.config.explicit_layers:
            sizes = config.n_features, config.n_hidden, config.n_classes, self.config.explicit_layers
            return GCN(*sizes, rngs, dropout=config.dropout, pool=True, aggregation=config.aggregation)
        return IGNN(config, self.deq, rngs)

    def data(self, split: str) -> "GraphTask":
        return self

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.splits["train"]) // self.config.data.batch_size)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Training batch `step`, in the order of the file (as the original), or in one of its own for every epoch."""
        epoch, part = divmod(step, self.per_epoch)
        order, B = self.splits["train"], self.config.data.batch_size
        if self.config.data.shuffle:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(order)
        batch = self.collate(order[part * B : (part + 1) * B])
        p, n = process_share(make_mesh(self.config.get("mesh")))
        return {name: np.split(array, n)[p] if n > 1 else array for name, array in batch.items()}

    def collate(self, chosen) -> dict[str, np.ndarray]:
        """Graphs padded to their bucket and to whole batches, with their classes and which of them count."""
        graphs = [self.graphs[k] for k in chosen]
        n_rows = -(-self.config.data.batch_size // self.rows) * self.rows
        batch = stack(graphs, choose_bucket(graphs, self.buckets), n_rows)
        labels = np.zeros(n_rows, np.int32)
        labels[: len(chosen)] = self.labels[chosen]
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        return arrays | {"labels": labels, "counted": np.arange(n_rows) < len(chosen)}

    def import_checkpoint(self, path: str, model: nnx.Module) -> None:
        import_weights(path, model)

    def export(self, model: nnx.Module) -> str:
        return export_weights(self.config.export_path, model)

    def loss(self, model: nnx.Module, batch, key, step):
        """Mean cross entropy over the graphs of the batch."""
        out = model(graphs_of(batch), train=True, key=key, solver_options=self.deq.training_options(step))
        total, count = _cross_entropy(out.logits, batch)
        return total / count, {"loss": (total, count), **vitals(*solve_sums(out.stats, batch["n_node"][:, 0] > 0))}

    def evaluate(self, model: nnx.Module, split: str) -> dict[str, float]:
        """Loss and accuracy over a split, and how the solves went."""
        mesh, chosen, B = make_mesh(self.config.get("mesh")), self.splits[split], self.config.data.batch_size
        graph, state = nnx.split(model)
        results = []
        for start in range(0, len(chosen), B):
            batch = place_whole(mesh, self.collate(chosen[start : start + B]))
            results.append(self._evaluate_batch(graph, state, batch))
        sums = Sums()
        for metrics in results:
            sums.add(metrics)
        return sums.means()

    def _metrics(self, graph, state, batch):
        out = nnx.merge(graph, state)(graphs_of(batch))
        right = jnp.sum(accuracy(out.logits, batch["labels"]) * batch["counted"])
        losses = {"loss": _cross_entropy(out.logits, batch), "accuracy": (right, jnp.sum(batch["counted"]))}
        return {**losses, **vitals(*solve_sums(out.stats, batch["n_node"][:, 0] > 0))}


def _cross_entropy(logits, batch):
    counted = batch["counted"].astype(logits.dtype)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=-1)[:, 0]
    return jnp.sum(losses * counted), jnp.sum(counted)


# Data ----------------------------------------------------------------------------------------------------------------


def read(config):
    """The graphs that the config names."""
    data = config.data
    if data.name == "letters":
        return letters(data.graphs, data.shortest, data.longest, data.data_seed)
    return tu(data.name, data.dir)


def split(labels: np.ndarray, fold: int, n_folds: int, select: str, seed: int) -> dict[str, np.ndarray]:
    """Numbers of the graphs of every split.

    The fold is the test set. With select="valid" the next one validates and the rest train; with "test" all the rest train and
    the test set itself chooses the best weights, as in the original, whose numbers are too good for it.
    """
    held_out = folds(labels, n_folds, seed)
    valid = held_out[fold] if select == "test" else held_out[(fold + 1) % n_folds]
    train = np.setdiff1d(np.arange(len(labels)), np.concatenate([held_out[fold], valid]))
    return {"train": train, "valid": valid, "test": held_out[fold]}


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    data = config.data
    for name, value, allowed in (("name", data.name, DATA), ("select", data.select, ("valid", "test"))):
        if value not in allowed:
            raise ValueError(f"data.{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
    if data.folds < (3 if data.select == "valid" else 2):
        raise ValueError(f"data.folds={data.folds}: must be 3 or more, one to test, one to validate and some to train.")
    if not 0 <= data.fold < data.folds:
        raise ValueError(f"data.fold={data.fold}: must lie between 0 and {data.folds - 1}.")
    for name, value, least in (
        ("data.batch_size", data.batch_size, 1),
        ("data.buckets", data.buckets, 1),
        ("explicit_layers", config.explicit_layers, 0),
        ("data.data_seed", data.data_seed, 0),
        ("seed", config.seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be {least} or more.")


# Command line --------------------------------------------------------------------------------------------------------


def main(argv=None):
    argv = list(sys.argv if argv is None else argv)
    try:
        options = parse(argv, GraphTask.modes)
    except UserError:
        return run(GraphTask, argv)  # which says what is wrong
    if options.mode == "folds":
        return cross_validate(argv, options)
    return run(GraphTask, argv)


def cross_validate(argv, options) -> int:
    """Trains every fold, going on with those begun, and prints the mean test accuracy of the weights chosen."""
    scores = []
    for fold in range(options.config.data.folds):
        folder = Path(options.workdir) / f"fold-{fold}"
        status, score = finish(main, argv, folder, {"data.fold": fold}, "test/accuracy", GraphTask.free_to_change)
        if score is None:
            return status  # the same command goes on from there
        scores.append(score)
        print(f"fold {fold}: test accuracy {score:.4f}", flush=True)
    print(f"{len(scores)} folds: test accuracy {np.mean(scores):.4f} +- {np.std(scores):.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
