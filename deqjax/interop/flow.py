"""Checkpoints of DEQ-Flow: TorchDEQ's zoo (`deq-flow-B-things-1.pth`, ...) and both versions of the authors' code."""

from collections.abc import Mapping

import numpy as np

from deqjax.interop.state_dict import (
    Entry,
    StateDictError,
    conv_entries,
    export_entries,
    load_entries,
)
from deqjax.models.flow import SIZES, DEQFlow, Encoder
from deqjax.models.flow.attention import Aggregate
from deqjax.models.flow.cell import Cell


def load_flow(model: DEQFlow, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters and running statistics.

    Raises:
      StateDictError: it is of another size or variant, which is named, or does not fit in some keys, all of them named.
    """
    arrays = canonical(state_dict)
    _check_variant(model, arrays)
    load_entries(entries(model), arrays)


def export_flow(model: DEQFlow) -> dict[str, np.ndarray]:
    """The model's parameters and running statistics as a state dict of TorchDEQ's zoo."""
    arrays = export_entries(entries(model))
    counters = {key.removesuffix("running_var") + "num_batches_tracked" for key in arrays if key.endswith("running_var")}
    return arrays | {key: np.zeros((), np.int64) for key in sorted(counters)}


def canonical(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict under the zoo's keys: without prefix and counters, the mask head where the second version has it."""
    arrays = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if key.startswith("update_block.mask."):
            key = key.removeprefix("update_block.")
        if not key.endswith("num_batches_tracked"):
            arrays[key] = value
    return arrays


# The tables ----------------------------------------------------------------------------------------------------------


def entries(model: DEQFlow) -> list[Entry]:
    """The table from state-dict keys to the model's variables."""
    table = _under("fnet.", encoder_entries(model.fnet)) + _under("cnet.", encoder_entries(model.cnet))
    table += _under("update_block.", cell_entries(model.cell))
    table += conv_entries("mask.0", model.mask.conv1) + conv_entries("mask.2", model.mask.conv2)
    return table if model.attention is None else table + conv_entries("attn.to_qk", model.attention.to_qk)


def encoder_entries(encoder: Encoder) -> list[Entry]:
    """One encoder."""
    table = conv_entries("conv1", encoder.conv1) + _norm("norm1", encoder.norm1) + conv_entries("conv2", encoder.conv2)
    for i, layer in enumerate(encoder.layers, start=1):
        for b, block in enumerate(layer):
            prefix = f"layer{i}.{b}"
            for k, (conv, norm) in enumerate(((block.conv1, block.norm1), (block.conv2, block.norm2)), start=1):
                table += conv_entries(f"{prefix}.conv{k}", conv) + _norm(f"{prefix}.norm{k}", norm)
            if block.shortcut is not None:
                # There one normalisation has two names.
                table += conv_entries(f"{prefix}.downsample.0", block.shortcut)
                table += _norm(f"{prefix}.norm3", block.norm3) + _norm(f"{prefix}.downsample.1", block.norm3)
    return table


def cell_entries(cell: Cell) -> list[Entry]:
    """f."""
    parts = {
        "encoder": (cell.encoder, ("convc1", "convc2", "convf1", "convf2", "conv")),
        "gru": (cell.gru, ("convz1", "convr1", "convq1", "convz2", "convr2", "convq2")),
        "flow_head": (cell.flow_head, ("conv1", "conv2")),
    }
    names = [(f"{part}.{name}", getattr(module, name)) for part, (module, layers) in parts.items() for name in layers]
    table = [entry for name, layer in names for entry in conv_entries(name, layer)]
    return table if cell.gma is None else table + _under("gma.", aggregate_entries(cell.gma))


def aggregate_entries(aggregate: Aggregate) -> list[Entry]:
    """Global motion aggregation inside f."""
    table = [*conv_entries("to_v", aggregate.to_v), Entry("gamma", aggregate.gamma)]
    return table if aggregate.project is None else table + conv_entries("project", aggregate.project)


def _norm(prefix: str, norm) -> list[Entry]:
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    # Instance normalisation has none of these.
    return [Entry(f"{prefix}.{theirs}", getattr(norm, ours)) for theirs, ours in names.items() if hasattr(norm, ours)]


def _under(prefix: str, table: list[Entry]) -> list[Entry]:
    return [Entry(prefix + entry.key, entry.variable, entry.layout) for entry in table]


# Variants ------------------------------------------------------------------------------------------------------------


def describe(state_dict: Mapping[str, np.ndarray]) -> dict:
    """What a state dict tells of its model, in terms of `FlowConfig`.

    Raises:
      StateDictError: it is of no flow network.
    """
    arrays = canonical(state_dict)
    weight = lambda name: next(  # noqa: E731
        (np.shape(arrays[key]) for key in (f"{name}.weight_v", f"{name}.weight_orig", f"{name}.weight") if key in arrays), None
    )
    gru, head = weight("update_block.gru.convz1"), weight("update_block.flow_head.conv1")
    hidden = {widths.hidden: size for size, widths in SIZES.items()}
    if gru is None or head is None or gru[0] not in hidden:
        raise StateDictError(f"the state dict is of no flow network; it has {', '.join(list(state_dict)[:4])} ...")
    size = hidden[gru[0]]
    wide = 2 * SIZES[size].motion
    return {"size": size, "gma": "update_block.gma.gamma" in arrays, "old_version": head[0] < wide}


def _check_variant(model: DEQFlow, arrays: Mapping[str, np.ndarray]) -> None:
    found, config = describe(arrays), model.config
    # Narrow networks are the same in both versions.
    differ = {
        name: value
        for name, value in found.items()
        if value != getattr(config, name) and not (name == "old_version" and 2 * config.widths.motion <= 256)
    }
    if differ:
        wanted = ", ".join(f"{name}={value!r}" for name, value in differ.items())
        raise StateDictError(f"the state dict is of another variant: load it into a model with {wanted}.")
