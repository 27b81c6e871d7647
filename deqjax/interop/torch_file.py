"""Reads and writes checkpoint files: `.safetensors`, and PyTorch's `.pt` / `.pth`, without running code from the file.

PyTorch itself is not needed to read: a `.pt` file is a zip archive of raw storages and one pickle that says how tensors
view them; before PyTorch 1.6 the storages followed the pickle in one file. The pickle is read by an unpickler that knows the
few constructors of tensors and refuses everything else.
"""

import collections
import contextlib
import os
import pathlib
import pickle
import zipfile
from collections.abc import Mapping

import numpy as np

from deqjax.data.errors import DataError

_EXTRA = 'pip install "deqjax[{}]"'


class CheckpointFileError(DataError):
    """A file that is not a checkpoint, or not one that can be read safely."""


_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_checkpoint(path) -> dict[str, np.ndarray]:
    """The flat state dict in a file: arrays by key.

    A file that holds a dictionary with a `state_dict` or `model` entry gives that entry; one that holds a list of dictionaries,
    as trainers of diffusion models write with the averaged weights last, gives the last.

    Raises:
      CheckpointFileError: missing, truncated, of another kind, or asking for anything but tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointFileError(f"there is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not zipfile.is_zipfile(path):
        return _flat(_read_older(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointFileError(f"{path} is a zip archive but holds no PyTorch checkpoint (no data.pkl).")
            with archive.open(pickles[0]) as file:
                content = _TensorUnpickler(file, archive, pickles[0].removesuffix("data.pkl")).load()
    except CheckpointFileError:
        raise
    except Exception as error:  # what a damaged archive or pickle raises has no end
        raise CheckpointFileError(f"{path} cannot be read as a checkpoint of tensors: {error}.") from None
    return _flat(content, path)


def write_checkpoint(path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `.safetensors` or, with PyTorch installed, as `.pt` / `.pth`; all of it or nothing.

    Raises:
      CheckpointFileError: another ending, a package is not installed, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointFileError(f"{path}: a checkpoint file ends in .safetensors, .pt or .pth.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            arrays = {key: np.ascontiguousarray(value) for key, value in state_dict.items()}
            temporary.write_bytes(_import("safetensors.numpy", "interop").save(arrays))
        else:
            torch = _import("torch", "torch")
            torch.save({key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        raise CheckpointFileError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of files before PyTorch 1.6


def _read_older(path):
    """The content of a file of five pickles, the fourth of which is the content, and raw storages in the order of the fifth."""
    try:
        with open(path, "rb") as file:
            if [_TensorUnpickler(file).load() for _ in range(2)] != [_MAGIC, _VERSION]:
                raise pickle.UnpicklingError("it does not begin as one")
            _TensorUnpickler(file).load()  # of the machine
            start, size = file.tell(), path.stat().st_size
            # Read twice, for the storages come last: first to learn how large they are.
            sizes = _OlderUnpickler(file, size)
            sizes.load()
            storages = {}
            for key in _TensorUnpickler(file).load():
                like = sizes.storages[key]
                count = int.from_bytes(file.read(8), "little")
                raw = file.read(like.nbytes)
                if count != like.size or len(raw) != like.nbytes:
                    raise pickle.UnpicklingError("it is truncated")
                storages[key] = np.frombuffer(raw, like.dtype)
            file.seek(start)
            return _OlderUnpickler(file, size, storages).load()
    except Exception as error:  # what a damaged pickle raises has no end
        raise CheckpointFileError(
            f"{path} is not a PyTorch checkpoint, or a damaged one ({error}). If PyTorch can load it, save it again or as "
            ".safetensors."
        ) from None


def _flat(content, path):
    if isinstance(content, list):
        is_state = lambda part: isinstance(part, Mapping) and any(isinstance(x, np.ndarray) for x in part.values())  # noqa: E731
        content = next(filter(is_state, reversed(content)), content)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointFileError(f"{path} holds a {type(content).__name__}, not a state dict.")
    arrays = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
    if not arrays:
        raise CheckpointFileError(f"{path} holds no tensors.")
    return arrays


def _read_safetensors(path):
    try:
        return _import("safetensors.numpy", "interop").load_file(path)
    except CheckpointFileError:
        raise
    except Exception as e:  # its error type is private to the library
        raise CheckpointFileError(f"{path} is not a readable .safetensors file: {e}") from None


def _import(name, extra):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise CheckpointFileError(f"this needs {name.split('.')[0]}: {_EXTRA.format(extra)}") from None


class _Storage(str):
    """The name of a storage class, standing for its dtype."""


class _TensorUnpickler(pickle.Unpickler):
    """Builds NumPy arrays where the file says tensors; any other global is refused."""

    def __init__(self, file, archive=None, root=""):
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name.endswith("Storage"):
            return _Storage(name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a state dict; nothing was run")

    def persistent_load(self, pid):
        kind, storage, key, _, _ = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        raw = self._archive.read(f"{self._root}data/{key}")
        if storage == "BFloat16Storage":
            # bfloat16 is the upper half of a float32.
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        if storage not in _STORAGE_DTYPES:
            raise pickle.UnpicklingError(f"tensors of {storage} are not supported")
        return np.frombuffer(raw, _STORAGE_DTYPES[storage])


class _OlderUnpickler(_TensorUnpickler):
    """Takes storages from a dictionary; without one, notes empty ones of the right sizes."""

    def __init__(self, file, file_size: int, storages: dict | None = None):
        super().__init__(file)
        self._file_size, self._known, self.storages = file_size, storages is not None, dict(storages or {})

    def persistent_load(self, pid):
        kind, storage, key, _, size, *view = pid
        if kind != "storage" or storage not in _STORAGE_DTYPES or any(view):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        if not self._known:
            if size * np.dtype(_STORAGE_DTYPES[storage]).itemsize > self._file_size:
                raise pickle.UnpicklingError("it is truncated")
            self.storages[key] = np.zeros(size, _STORAGE_DTYPES[storage])
        return self.storages[key]


def _view(storage, offset, size, stride, *_):
    """A strided view of a storage, copied; checked to lie inside it."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.size:
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
