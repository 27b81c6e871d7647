"""Checkpoints of implicit representations: TorchDEQ's zoo, and the authors' first code ("original")."""

from collections.abc import Mapping

import numpy as np

from deqjax.interop.state_dict import COLUMN, LINEAR, SAME, Entry, export_entries, load_entries
from deqjax.models.inr import INR, FourierFeatures, Siren
from deqjax.nn.layers import NormalizedLinear

_CONSTANT = "f.z_init"  # 0 for siren_like filters, else 1


def entries(model: INR | Siren | FourierFeatures) -> list[Entry]:
    """The table from the zoo's state-dict keys to the model's variables."""
    if not isinstance(model, INR):
        table = [entry for i, layer in enumerate(model.layers) for entry in _linear(f"linear_maps.{i}", layer)]
        if isinstance(model, FourierFeatures):
            table += [Entry("embedder.bval", model.frequencies), Entry("embedder.aval", model.amplitudes)]
        return table
    filters = model.filters
    table = [Entry("injection.x_map.weight", filters.kernel, LINEAR), Entry("injection.x_map.bias", filters.bias)]
    if filters.mu is not None:
        table += [Entry("injection.mu", filters.mu), Entry("injection.gamma", filters.gamma)]
    for i, layer in enumerate(model.layers):
        table += _linear(f"f.layers.{i}.z_map", layer)
    return table + _linear("output_map", model.output)


def load_inr(model: INR | Siren | FourierFeatures, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters from a state dict of either source.

    Weights of the original compute what they were trained for with `recipe="original"` and `norm_type` "none", or
    "spectral_norm" with norm_no_scale, norm_target_norm=0.97 and norm_clip.

    Raises:
      StateDictError: keys that do not fit, all of them named.
    """
    load_entries(entries(model), from_original(state_dict), ignore=[_CONSTANT])


def export_inr(model: INR | Siren | FourierFeatures) -> dict[str, np.ndarray]:
    """The model's parameters as a state dict of TorchDEQ's zoo."""
    state_dict = export_entries(entries(model))
    if isinstance(model, INR):
        value = 0 if model.config.filter == "siren_like" else 1
        state_dict[_CONSTANT] = np.full((1, model.config.n_hidden), value, state_dict["output_map.bias"].dtype)
    return state_dict


def from_original(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of the original code under the zoo's names: one fused filter map instead of one per filter.

    Any other is returned as it is. The original's Fourier filters have a second map that nothing uses; it is left out.
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    prefix = "implicit_layer.f."
    if f"{prefix}init_filter.x_map.weight" not in state_dict:
        return dict(state_dict)
    names = [f"{prefix}init_filter"]
    while f"{prefix}layers.{len(names) - 1}.filter.x_map.weight" in state_dict:
        names.append(f"{prefix}layers.{len(names) - 1}.filter")
    renamed = {}
    for part in ("x_map.weight", "x_map.bias", "mu", "gamma"):
        pieces = [state_dict[f"{name}.{part}"] for name in names if f"{name}.{part}" in state_dict]
        if pieces:
            renamed[f"injection.{part}"] = np.concatenate(pieces)
    for key, value in state_dict.items():
        if ".z_map." in key or key.startswith("output_map."):
            renamed[key.removeprefix("implicit_layer.")] = value
    return renamed


def _linear(prefix: str, layer: NormalizedLinear) -> list[Entry]:
    # "weight_v" is the direction of weight normalisation, and a singular vector of spectral normalisation.
    name = {"weight_norm": "weight_v", "spectral_norm": "weight_orig", "none": "weight"}[layer.config.norm_type]
    table = [Entry(f"{prefix}.{name}", layer.kernel, LINEAR)]
    if layer.scale is not None:
        table.append(Entry(f"{prefix}.weight_g", layer.scale, COLUMN))
    if layer.config.norm_type == "spectral_norm":
        table += [Entry(f"{prefix}.weight_u", layer.u, SAME), Entry(f"{prefix}.weight_v", layer.v, SAME)]
    return table + [Entry(f"{prefix}.bias", layer.bias)]
