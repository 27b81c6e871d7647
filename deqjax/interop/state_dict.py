"""Moves parameters between our modules and PyTorch state dicts, by a table of entries that each model supplies."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.data.errors import DataError
from deqjax.nn.layers import NormalizedConv


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array is laid out in PyTorch: `load` brings it into ours, `export` back."""

    load: Callable[[np.ndarray], np.ndarray]
    export: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # (out, in) to (in, out)
POINTWISE = Layout(lambda x: x[..., 0].T, lambda x: x.T[..., None])  # Conv1d of kernel size 1: (out, in, 1) to (in, out)
COLUMN = Layout(lambda x: x.reshape(-1), lambda x: x[:, None])  # (out, 1) to (out,)
POINTWISE_COLUMN = Layout(lambda x: x.reshape(-1), lambda x: x[:, None, None])  # (out, 1, 1) to (out,)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # (out, in, h, w) to (h, w, in, out)
CONV_COLUMN = Layout(lambda x: x.reshape(-1), lambda x: x[:, None, None, None])  # (out, 1, 1, 1) to (out,)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key of a state dict and the variable it belongs to; several keys may name one variable (tied weights)."""

    key: str
    variable: nnx.Variable
    layout: Layout = SAME


class StateDictError(DataError):
    """A state dict that does not fit the model, with every offending key in the message."""


def conv_entries(prefix: str, layer: NormalizedConv) -> list[Entry]:
    """A convolution over two axes, the name of whose kernel tells how it is normalised."""
    name = {"weight_norm": "weight_v", "spectral_norm": "weight_orig", "none": "weight"}[layer.config.norm_type]
    table = [Entry(f"{prefix}.{name}", layer.kernel, CONV)]
    if layer.scale is not None:
        table.append(Entry(f"{prefix}.weight_g", layer.scale, CONV_COLUMN))
    if layer.bias is not None:
        table.append(Entry(f"{prefix}.bias", layer.bias))
    if layer.config.norm_type == "spectral_norm":
        h, w, n_in, _ = layer.kernel[...].shape
        # A right singular vector counts (in, h, w) there and (h, w, in) here.
        flat = Layout(
            lambda v: v.reshape(n_in, h, w).transpose(1, 2, 0).reshape(-1),
            lambda v: v.reshape(h, w, n_in).transpose(2, 0, 1).reshape(-1),
        )
        table += [Entry(f"{prefix}.weight_u", layer.u, SAME), Entry(f"{prefix}.weight_v", layer.v, flat)]
    return table


def load_entries(entries: Sequence[Entry], state_dict: Mapping[str, np.ndarray], ignore: Sequence[str] = ()) -> None:
    """Sets the variables from a state dict.

    Args:
      entries: the model's table.
      state_dict: arrays by key; a leading `module.` on every key is dropped.
      ignore: keys that may be present and carry nothing (buffers).

    Raises:
      StateDictError: keys missing, unexpected or of another shape, or two names of one tied weight that differ.
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    wanted = {entry.key: entry for entry in entries}
    problems = [f"missing: {key}" for key in wanted if key not in state_dict]
    problems += [f"unexpected: {key}" for key in state_dict if key not in wanted and key not in ignore]
    arrays = {}
    for key, entry in wanted.items():
        if key not in state_dict:
            continue
        given = np.asarray(state_dict[key])
        expected = entry.layout.export(np.empty(entry.variable[...].shape, np.int8)).shape
        if given.shape != expected:
            problems.append(f"wrong shape: {key} is {tuple(given.shape)}, the model needs {tuple(expected)}")
            continue
        value = entry.layout.load(given)
        known = arrays.setdefault(id(entry.variable), (key, entry.variable, value))
        if not np.array_equal(known[2], value, equal_nan=True):
            problems.append(f"tied weights differ: {known[0]} and {key}")
    if problems:
        raise StateDictError(f"the state dict does not fit this model: {'; '.join(problems)}.")
    for _, variable, value in arrays.values():
        variable[...] = jnp.asarray(value, variable[...].dtype)


def export_entries(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """The state dict of the variables' present values."""
    return {e.key: np.ascontiguousarray(e.layout.export(np.asarray(e.variable[...]))) for e in entries}
