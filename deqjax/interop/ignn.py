"""Checkpoints of implicit graph networks: TorchDEQ's zoo (`ignn-ppi-1.pth`, ...) and the original repository."""

from collections.abc import Mapping

import numpy as np

from deqjax.interop.state_dict import COLUMN, LINEAR, SAME, Entry, StateDictError, export_entries, load_entries
from deqjax.models.ignn import IGNN
from deqjax.nn.layers import NormalizedLinear


def entries(model: IGNN, original: bool = False) -> list[Entry]:
    """The table from state-dict keys to the model's variables.

    Args:
      original: the original repository's names, which differ from the zoo's in the PPI network.
    """
    ppi, table = model.config.network == "ppi", []
    for number, layer in enumerate(model.layers):
        prefix = _prefix(model, number, original)
        table += _linear(f"{prefix}.W", layer.weight) + _linear(f"{prefix}.Omega_1", layer.omega_1)
        if layer.omega_2 is not None:
            table += _linear(f"{prefix}.Omega_2", layer.omega_2)
    for number, skip in enumerate(model.skips):
        last = number + 1 == len(model.skips)
        name = ("V" if last else f"V_{number}") if original else f"proj.{number}"
        table += [Entry(f"{name}.weight", skip.kernel, LINEAR), Entry(f"{name}.bias", skip.bias)]
    if model.hidden is not None:
        table += [Entry("V_0.weight", model.hidden.kernel, LINEAR), Entry("V_0.bias", model.hidden.bias)]
    if not ppi:
        name = "V" if model.hidden is None else "V_1"
        table.append(Entry(f"{name}.weight", model.readout.kernel, LINEAR))
        if model.readout.bias is not None:
            table.append(Entry(f"{name}.bias", model.readout.bias))
    return table


def load_ignn(model: IGNN, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters from a state dict of either source.

    What no forward pass uses is passed over: `bias`, the zeros `X_0`, and the second Omega of networks without that term.
    A checkpoint of the original repository needs `omega_2=False` to compute what it was trained for; only that of the PPI
    network can be told from the zoo's.

    Raises:
      StateDictError: keys that do not fit, all of them named, or a PPI checkpoint of the original repository for a network with
        the second term.
    """
    original = model.config.network == "ppi" and any(key.removeprefix("module.").startswith("ig1.") for key in state_dict)
    if original and model.config.has_omega_2:
        raise StateDictError(
            "the state dict is of the original repository, whose networks have no term Omega_2 U, but this one has it: set "
            "model.omega_2=False, as configs/ignn_ppi.py:original does."
        )
    ignored = ["X_0"]
    for number, layer in enumerate(model.layers):
        prefix = _prefix(model, number, original)
        ignored.append(f"{prefix}.bias")
        if layer.omega_2 is None:
            ignored += [f"{prefix}.Omega_2{suffix}" for suffix in ("", "_orig", "_g", "_u", "_v")]
    load_entries(entries(model, original), state_dict, ignore=ignored)
    for layer in model.layers:
        if layer.offset is not None:
            layer.offset[...] = 0 * layer.offset[...]


def export_ignn(model: IGNN, n_nodes: int | None = None) -> dict[str, np.ndarray]:
    """The model's parameters as a state dict of TorchDEQ's zoo.

    Args:
      n_nodes: size of the graph that the chains and Amazon networks were trained on: their state dicts hold its initial
        state X_0. None leaves it out.
    """
    state_dict = export_entries(entries(model))
    for number, layer in enumerate(model.layers):
        prefix, m = _prefix(model, number, False), layer.weight.kernel.shape[1]
        state_dict[f"{prefix}.bias"] = np.zeros((m, 1), np.float32)
        if layer.omega_2 is None:
            state_dict |= _unused(f"{prefix}.Omega_2", layer.omega_1)
        if layer.offset is not None:
            state_dict[f"{prefix}.W"] = state_dict[f"{prefix}.W"] + np.asarray(layer.offset[...]).T
    if n_nodes is not None and model.config.starts_from_zero:
        state_dict["X_0"] = np.zeros((model.config.n_hidden, n_nodes), np.float32)
    return state_dict


def _prefix(model: IGNN, number: int, original: bool) -> str:
    return f"ignn.{number}" if model.config.network == "ppi" and not original else f"ig{number + 1}"


def _unused(prefix: str, like: NormalizedLinear) -> dict[str, np.ndarray]:
    """Zero weights under the names of a layer that the originals allocate and never use."""
    arrays = {entry.key: np.ones_like(value) for entry in _linear(prefix, like) for value in export_entries([entry]).values()}
    zero = f"{prefix}_g" if f"{prefix}_g" in arrays else prefix
    return {key: 0 * value if key == zero else value for key, value in arrays.items()}


def _linear(prefix: str, layer: NormalizedLinear) -> list[Entry]:
    # "_v" is the direction of weight normalisation, and a singular vector of spectral normalisation.
    name = {"weight_norm": "_v", "spectral_norm": "_orig", "none": ""}[layer.config.norm_type]
    table = [Entry(f"{prefix}{name}", layer.kernel, LINEAR)]
    if layer.scale is not None:
        table.append(Entry(f"{prefix}_g", layer.scale, COLUMN))
    if layer.config.norm_type == "spectral_norm":
        table += [Entry(f"{prefix}_u", layer.u, SAME), Entry(f"{prefix}_v", layer.v, SAME)]
    return table
