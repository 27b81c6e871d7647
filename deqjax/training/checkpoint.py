"""Checkpoints: saved in the background, committed by a rename, restorable onto other devices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from deqjax.training.errors import UserError
from deqjax.training.state import TrainState, from_nested_dict, named_leaves, nested_dict, to_nested_dict

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one working directory: the latest, and the best by one metric of the validation."""

    def __init__(self, workdir, keep: int = 1, metric: str = "loss", mode: str = "min"):
        """Args:
        workdir: the run's directory.
        keep: how many of the best to keep beside the latest.
        metric: by which they are ranked, one that `Task.evaluate` returns.
        mode: "min" or "max".
        """
        # Orbax logs dozens of lines per save.
        absl_logging.set_verbosity(absl_logging.ERROR)
        self.directory = Path(workdir).absolute() / FOLDER
        policies = ocp.checkpoint_managers
        # A checkpoint that was ranked by another metric counts as the worst.
        value = lambda metrics: metrics.get(metric, float("inf") if mode == "min" else -float("inf"))  # noqa: E731
        best = policies.BestN(
            get_metric_fn=value,
            reverse=mode == "min",
            n=keep,
            keep_checkpoints_without_metrics=False,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
                    best_fn=value,
                    best_mode=mode,
                ),
                item_names=("state", "meta"),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot keep checkpoints in {self.directory}: {_first_line(error)}.") from error

    def latest_step(self) -> int | None:
        """Of the last committed checkpoint."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Of the best evaluated checkpoint."""
        try:
            return self._manager.best_step()
        except (OSError, ValueError) as error:
            raise UserError(f"The metrics kept in {self.directory} cannot be read: {_first_line(error)}.") from error

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts to save; an earlier checkpoint goes only after this one is committed.

        Raises:
          UserError: this save or the one before failed, most likely for want of space.
        """
        if step in self._manager.all_steps():
            return
        # The running sums are few and change with what a task reports, so they travel outside the checked structure.
        sums = {name: [float(x) for x in pair] for name, pair in jax.device_get(state.sums).items()}
        items = {
            "state": ocp.args.StandardSave(to_nested_dict(state.replace(sums={}))),
            "meta": ocp.args.JsonSave(meta | {"sums": sums}),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def meta(self, step: int) -> dict:
        """What was saved beside the state: task, config, fingerprint."""
        return read_meta(self.directory, step)

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state of a step, each array placed as `shardings` says.

        Raises:
          UserError: the checkpoint is of another model, or damaged.
        """
        sums, shapes, shardings = shapes.sums, shapes.replace(sums={}), shardings.replace(sums={})
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                saved = _stored_leaves(reader, self.directory / str(step) / "state")
        except Exception as error:
            raise self._damaged(step, error) from error
        _check_same(self.directory / str(step), saved, named_leaves(shapes))
        try:
            nested = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(to_nested_dict(target)))
            ).state
        except Exception as error:
            raise self._damaged(step, error) from error
        state = from_nested_dict(target, nested)
        saved_sums = self.meta(step).get("sums", {})
        if set(saved_sums) != set(sums):
            # The task reports other metrics than it did: count them from here.
            saved_sums = dict.fromkeys(sums, (0.0, 0.0))
        sharding = shardings.step
        place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), sharding)  # noqa: E731
        return state.replace(
            sums={name: tuple(place(x, like) for x, like in zip(saved_sums[name], sums[name], strict=True)) for name in sums}
        )

    def close(self) -> None:
        """Waits, then lets go."""
        self.wait()
        self._manager.close()

    def _save_failed(self, error) -> UserError:
        latest = committed_steps(self.directory.parent)
        kept = f"The checkpoint of step {latest[-1]} is intact" if latest else "There is no earlier checkpoint"
        return UserError(
            f"Saving a checkpoint to {self.directory} failed, so the run stops here: {_first_line(error)}. {kept}. Once there "
            "is space (or with another --workdir) the same command goes on from there."
        )

    def _damaged(self, step, error) -> UserError:
        others = [other for other in committed_steps(self.directory.parent) if other != step]
        instead = f"the run goes on from step {others[-1]}" if others else "the run starts anew"
        return UserError(
            f"The checkpoint {self.directory / str(step)} cannot be read: {_first_line(error)}. Remove that folder and "
            f"{instead}."
        )


