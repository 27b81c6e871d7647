"""Checkpoints: saved in the background, committed by a rename, restorable onto other devices."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from deqjax.training.errors import UserError
from deqjax.training.integrity import changed, described, is_intact, sealed
from deqjax.training.processes import agree
from deqjax.training.state import TrainState, from_nested_dict, named_leaves, nested_dict, to_nested_dict

FOLDER = "checkpoints"
# Where damaged checkpoints are moved, so that nothing is lost which somebody might mend.
DAMAGED = "damaged"
# The newest, and the one before in case the newest turns out to be damaged.
LATEST = 2


class DamagedCheckpoint(UserError):
    """The checkpoint of a step cannot be read, or is not what was written."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Checkpoints:
    """The checkpoints of one working directory: the latest two, and the best by one metric of the validation."""

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
        self._keep, self._metric, self._sign = keep, metric, 1 if mode == "min" else -1
        self._manager, self._values = None, {}

    def open(self) -> None:
        """Gets ready to save; clears away what a killed process left unfinished.

        Raises:
          UserError: the directory cannot be used.
        """
        if jax.process_index() == 0:
            for leftover in self.directory.glob(".[0-9]*"):  # of an `adopt`
                shutil.rmtree(leftover, ignore_errors=True)
        self._values = {step: self._value(step) for step in self.steps()}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot keep checkpoints in {self.directory}: {_first_line(error)}.") from error

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's question after each save."""
        steps = [info.step for info in checkpoints]
        kept = self._kept(steps)
        return [step in kept for step in steps]

    def _kept(self, steps) -> set[int]:
        """The latest, and the best."""
        ranked = sorted((value, step) for step in steps if (value := self._values.get(step)) is not None)
        return {*steps[-LATEST:], *(step for _, step in ranked[: self._keep])}

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        return committed_steps(self.directory.parent)

    def best_steps(self) -> list[int]:
        """Of the evaluated checkpoints, the best first."""
        ranked = ((value, step) for step in self.steps() if (value := self._value(step)) is not None)
        return [step for _, step in sorted(ranked)]

    def _value(self, step):
        """What a checkpoint is ranked by, less is better; None if it was not evaluated or by another metric."""
        try:
            value = (self.meta(step)["evaluation"] or {}).get(self._metric)
        except DamagedCheckpoint:
            return None
        return None if value is None else self._sign * value

    def save(self, step: int, state: TrainState, meta: dict, evaluation: dict[str, float] | None = None) -> None:
        """Starts to save; an earlier checkpoint goes only after this one is committed.

        Args:
          step: nothing is done if it is saved already, but that an evaluation is added to one without.
          state: the training state.
          meta: to be kept beside it.
          evaluation: the metrics of the validation; None if there was none.

        Raises:
          UserError: this save or the one before failed, most likely for want of space.
        """
        again = step in self._manager.all_steps()
        if again and not (evaluation and self.meta(step)["evaluation"] is None):
            return
        if evaluation and self._metric in evaluation:
            self._values[step] = self._sign * evaluation[self._metric]
        if again:
            self._add_evaluation(step, state, meta | {"evaluation": evaluation})
            return
        # The running sums are few and change with what a task reports, so they travel outside the checked structure.
        sums = {name: [float(x) for x in pair] for name, pair in jax.device_get(state.sums).items()}
        nested = to_nested_dict(state.replace(sums={}))
        meta = sealed(meta | {"sums": sums, "evaluation": evaluation, "arrays": described(nested)})
        items = {"state": ocp.args.StandardSave(nested), "meta": ocp.args.JsonSave(meta)}
        try:
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def _add_evaluation(self, step, state, meta) -> None:
        """Only the metadata are written anew: this may be the one checkpoint that there is."""
        best = {"best": float(state.best), "stale": int(state.stale)}
        meta = {name: value for name, value in self.meta(step).items() if name != "seal"} | meta | best
        agree(True)  # every process has read them
        path = self._metadata(step)
        temporary = path.with_name(f"{path.name}.tmp")
        if jax.process_index() == 0:
            try:
                temporary.write_text(json.dumps(sealed(meta)))
                os.replace(temporary, path)
            except OSError as error:
                raise self._save_failed(error) from error
        steps = self.steps()
        agree(True)  # and knows what is there
        for other in set(steps) - self._kept(steps):
            self._manager.delete(other)

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError if it could not be written."""
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_failed(error) from error

    def meta(self, step: int) -> dict:
        """What was saved beside the state: task, config, fingerprint, evaluation. Raises DamagedCheckpoint."""
        try:
            meta = json.loads(self._metadata(step).read_text())
            if not is_intact(meta):
                raise ValueError("its metadata have changed since they were written")
        except (OSError, ValueError) as error:
            raise self._damaged(step, error) from error
        return meta

    def _metadata(self, step) -> Path:
        return self.directory / str(step) / "meta" / "metadata"

    def check_model(self, step: int, shapes: TrainState) -> dict:
        """The metadata of a step. Raises UserError if it is of another model than one with these shapes."""
        meta = self.meta(step)
        saved = {tuple(name.split("/")): tuple(shape) for name, (_, shape, _) in meta["arrays"].items()}
        check_same(self.directory / str(step), saved, _shapes(shapes.replace(sums={})))
        return meta

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state of a step, each array placed as `shardings` says; the same one in every process.

        Raises:
          UserError: the checkpoint is of another model.
          DamagedCheckpoint: it cannot be read, or differs from what was written.
        """
        meta, folder = self.check_model(step, shapes), self.directory / str(step) / "state"
        sums, shapes, shardings = shapes.sums, shapes.replace(sums={}), shardings.replace(sums={})
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        nested, problem = None, None
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                nested = reader.restore(folder, args=ocp.args.StandardRestore(to_nested_dict(target)))
        except Exception as error:
            problem = error
        if not agree(problem is None):
            raise self._damaged(step, problem or "another process could not read its part of it") from problem
        self._verify(step, nested)
        state = from_nested_dict(target, nested)
        # If the task reports other metrics than it did, they count from here.
        saved_sums = meta["sums"] if set(meta["sums"]) == set(sums) else dict.fromkeys(sums, (0.0, 0.0))
        place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), shardings.step)  # noqa: E731
        # What an evaluation found that was added later.
        late = {name: place(meta[name], getattr(state, name)) for name in ("best", "stale") if name in meta}
        return state.replace(sums={name: tuple(map(place, saved_sums[name], sums[name])) for name in sums}, **late)

    def load(self, step: int, wanted: Callable[[tuple[str, ...]], bool]) -> dict:
        """The leaves of a step whose path is wanted, as nested dicts of NumPy arrays. Raises DamagedCheckpoint."""
        folder = self.directory / str(step) / "state"
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                leaves = named_leaves(reader.metadata(folder).item_metadata.tree)
                item = nested_dict({path: leaf for path, leaf in leaves.items() if wanted(path)})
                if not item:
                    return {}
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
                arrays = reader.restore(folder, args=args)
        except Exception as error:
            raise self._damaged(step, error) from error
        self._verify(step, arrays)
        return arrays

    def _verify(self, step, nested) -> None:
        """Raises DamagedCheckpoint unless the arrays are those that were saved."""
        if names := changed(self.meta(step)["arrays"], described(nested)):
            raise self._damaged(step, f"{len(names)} arrays are not what was written, {names[0]} for one")

    def restore_first(self, steps: list[int], shapes: TrainState, shardings: TrainState, check: Callable = lambda step: None):
        """The first of `steps` that is sound.

        Args:
          steps: in order of preference.
          shapes, shardings: see `restore`.
          check: of a step; raises if it must not be used.

        Returns:
          The state, and the `DamagedCheckpoint` errors of the steps before it.

        Raises:
          DamagedCheckpoint: none of them is sound.
        """
        damaged: list[DamagedCheckpoint] = []
        for step in steps:
            try:
                check(step)
                return self.restore(step, shapes, shardings), damaged
            except DamagedCheckpoint as error:
                damaged.append(error)
        others = "Remove that folder" if len(damaged) == 1 else f"No other is sound either. Remove {self.directory}"
        raise DamagedCheckpoint(f"{damaged[0]} {others} and the run starts anew.", damaged[0].step) from damaged[0]

    def adopt(self, other: "Checkpoints", step: int) -> None:
        """Copies the checkpoint of a step of another run, and its best ones up to there, to this run; before `open`."""
        wanted = dict.fromkeys([step, *[best for best in other.best_steps() if best <= step][: self._keep]])
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            copies = {best: self.directory / f".{best}" for best in wanted}
            for best, copy in copies.items():
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(other.directory / str(best), copy)
            # The one to go on from comes first: whenever this is interrupted, the run begins there.
            for best, copy in copies.items():
                copy.rename(self.directory / str(best))
        agree(True)

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint to where it is in nobody's way; returns where."""
        folder = self.directory.parent / DAMAGED
        taken = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        target = folder / next(name for n in itertools.count() if (name := f"{step}" + f"-{n}" * bool(n)) not in taken)
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        agree(True)
        return target

    def close(self) -> None:
        """Waits, then lets go."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def _save_failed(self, error) -> UserError:
        latest = self.steps()
        kept = f"The checkpoint of step {latest[-1]} is intact" if latest else "There is no earlier checkpoint"
        return UserError(
            f"Saving a checkpoint to {self.directory} failed, so the run stops here: {_first_line(error)}. {kept}. Once there "
            "is space (or with another --workdir) the same command goes on from there."
        )

    def _damaged(self, step, error) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"The checkpoint {self.directory / str(step)} cannot be read: {_first_line(error)}.", step)


def load_params(workdir, step: int | None = None) -> dict:
    """The parameters of a checkpoint as nested dicts of NumPy arrays; needs neither the model nor its devices.

    Args:
      workdir: the run's directory.
      step: which checkpoint; default the latest.

    Raises:
      UserError: there is none, or it is damaged.
    """
    return load_arrays(workdir, lambda path: path[0] == "params", step).get("params", {})


def load_arrays(workdir, wanted: Callable[[tuple[str, ...]], bool], step: int | None = None) -> dict:
    """The leaves of a checkpoint whose path is wanted, like `load_params`."""
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        there = f"there are those of steps {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"No checkpoint{'' if step is None else f' of step {step}'} in {checkpoints.directory}: {there}.")
    return checkpoints.load(steps[-1] if step is None else step, wanted)


def fill(shapes: Any, shardings: Any, values: dict, source: str) -> Any:
    """A tree like `shapes` of the arrays in nested dicts `values`, placed.

    Raises:
      UserError: they belong to another model.
    """
    check_same(source, _shapes(values), _shapes(shapes))
    tree = from_nested_dict(shapes, to_nested_dict(values))

    def place(value, like, sharding):
        is_random_key = jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
        # Of an array that is spread over several processes, none has the whole.
        is_spread = isinstance(value, jax.Array) and not value.is_fully_addressable
        return jax.device_put(value if is_random_key or is_spread else np.asarray(value, like.dtype), sharding)

    return jax.tree.map(place, tree, shapes, shardings)


def check_same(source, saved: dict, wanted: dict) -> None:
    """Compares the shapes of arrays by path; dtypes are converted. Raises UserError."""
    differing = [path for path in sorted(saved.keys() | wanted.keys()) if saved.get(path) != wanted.get(path)]
    shown = lambda shapes, path: list(shapes[path]) if path in shapes else "absent"  # noqa: E731
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


def _shapes(tree) -> dict:
    """Of the arrays that hold anything: the others are not stored."""
    return {path: tuple(leaf.shape) for path, leaf in named_leaves(tree).items() if leaf.size}


def _first_line(error) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
