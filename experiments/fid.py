"""Frechet inception distance (Heusel et al. 2017), with a feature network from a local file."""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from deqjax.data.errors import DataError

# Images `[N, H, W, C]`, 8 bits, to features `[N, D]`.
Features = Callable[[np.ndarray], np.ndarray]


def load_features(path: str) -> Features:
    """A feature network.

    Args:
      path: "pixels" (the images themselves: comparable among models of one data set, not with published numbers); a `.py` file
        with a function `features(images)`; a function exported by JAX (`.jax`, the bytes of `jax.export`'s `serialize()`); or a
        TorchScript file (`.pt`), which gets `[N, 3, H, W]` of 8 bits, as NVIDIA's `inception-2015-12-05.pt` expects them.

    Raises:
      DataError: there is no such file, or it cannot be used; so do the features, if the network fails on the images.
    """
    if path == "pixels":
        return lambda images: images.reshape(len(images), -1) / 255
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"eval.features={path!r}: there is no such file. Give a .py file with features(images), a function exported by JAX "
            '(.jax), a TorchScript file (.pt), or "pixels".'
        )
    try:
        network = {".py": _from_python, ".jax": _from_export, ".pt": _from_torchscript}[file.suffix](file)
    except KeyError:
        raise DataError(f"eval.features={path!r}: must end in .py, .jax or .pt.") from None
    except ImportError:
        raise
    except Exception as error:  # somebody else's code and formats
        raise DataError(f"eval.features={path!r} cannot be used: {type(error).__name__}: {error}") from error

    def features(images):
        try:
            found = np.asarray(network(images), np.float64)
        except Exception as error:
            size = "x".join(map(str, images.shape[1:]))
            raise DataError(f"eval.features={path!r} fails on images of {size}: {type(error).__name__}: {error}") from error
        if found.ndim != 2 or len(found) != len(images) or not np.all(np.isfinite(found)):
            shape = f"{list(found.shape)} for {len(images)} images"
            raise DataError(f"eval.features={path!r}: features {shape}, not a row of finite numbers for each.")
        return found

    return features


def _from_python(file):
    spec = importlib.util.spec_from_file_location("feature_network", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.features


def _from_export(file):
    try:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
    except ImportError as error:
        raise ImportError(f'a function exported by JAX needs flatbuffers: pip install "deqjax[vision]" ({error})') from error
    # Called with as many images as it was exported for; None: any number.
    (wanted,) = exported.in_avals
    rows = wanted.shape[0] if isinstance(wanted.shape[0], int) else None
    call = jax.jit(exported.call)

    def features(images):
        n = len(images)
        images = images if rows is None else np.concatenate([images, np.repeat(images[:1], -n % rows, axis=0)])
        parts = np.split(images, len(images) // rows) if rows else [images]
        return np.concatenate([np.asarray(call(part.astype(wanted.dtype))) for part in parts])[:n]

    return features


def _from_torchscript(file):
    try:
        import torch
    except ImportError as error:
        raise ImportError('a TorchScript feature network needs PyTorch: pip install "deqjax[torch]"') from error
    network = torch.jit.load(str(file)).eval()

    def features(images):
        images = np.repeat(images, 3 // images.shape[-1], axis=-1).transpose(0, 3, 1, 2)
        with torch.no_grad():
            images = torch.from_numpy(np.ascontiguousarray(images))
            try:
                result = network(images, return_features=True)
            except RuntimeError:
                result = network(images)
        return result.flatten(1).numpy()

    return features


class Moments:
    """Mean and covariance of features, batch by batch, in float64."""

    def __init__(self):
        self.n, self.total, self.products = 0, 0.0, 0.0

    def add(self, features: np.ndarray) -> "Moments":
        features = np.asarray(features, np.float64)
        self.n += len(features)
        self.total = self.total + features.sum(axis=0)
        self.products = self.products + features.T @ features
        return self

    @classmethod
    def of(cls, features: Features, batches: Iterable[np.ndarray]) -> "Moments":
        moments = cls()
        for images in batches:
            moments.add(features(images))
        return moments

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        return (self.products - self.n * np.outer(self.mean, self.mean)) / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    Raises:
      DataError: there are fewer than two images.
    """
    if min(a.n, b.n) < 2:
        raise DataError(f"a covariance needs two or more images (eval.n, eval.reference), not {min(a.n, b.n)}.")
    # The eigenvalues of S_a S_b are those of a symmetric matrix.
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sum(np.sqrt(np.maximum(shared, 0)))
    return float(np.sum((a.mean - b.mean) ** 2) + trace)
