"""What an experiment tells the training loop."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx


@runtime_checkable
class Stream(Protocol):
    """Training batches by number."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's share of batch `step`: arrays `[B_local, ...]` and scalars. A function of seed and step alone.

        Which rows are its share: `deqjax.training.mesh.process_share`.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """A model, its data and its loss.

    Optional attributes, read with a default:
      name: goes into the checkpoint; the class's name by default.
      fingerprint: a JSON value that must be equal for a run to be resumed or evaluated, such as a vocabulary's hash;
        without one, weights that were trained on any data are taken.
      weights_transfer: whether `config.init_from` may name a run with another fingerprint, as for images; by default not.
      items_per_step: `(unit, number)`, e.g. `("tokens", 9000)`, for the speed on the console.
      tied_updates: groups of parameter paths, see `deqjax.optim.optimizer.tie_updates`.
      layout: how large parameters may be split over the mesh axis `model`, see `deqjax.training.layout.Layout`.
      free_to_change: settings, or sections of them, that do not change what training computes: a resumed run may have others.
      import_checkpoint(path, model): puts published weights of another format into the model; `config.init_from` passes
        files to it.
      show(model, workdir): pictures, after the final evaluation.
    """

    config: Any

    def model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A new model. Called inside `jit`."""
        ...

    def data(self, split: str) -> Stream:
        """The stream of a split; the loop asks for "train". Its `cancel()`, if it has one, is called at the run's end."""
        ...

    def loss(self, model: nnx.Module, batch: dict, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict]:
        """The scalar to minimise, a mean over the batch, and metrics as `{name: (sum, count)}`.

        The count of the metric `loss` says over how much it is a mean: `config.accumulate` weighs slices by it.

        May update variables of the model that are not parameters (memories, statistics), keeping shapes and dtypes.
        """
        ...

    def evaluate(self, model: nnx.Module, split: str) -> dict[str, float]:
        """Exact metrics over "valid" or "test"; empty where there is no such split. Host code, may compile inside."""
        ...
