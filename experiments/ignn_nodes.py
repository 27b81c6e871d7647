"""Node classification with implicit graph networks.

    python -m experiments.ignn_nodes --config configs/ignn_chains.py --config.data.length=50
    python -m experiments.ignn_nodes --config configs/ignn_ppi.py --mode eval --config.init_from=ignn-ppi-1.pth

Modes: train (and resume), eval (metrics of both splits), export (the weights as a state dict, to `config.export_path`).
`config.init_from` takes another run or such a file. `config.explicit_layers=T` trains a graph convolutional network of T layers
on the same data instead.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.data.amazon import amazon
from deqjax.data.chains import chains
from deqjax.data.errors import DataError
from deqjax.data.graphs import Graph, check_well_posed, components, with_radius
from deqjax.data.ppi import ppi, synthetic_ppi
from deqjax.models.ignn import GCN, IGNN, GraphsTuple, IGNNConfig, alone, choose_bucket, fit_buckets, pad_rows, single, stack
from deqjax.nn.clipping import clip_gradient
from deqjax.nn.config import DEQConfig
from deqjax.training.mesh import batch_devices, make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums, vitals
from experiments.graph_checkpoints import export_weights, import_weights
from experiments.graph_metrics import accuracy, f1_scores, label_counts, most_probable, solve_sums

SPLITS = ("train", "valid", "test")
DATA = ("chains", "ppi", "ppi_synthetic", "amazon")


@dataclasses.dataclass(frozen=True)
class Example:
    """A graph, its labels `[N]` or `[N, C]`, and which of its nodes count, `[N]`."""

    graph: GraphsTuple
    labels: np.ndarray
    counted: np.ndarray


class NodeTask:
    """What the training loop needs to know about node classification."""

    name = "ignn_nodes"
    modes = ("train", "eval", "export")
    weights_transfer = True
    free_to_change = ("data.dir", "export_path")

    def __init__(self, config, splits: dict[str, list[Example]] | None = None):
        """Reads or generates the data that the config names, unless it is given.

        Raises:
          DataError: the data are missing or damaged, or the layer would not be well-posed on them.
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.deq = DEQConfig.from_config(config.deq)
        _check_burn_in(self.deq)
        self.splits = read(config) if splits is None else splits
        example = self.splits["train"][0]
        # Labels of a node are one class or a set.
        self.sets = example.labels.ndim == 2
        n_classes = example.labels.shape[1] if self.sets else config.data.classes
        n_features = int(example.graph.n_node[0]) if example.graph.nodes is None else example.graph.nodes.shape[1]
        self.architecture = IGNNConfig(n_features=n_features, n_classes=n_classes, **config.model)
        self.buckets = fit_buckets([e.graph for split in SPLITS for e in self.splits[split]], config.data.buckets)
        self.rows = batch_devices(make_mesh(config.get("mesh")))
        self.items_per_step = ("graphs", self.batch_size)
        self.fingerprint = [n_features, n_classes, [int(e.graph.n_edge.sum()) for e in self.splits["train"]]]
        self._evaluate_batch = jax.jit(self._metrics, static_argnums=0)

    @property
    def batch_size(self) -> int:
        """Graphs per step; all of them if the config says 0."""
        return self.config.data.batch_size or len(self.splits["train"])

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        config = self.architecture
        if self.config.explicit_layers:
            sizes = config.n_features, config.n_hidden, config.n_classes, self.config.explicit_layers
            return GCN(*sizes, rngs, dropout=config.dropout, aggregation=config.aggregation)
        return IGNN(config, self.deq, rngs)

    def data(self, split: str) -> "NodeTask":
        return self

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Training batch `step`: an epoch goes through all graphs in an order of its own, and wraps to fill its last batch."""
        examples, B = self.splits["train"], self.batch_size
        if len(examples) > B:
            # Of chains there are some on which no node counts; a batch of these would have nothing to learn from.
            examples = [example for example in examples if example.counted.any()]
        per_epoch = -(-len(examples) // B)
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(examples))
        chosen = [examples[order[(part * B + k) % len(examples)]] for k in range(B)]
        batch = self.collate(chosen)
        p, n = process_share(make_mesh(self.config.get("mesh")))
        return {name: np.split(array, n)[p] if n > 1 else array for name, array in batch.items()}

    def collate(self, examples: list[Example], n_rows: int = 0) -> dict[str, np.ndarray]:
        """Graphs padded to their bucket, in n_rows or more that devices share evenly, with labels and which nodes count."""
        graphs = [example.graph for example in examples]
        if graphs[0].nodes is None:
            batch = alone(graphs[0])
            n_rows, n_node = 1, int(graphs[0].n_node[0])
        else:
            n_rows = -(-max(len(graphs), n_rows) // self.rows) * self.rows
            bucket = choose_bucket(graphs, self.buckets)
            batch, n_node = stack(graphs, bucket, n_rows), bucket.n_node
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        labels, counted = ([getattr(e, name) for e in examples] for name in ("labels", "counted"))
        return arrays | {"labels": pad_rows(labels, n_node, n_rows), "counted": pad_rows(counted, n_node, n_rows)}

    def import_checkpoint(self, path: str, model: nnx.Module) -> None:
        import_weights(path, model)

    def export(self, model: nnx.Module) -> str:
        n_nodes = sum(int(example.graph.n_node.sum()) for example in self.splits["train"])
        return export_weights(self.config.export_path, model, n_nodes)

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: nnx.Module, batch, key, step):
        """Mean cross entropy of the counted nodes: of classes, or of every label of a set."""
        decay = self._decay_of_projections(model)
        if self.config.clip_each:
            clip = lambda x: clip_gradient(x, self.config.clip_each)  # noqa: E731
            nnx.update(model, jax.tree.map(clip, nnx.state(model, nnx.Param)))
        out = model(graphs_of(batch), train=True, key=key, solver_options=self.deq.training_options(step))
        total, count = self._cross_entropy(out.logits, batch)
        metrics = {"loss": (total, count), **vitals(*solve_sums(out.stats, batch["n_node"][:, 0] > 0))}
        return total / count + decay, metrics

    def _decay_of_projections(self, model):
        """Nothing, with the gradient that weight decay lacks: what projections moved a weight by decays with it."""
        decay, term = self.config.optimizer.weight_decay, 0.0
        if decay and not self.config.explicit_layers:
            for layer in model.layers:
                if layer.offset is not None:
                    term = term + decay * jnp.sum(jax.lax.stop_gradient(layer.offset[...]) * layer.weight.kernel[...])
        return term - jax.lax.stop_gradient(term)

    def _cross_entropy(self, logits, batch):
        """Sum over counted nodes, and their number (times the labels of each)."""
        labels, counted = batch["labels"], batch["counted"].astype(logits.dtype)
        if self.sets:
            y = labels.astype(logits.dtype)
            losses = jnp.sum(jax.nn.softplus(logits) - y * logits, axis=-1)
            return jnp.sum(losses * counted), jnp.sum(counted) * logits.shape[-1]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return jnp.sum(losses * counted), jnp.sum(counted)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: nnx.Module, split: str) -> dict[str, float]:
        """Loss and accuracy, or loss and F1, over a split; and how the solves went."""
        if split == "valid" and self.config.data.select == "test":
            split = "test"
        mesh, sums, counts = make_mesh(self.config.get("mesh")), Sums(), 0
        graph, state = nnx.split(model)
        examples, B, results = self.splits[split], self.batch_size, []
        for start in range(0, len(examples), B):
            batch = place_whole(mesh, self.collate(examples[start : start + B], min(B, len(examples))))
            results.append(self._evaluate_batch(graph, state, batch))
        for metrics, label_sets in jax.device_get(results):
            sums.add(metrics)
            counts = counts + label_sets
        means = sums.means()
        return {"loss": means.pop("loss"), **(f1_scores(counts) if self.sets else {}), **means}

    def _metrics(self, graph, state, batch):
        out = nnx.merge(graph, state)(graphs_of(batch))
        counted, labels = batch["counted"].reshape(-1), batch["labels"]
        metrics = {"loss": self._cross_entropy(out.logits, batch)}
        counts = jnp.zeros((3, 1), jnp.int32)
        if self.sets:
            logits, labels = (x.reshape(-1, x.shape[-1]) for x in (out.logits, labels))
            as_many = self.config.data.name == "amazon"
            predicted = most_probable(logits, jnp.sum(labels > 0, axis=-1)) if as_many else logits > 0
            counts = label_counts(predicted, labels, counted)
        else:
            metrics["accuracy"] = (jnp.sum(accuracy(out.logits, labels).reshape(-1) * counted), jnp.sum(counted))
        return {**metrics, **vitals(*solve_sums(out.stats, batch["n_node"][:, 0] > 0))}, counts


def graphs_of(batch) -> GraphsTuple:
    """The batch's graphs."""
    return GraphsTuple(**{name: batch.get(name) for name in GraphsTuple._fields})


