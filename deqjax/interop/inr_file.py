"""A signal as a small file: the weights of its network, rounded, with all that is needed to render it at any resolution.

The file is a NumPy archive (.npz, whatever its ending): a JSON header and an array per parameter. Hidden and output kernels are
rounded to 16 bits, or to 8 with a scale per output feature. What meets coordinates or is a vector keeps 32 bits: it is a small
part, and phases of hundreds of radians bear no rounding.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.data.errors import DataError
from deqjax.models.inr import INR, INRConfig, Signals, representation
from deqjax.models.inr.explicit import Frequencies
from deqjax.nn.config import DEQConfig

DTYPES = ("float32", "float16", "int8")
_VERSION = 1
# Of the equilibrium layer, what matters to a finished model.
_SOLVER = (
    "preset",
    "f_solver",
    "f_max_iter",
    "f_tol",
    "f_stop_mode",
    "no_stat",
    "f_options",
    "eval_factor",
    "eval_f_max_iter",
    "eval_f_tol",
)


def write_signals(path, signals: Signals, about: Mapping, dtype: str = "float16") -> int:
    """Writes the networks of one or several signals; all of it or nothing.

    Args:
      path: of the file.
      signals: the networks.
      about: what the coordinates and values mean, as JSON.
      dtype: of large kernels, one of `DTYPES`.

    Returns:
      The size of the file in bytes.

    Raises:
      DataError: no such dtype, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise DataError(f"export_dtype={dtype!r}: must be one of {', '.join(map(repr, DTYPES))}.")
    plain = [_plain(signals.one(number)) for number in range(signals.count)]
    net = plain[0]
    header = {"version": _VERSION, "dtype": dtype, "count": signals.count, "about": dict(about)}
    header["model"] = dataclasses.asdict(net.config)
    if isinstance(net, INR) and net.deq is not None:
        solver = {name: getattr(net.deq.config, name) for name in _SOLVER}
        header["deq"] = solver | {"f_options": dict(solver["f_options"])}
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for name, stacked in _stacked([_parameters(one) for one in plain]).items():
        arrays |= _rounded(name, stacked, dtype) if _is_large(name, stacked, net.config) else {name: stacked}
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def read_signals(path) -> tuple[list[nnx.Module], dict]:
    """The networks in a file, one per signal, and what their coordinates and values mean.

    Raises:
      DataError: there is no such file, it is damaged, or it is another kind of file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}. --mode export writes one (config.export_path).")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header["version"] != _VERSION:
            raise DataError(f"{path} is of version {header['version']} of this format; {_VERSION} can be read.")
        config, deq = INRConfig(**header["model"]), DEQConfig(norm_type="none", **header.get("deq", {}))
        networks = []
        for number in range(header["count"]):
            net = representation(config, deq, nnx.Rngs(0))
            for name, variable in _variables(net).items():
                value = _restored(name, arrays)[number]
                if value.shape != variable[...].shape:
                    raise DataError(f"{path} is damaged: {name} has the shape {list(value.shape)}.")
                variable[...] = jnp.asarray(value, variable[...].dtype)
            networks.append(net)
        return networks, header["about"]
    except DataError:
        raise
    except Exception as error:  # what a damaged archive raises has no end
        raise DataError(f"{path} is no file of signals, or is damaged ({type(error).__name__}: {error}).") from error


def _plain(net: nnx.Module) -> nnx.Module:
    """The same function without normalisation: its effective weights are its weights."""
    if not isinstance(net, INR):
        return net
    deq = DEQConfig() if net.deq is None else net.deq.config
    plain = representation(net.config, dataclasses.replace(deq, norm_type="none"), nnx.Rngs(0))
    theirs = _variables(net)
    for name, variable in _variables(plain).items():
        variable[...] = theirs[name][...]
    for layer, effective in zip(plain.layers, net.weights(), strict=True):
        layer.kernel[...] = effective.kernel
    return plain


def _variables(net: nnx.Module) -> dict[str, nnx.Variable]:
    """Every array that values depend on, by its path."""
    found = nnx.to_flat_state(nnx.state(net, (nnx.Param, Frequencies)))
    return {"/".join(map(str, path)): _at(net, path) for path, _ in found}


def _at(net, path):
    for part in path:
        net = net[part] if isinstance(part, int) else getattr(net, part)
    return net


def _parameters(net) -> dict[str, np.ndarray]:
    return {name: np.asarray(variable[...]) for name, variable in _variables(net).items()}


def _stacked(parameters: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([one[name] for one in parameters]) for name in parameters[0]}


def _is_large(name: str, stacked: np.ndarray, config: INRConfig) -> bool:
    return name.endswith("kernel") and stacked.ndim == 3 and stacked.shape[1] != config.n_in


def _rounded(name, kernels, dtype) -> dict[str, np.ndarray]:
    if dtype != "int8":
        return {name: kernels.astype(dtype)}
    scale = np.max(np.abs(kernels), axis=1, keepdims=True) / 127
    steps = np.rint(kernels / np.where(scale > 0, scale, 1)).astype(np.int8)
    return {name: steps, f"{name}.scale": scale.astype(np.float32)}


def _restored(name, arrays) -> np.ndarray:
    value = arrays[name].astype(np.float32)
    return value * arrays[f"{name}.scale"] if f"{name}.scale" in arrays else value