def load_params(workdir, step: int | None = None) -> dict:
    """The parameters of a checkpoint as nested dicts of NumPy arrays; needs neither the model nor its devices.

    Args:
      workdir: the run's directory.
      step: which checkpoint; default the latest.

    Raises:
      UserError: there is none.
    """
    return load_arrays(workdir, lambda path: path[0] == "params", step).get("params", {})


def load_arrays(workdir, wanted: Callable[[tuple[str, ...]], bool], step: int | None = None) -> dict:
    """The leaves of a checkpoint whose path is wanted, like `load_params`."""
    steps = committed_steps(workdir)
    directory = Path(workdir).absolute() / FOLDER
    if not steps or (step is not None and step not in steps):
        there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"No checkpoint{'' if step is None else f' of step {step}'} in {directory}: {there}.")
    folder = directory / str(steps[-1] if step is None else step) / "state"
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            leaves = _stored_leaves(reader, folder)
            item = nested_dict({path: leaf for path, leaf in leaves.items() if wanted(path)})
            if not item:
                return {}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            return reader.restore(folder, args=args)
    except Exception as error:
        raise UserError(f"The checkpoint {folder.parent} cannot be read: {_first_line(error)}.") from error


def read_meta(directory, step: int) -> dict:
    """The metadata of one checkpoint."""
    path = Path(directory) / str(step) / "meta" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"The checkpoint {path.parent.parent} cannot be read: {_first_line(error)}.") from error


def fill(shapes: Any, shardings: Any, values: dict, source: str) -> Any:
    """A tree like `shapes` of the arrays in nested dicts `values`, placed.

    Raises:
      UserError: they belong to another model.
    """
    _check_same(source, named_leaves(values), named_leaves(shapes))
    tree = from_nested_dict(shapes, to_nested_dict(values))

    def place(value, like, sharding):
        is_random_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.device_put(value if is_random_key else np.asarray(value, like.dtype), sharding)

    return jax.tree.map(place, tree, shapes, shardings)


def _check_same(source, saved: dict, wanted: dict) -> None:
    """Compares names and shapes of leaves; dtypes are converted."""

    def shown(leaves, path):
        return list(leaves[path].shape) if path in leaves else "absent"

    def shape(leaf):
        return tuple(leaf.shape or ())

    # What holds nothing is not stored.
    saved, wanted = ({path: leaf for path, leaf in leaves.items() if 0 not in shape(leaf)} for leaves in (saved, wanted))
    differing = [
        path
        for path in sorted(saved.keys() | wanted.keys())
        if path not in saved
        or path not in wanted
        # A random key's shape is stored with the words of the key.
        or (not jax.dtypes.issubdtype(wanted[path].dtype, jax.dtypes.prng_key) and shape(saved[path]) != shape(wanted[path]))
    ]
    if differing:
        # The optimiser's copies of a parameter differ with it: name the parameters first.
        differing.sort(key=lambda path: path[0] == "opt")
        listed = "; ".join(
            f"{'/'.join(path)}: {shown(saved, path)} there, {shown(wanted, path)} here" for path in differing[:4]
        )
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"The checkpoint {source} is of another model or optimiser: {listed}{more}. Use the config it was made with, or "
            "another --workdir."
        )


def committed_steps(workdir) -> list[int]:
    """The steps whose checkpoints in a run's directory are complete."""
    directory = Path(workdir).absolute() / FOLDER
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def _stored_leaves(reader, folder) -> dict:
    metadata = reader.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError("its list of arrays is missing or damaged")
    return named_leaves(metadata.tree)


def _first_line(error) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
