"""Where a run begins: at its own checkpoint, at another's, at given weights, or from scratch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from deqjax.nn.variables import AdjointProbe, BatchVariable
from deqjax.training.checkpoint import Checkpoints, committed_steps, fill, load_arrays, load_params
from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh
from deqjax.training.state import TrainState, leaf_path, named_leaves, to_nested_dict
from deqjax.training.step import Program, prepare
from deqjax.training.task import Task


def start(task: Task, config: Mapping, checkpoints: Checkpoints, program: Program) -> TrainState:
    """The state to begin with: own checkpoint > config.resume > config.init_from > scratch; said aloud."""
    if (step := checkpoints.latest_step()) is not None:
        return restore(task, config, checkpoints, step, program)
    if config.get("resume"):
        if not committed_steps(config["resume"]):
            raise UserError(f"config.resume={config['resume']!r} has no checkpoint; it must be the --workdir of a run.")
        other = Checkpoints(config["resume"])
        state = restore(task, config, other, other.latest_step(), program)
        other.close()
        return state
    if config.get("init_from"):
        return initialise_from(task, config, config["init_from"], program)
    say("Starting from scratch.")
    return program.init()


def restore(task: Task, config: Mapping, checkpoints: Checkpoints, step: int, program: Program) -> TrainState:
    """A checkpoint of this task, on this data; says what else has changed since."""
    saved, now = checkpoints.meta(step), json.loads(json.dumps(meta(task, config)))
    where = f"The checkpoint {checkpoints.directory / str(step)}"
    if saved["task"] != now["task"]:
        raise UserError(f"{where} is of the task {saved['task']}, not {now['task']}. Choose another --workdir.")
    _check_data(checkpoints, step, now)
    state = checkpoints.restore(step, program.shapes, program.shardings)
    say(f"Restored step {step} from {checkpoints.directory}.")
    before, after = named_leaves(saved["config"]), named_leaves(now["config"])
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            say(f"  config.{'.'.join(path)} was {before.get(path)}, is {after.get(path)}")
    return state


def initialise_from(task: Task, config: Mapping, path: str, program: Program) -> TrainState:
    """A new run with the best weights of another run, or with those of a file that the task can import."""
    state = program.init()
    if Path(path).is_dir():
        return _inherit(task, config, state, program, path)
    if not Path(path).exists():
        raise UserError(f"config.init_from={path!r}: there is no such file or run.")
    if not hasattr(task, "import_checkpoint"):
        raise UserError(f"config.init_from={path!r}: this task imports no files; give the --workdir of another run.")
    model = program.model(state)
    task.import_checkpoint(path, model)
    _, params, _, variables = nnx.split(model, nnx.Param, AdjointProbe, ...)
    loaded = {"params": to_nested_dict(params), "variables": to_nested_dict(variables)}
    shapes, shardings = ({"params": s.params, "variables": s.variables} for s in (program.shapes, program.shardings))
    say(f"Initialised from {path}.")
    return state.replace(**fill(shapes, shardings, loaded, path))


def _inherit(task: Task, config: Mapping, state: TrainState, program: Program, workdir: str) -> TrainState:
    """All parameters of another run, and its statistics; not its memories and random streams, nor statistics of new parts."""
    if not committed_steps(workdir):
        raise UserError(f"There is no checkpoint in {workdir}.")
    checkpoints = Checkpoints(workdir, metric=config.get("best_metric", "loss"), mode=config.get("best_mode", "min"))
    best = checkpoints.best_step()
    step = checkpoints.latest_step() if best is None else best
    _check_data(checkpoints, step, meta(task, config))
    checkpoints.close()
    params = fill(program.shapes.params, program.shardings.params, load_params(workdir, step), workdir)
    current, own = named_leaves(state.variables), set()
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    for path, variable in jax.tree_util.tree_flatten_with_path(state.variables, is_leaf=is_variable)[0]:
        if isinstance(variable, BatchVariable | nnx.RngState):
            own |= {leaf_path(path) + inner for inner in named_leaves(variable)}
    saved = load_arrays(workdir, lambda path: path[0] == "variables" and path[1:] in current and path[1:] not in own, step)
    saved = {path[1:]: array for path, array in named_leaves(saved).items()}

    def choose(path, old):
        new = saved.get(leaf_path(path))
        return old if new is None or new.shape != old.shape else jax.device_put(np.asarray(new, old.dtype), old.sharding)

    say(f"Took the weights of step {step} from {workdir}.")
    return state.replace(params=params, variables=jax.tree_util.tree_map_with_path(choose, state.variables))


def trained_model(task: Task, config: Mapping, workdir) -> nnx.Module:
    """The model with the run's best weights, or else those of `config.init_from`; no optimiser, memory or clock.

    Raises:
      UserError: there are none.
    """
    program = prepare(task, config, make_mesh(config.get("mesh")))
    source = str(workdir) if committed_steps(workdir) else config.get("init_from")
    if not source:
        raise UserError(
            f"There is no checkpoint in {Path(workdir).absolute()}. Train first (--mode train), or name the weights to use "
            "(--workdir of a finished run, or --config.init_from)."
        )
    return program.model(initialise_from(task, config, source, program))


def _check_data(checkpoints: Checkpoints, step: int, now: dict) -> None:
    """Refuses weights of the same task that were trained on other data, such as another vocabulary."""
    saved = checkpoints.meta(step)
    # As JSON gives it back.
    fingerprint = json.loads(json.dumps(now["fingerprint"]))
    if saved["task"] == now["task"] and saved["fingerprint"] != fingerprint:
        raise UserError(
            f"The checkpoint {checkpoints.directory / str(step)} was made with other data (its fingerprint differs). Choose "
            "another --workdir, or the data it was made with."
        )


def meta(task: Task, config: Mapping) -> dict:
    """What a checkpoint says about itself."""
    resolved = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        "task": getattr(task, "name", type(task).__name__),
        "config": resolved,
        "fingerprint": getattr(task, "fingerprint", None),
    }


def write_config(resolved: dict, workdir) -> None:
    """The config of the run that has just begun, or gone on, as `workdir/config.json`."""
    if jax.process_index() == 0:
        path = Path(workdir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(resolved, indent=2, default=str) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
