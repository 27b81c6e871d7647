"""Golden cases: what the original PyTorch systems computed, and how to compare with it."""

import dataclasses
import json
import pathlib

import jax
import numpy as np


@dataclasses.dataclass
class Case:
    """One JSON file with its arrays."""

    path: pathlib.Path
    meta: dict
    arrays: dict

    @classmethod
    def load(cls, path):
        path = pathlib.Path(path)
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(path, json.loads(path.read_text()), arrays)

    def group(self, prefix: str) -> dict:
        """The arrays under `prefix/`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: a for name, a in self.arrays.items() if name.startswith(prefix + "/")}

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        return self.arrays[name]


def close(got, want, *, rtol=1e-8, atol=None, what=""):
    """Agreement relative to the largest reference entry, so that an entry near zero is not held to its own digits."""
    got = np.asarray(jax.device_get(got), np.float64)
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    scale = np.max(np.abs(want), initial=0.0)
    tolerance = rtol * scale if atol is None else atol
    worst = np.max(np.abs(got - want), initial=0.0)
    assert worst <= tolerance + 1e-300, f"{what}: off by {worst:.3g}, allowed {tolerance:.3g} (largest entry {scale:.3g})"


# Residuals below this are roundoff of states of order one.
ROUNDOFF = 1e-14


def trace_close(got, want, what="", absolute=None):
    """Residual traces: tiny residuals amplify roundoff, so a part of the first one is always allowed.

    A step that multiplies a sample's residual a hundredfold divided by almost nothing, and multiplied roundoff just as
    much; from there on that sample's trace says nothing (its result is compared all the same).
    Pass the `absolute` residuals along with relative ones, to find such steps.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    absolute = want if absolute is None else absolute
    jump = np.cumsum(np.pad(absolute[:, 1:] > 100 * absolute[:, :-1], ((0, 0), (1, 0))), axis=1) > 0
    allowed = 1e-9 * np.abs(want[:, :1]) + 1e-6 * np.abs(want) + ROUNDOFF
    excess = np.where(jump, 0, np.abs(got - want) - allowed)
    assert np.all(excess <= 0), f"{what}: exceeds the allowed difference by {excess.max():.3g}"