def as_single(graph: Graph) -> GraphsTuple:
    """A graph in jraph's form, in float32."""
    nodes = None if graph.nodes is None else graph.nodes.astype(np.float32)
    weights = graph.weights.astype(np.float32)
    return single(nodes, graph.senders, graph.receivers, weights, graph.n_nodes, graph.radius)


# Data ----------------------------------------------------------------------------------------------------------------


def read(config) -> dict[str, list[Example]]:
    """The graphs of every split."""
    reader = {"chains": _chains, "amazon": _amazon}.get(config.data.name, _ppi)
    return reader(config)


def _chains(config):
    data = config.data
    whole = chains(data.length, data.classes, data.chains or None, data.features, data.noise, data.split, seed=data.data_seed)
    indices, parts = zip(*components(whole.graph), strict=True)
    parts = list(zip(indices, _with_radii(parts, config), strict=True))
    return {split: _masked(parts, whole.graph.n_nodes, getattr(whole, split)) for split in SPLITS}


def _masked(parts, n_nodes, chosen):
    """Every graph with the chosen nodes counted."""
    counted = np.zeros(n_nodes, bool)
    counted[chosen] = True
    return [Example(as_single(graph), graph.labels.astype(np.int32), counted[index]) for index, graph in parts]


def _ppi(config):
    graphs = ppi(config.data.dir) if config.data.name == "ppi" else synthetic_ppi(seed=config.data.data_seed)
    every = lambda graph: Example(as_single(graph), graph.labels, np.ones(graph.n_nodes, bool))  # noqa: E731
    return {split: [every(graph) for graph in _with_radii(graphs[split], config)] for split in SPLITS}


def _amazon(config):
    whole = amazon(config.data.dir, config.data.portion)
    (graph,) = _with_radii([whole.graph], config)
    train, valid = whole.train, whole.test
    if config.data.select == "valid":
        # The original selects by the test nodes; a tenth of the training nodes serves instead.
        if len(train) < 2:
            raise DataError(f"{config.data.dir} has one node to train on, and none to validate: take data.select=test.")
        shuffled = np.random.default_rng(config.data.data_seed).permutation(whole.train)
        valid, train = np.split(shuffled, [max(len(shuffled) // 10, 1)])
    chosen = {"train": train, "valid": valid, "test": whole.test}
    parts = [(np.arange(graph.n_nodes), graph)]
    return {split: _masked(parts, graph.n_nodes, chosen[split]) for split in SPLITS}


def _with_radii(graphs, config):
    """The graphs with what the projection of W goes by: the config's radius, if it will do for all, or each its own."""
    if config.model.spectral_radius is None:
        return [graph if graph.radius is not None else with_radius(graph) for graph in graphs]
    check_well_posed(graphs, config.model.kappa, config.model.spectral_radius)
    return graphs


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    data = config.data
    if config.model.network == "graphs":
        raise ValueError('model.network="graphs" classifies whole graphs: python -m experiments.ignn_graphs')
    if data.name == "amazon" and (config.explicit_layers or data.batch_size > 1 or config.model.network == "ppi"):
        raise ValueError(
            "the products of Amazon are one graph, and have no features: explicit_layers must be 0, data.batch_size 0 or 1, "
            'and model.network "amazon" or "chains".'
        )
    for name, value, allowed in (("name", data.name, DATA), ("select", data.select, ("valid", "test"))):
        if value not in allowed:
            raise ValueError(f"data.{name}={value!r}: must be one of {', '.join(map(repr, allowed))}.")
    for name, value, least in (
        ("data.batch_size", data.batch_size, 0),
        ("data.buckets", data.buckets, 1),
        ("explicit_layers", config.explicit_layers, 0),
        ("clip_each", config.clip_each, 0),
        ("data.data_seed", data.get("data_seed", 0), 0),
        ("seed", config.seed, 0),
    ):
        if not value >= least:  # NaN is refused, too
            raise ValueError(f"{name}={value}: must be {least} or more.")


def _check_burn_in(deq: DEQConfig) -> None:
    """Raises ValueError if a solve would end before any of its iterates counts, and hand back what it began with."""
    forward, backward = deq.f_options.get("burn_in", 0), deq.b_options.get("burn_in", 0)
    for name, burn_in, steps in (
        ("training", forward, deq.f_max_iter),
        ("evaluation", forward, deq.eval_budget()),
        ("the gradient", backward, deq.b_max_iter),
    ):
        if burn_in >= max(steps, 1):
            raise ValueError(
                f"the solve of {name} ends after {steps} steps, but none of its first {burn_in} counts (burn_in): raise "
                "f_max_iter, eval_f_max_iter or b_max_iter, or lower burn_in."
            )


def main(argv=None):
    from deqjax.cli import run

    return run(NodeTask, argv)


if __name__ == "__main__":
    sys.exit(main())
