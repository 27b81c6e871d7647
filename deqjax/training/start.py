"""Where a run begins: at its own checkpoint, at another's, at given weights, or from scratch."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.naming import leaf_path
from deqjax.data.errors import DataError
from deqjax.nn.variables import AdjointProbe
from deqjax.training.checkpoint import Checkpoints, DamagedCheckpoint, committed_steps, fill, load_arrays
from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh
from deqjax.training.settings import FREE_TO_CHANGE, Settings
from deqjax.training.state import TrainState, kinds_of_state, named_leaves, to_nested_dict
from deqjax.training.step import Program, prepare
from deqjax.training.task import Task


def start(task: Task, config: Mapping, checkpoints: Checkpoints, program: Program, allow_changes: bool = False) -> TrainState:
    """The state to begin with: own checkpoint > config.resume > config.init_from > scratch; said aloud."""
    if checkpoints.steps():
        state, damaged = _restore(task, config, checkpoints, program, allow_changes)
        for error in damaged:
            say(f"{error} It is kept as {checkpoints.set_aside(error.step)}.")
    elif config.get("resume"):
        if not committed_steps(config["resume"]):
            raise UserError(f"config.resume={config['resume']!r} has no checkpoint; it must be the --workdir of a run.")
        other = Checkpoints(config["resume"], metric=config.get("best_metric", "loss"), mode=config.get("best_mode", "min"))
        state, damaged = _restore(task, config, other, program, allow_changes)
        for error in damaged:  # which stay where they are: that run is not this one's
            say(str(error))
        checkpoints.adopt(other, int(state.step))
    elif config.get("init_from"):
        state = initialise_from(task, config, config["init_from"], program)
    else:
        say("Starting from scratch.")
        state = program.init()
    return state


def _restore(task: Task, config: Mapping, checkpoints: Checkpoints, program: Program, allow_changes: bool):
    """The newest sound checkpoint of this task, on this data, with this config; and the errors of newer ones."""
    now = _as_json(meta(task, config))

    def check(step):
        saved, where = checkpoints.meta(step), f"The checkpoint {checkpoints.directory / str(step)}"
        if saved["task"] != now["task"]:
            raise UserError(f"{where} is of the task {saved['task']}, not {now['task']}. Choose another --workdir.")
        _check_data(checkpoints, step, now)
        differing = changes(saved["config"], now["config"], getattr(task, "free_to_change", ()))
        for text, _ in differing:
            say(f"  {text}")
        # Another model cannot go on whatever is allowed.
        checkpoints.check_model(step, program.shapes)
        if refused := [text for text, allowed in differing if not allowed and not allow_changes]:
            raise UserError(
                f"{where} was made with another config: {'; '.join(refused)}. Choose another --workdir, or go on with the "
                "new values by --allow_changes."
            )

    state, damaged = checkpoints.restore_first(checkpoints.steps()[::-1], program.shapes, program.shardings, check)
    before, after = Settings.read(checkpoints.meta(int(state.step))["config"]), Settings.read(config)
    if (before.best_metric, before.best_mode) != (after.best_metric, after.best_mode):
        # What was best by another measure says nothing.
        state = state.replace(best=jnp.full_like(state.best, after.worst), stale=jnp.zeros_like(state.stale))
    say(f"Restored step {int(state.step)} from {checkpoints.directory}.")
    return state, damaged


def changes(before: Mapping, now: Mapping, free=()) -> list[tuple[str, bool]]:
    """What differs between two configs, as text, and whether a run may go on with it all the same.

    It may if the setting (or its section) is one of `FREE_TO_CHANGE` or of `free`, or follows from the number of steps.
    """
    # A setting of the loop that is not given is at its default.
    before, now = (named_leaves(Settings.defaults() | dict(config)) for config in (before, now))
    differing = []
    for path in sorted(before.keys() | now.keys()):
        was, is_ = before.get(path), now.get(path)
        if was == is_:
            continue
        follows = path[-1].endswith("steps") and was == before.get(("steps",)) and is_ == now.get(("steps",))
        if path == ("optimizer", "max_steps") and None not in (was, is_):  # the schedule may end some steps after the run
            follows = was - before[("steps",)] == is_ - now[("steps",)]
        allowed = follows or any(
            path[: n + 1] == tuple(name.split(".")) for name in (*FREE_TO_CHANGE, *free) for n in range(len(path))
        )
        differing.append((f"config.{'.'.join(path)} was {was}, is {is_}", allowed))
    return differing


def initialise_from(task: Task, config: Mapping, path: str, program: Program) -> TrainState:
    """A new run with the best weights of another run, or with those of a file that the task can import."""
    if not Path(path).exists():
        raise UserError(f"config.init_from={path!r}: there is no such file or run.")
    if Path(path).is_dir():
        return _inherit(task, config, program, path)
    if not hasattr(task, "import_checkpoint"):
        raise UserError(f"config.init_from={path!r}: this task imports no files; give the --workdir of another run.")
    state = program.init()
    model = program.model(state)
    task.import_checkpoint(path, model)
    _, params, _, variables = nnx.split(model, nnx.Param, AdjointProbe, ...)
    loaded = {"params": to_nested_dict(params), "variables": to_nested_dict(variables)}
    shapes, shardings = ({"params": s.params, "variables": s.variables} for s in (program.shapes, program.shardings))
    say(f"Initialised from {path}.")
    return _with_weights(state, **fill(shapes, shardings, loaded, path))


def _inherit(task: Task, config: Mapping, program: Program, workdir: str, own: bool = False) -> TrainState:
    """All parameters of a run, their average if it keeps one, and its statistics; not memories and random streams.

    Taken from its best checkpoint that is sound. Statistics that it does not have stay as they are. The data must be those that
    it was trained on; where weights transfer, only if it is this run (`own`) and there are data.
    """
    checkpoints = Checkpoints(workdir, metric=config.get("best_metric", "loss"), mode=config.get("best_mode", "min"))
    state, saved = program.init(), None
    kinds = named_leaves(kinds_of_state(state.variables))

    def wanted(path):
        return path[0] in ("params", "ema") or (path[0] == "variables" and kinds.get(path[1:]) == "own")

    now, transfer = None, getattr(task, "weights_transfer", False)
    if own or not transfer:
        try:
            now = meta(task, config)
        except DataError:
            if not transfer:
                raise
    for step in dict.fromkeys([*checkpoints.best_steps(), *checkpoints.steps()[::-1]]):
        try:
            if now:
                _check_data(checkpoints, step, now)
            saved = load_arrays(workdir, wanted, step)
            break
        except DamagedCheckpoint as error:
            say(str(error))
    if saved is None:
        raise UserError(f"There is no checkpoint in {workdir} that can be read.")
    params = fill(program.shapes.params, program.shardings.params, saved.get("ema") or saved["params"], workdir)
    statistics = named_leaves(saved.get("variables", {}))

    def choose(path, old):
        new = statistics.get(leaf_path(path))
        return old if new is None or new.shape != old.shape else jax.device_put(np.asarray(new, old.dtype), old.sharding)

    say(f"Took the weights of step {step} from {workdir}.")
    if own:  # what they are used with, where that is not what they were trained with
        before = checkpoints.meta(step)["config"]
        for text, allowed in changes(before, _as_json(_resolved(config)), getattr(task, "free_to_change", ())):
            if not allowed:
                say(f"  {text}")
    return _with_weights(state, params, jax.tree_util.tree_map_with_path(choose, state.variables))


def _with_weights(state: TrainState, params, variables) -> TrainState:
    """A new run's state with given weights, where their average begins too."""
    # Copies, for both are donated to the first step.
    return state.replace(params=params, variables=variables, ema=jax.tree.map(jnp.copy, params) if state.ema else ())


def trained_model(task: Task, config: Mapping, workdir) -> nnx.Module:
    """The model with the run's best weights, or those of `config.init_from`; no optimiser, memory or clock.

    Where there are both, the run counts if it began with `config.init_from`: the command is then that of its training.

    Raises:
      UserError: there are none.
    """
    program = prepare(task, config, make_mesh(config.get("mesh")))
    given, trained = config.get("init_from"), bool(committed_steps(workdir))
    if trained and (not given or _began_with(workdir, given)):
        return program.model(_inherit(task, config, program, str(workdir), own=True))
    if trained:
        say(f"The run in {workdir} did not begin with config.init_from={given!r}: these weights are used, not the run's.")
    if not given:
        raise UserError(
            f"There is no checkpoint in {Path(workdir).absolute()}. Train first (--mode train), or name the weights to use "
            "(--workdir of a finished run, or --config.init_from)."
        )
    return program.model(initialise_from(task, config, given, program))


def _began_with(workdir, path: str) -> bool:
    """Whether a run was given these weights, or the path is the run's own."""
    checkpoints, known = Checkpoints(workdir), [str(workdir)]
    for step in checkpoints.steps():
        with contextlib.suppress(DamagedCheckpoint):
            known.append(checkpoints.meta(step)["config"].get("init_from"))
    return Path(path).resolve() in [Path(name).resolve() for name in known if name]


def _check_data(checkpoints: Checkpoints, step: int, now: dict) -> None:
    """Refuses weights of the same task that were trained on other data, such as another vocabulary."""
    saved = checkpoints.meta(step)
    fingerprint = _as_json(now["fingerprint"])
    if saved["task"] == now["task"] and fingerprint is not None and saved["fingerprint"] != fingerprint:
        raise UserError(
            f"The checkpoint {checkpoints.directory / str(step)} was made with other data (its fingerprint differs). Choose "
            "another --workdir, or the data it was made with."
        )


def meta(task: Task, config: Mapping) -> dict:
    """What a checkpoint says about itself."""
    return {
        "task": getattr(task, "name", type(task).__name__),
        "config": _resolved(config),
        "fingerprint": getattr(task, "fingerprint", None),
    }


def _resolved(config: Mapping) -> dict:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _as_json(value):
    """A value as a checkpoint gives it back."""
    return json.loads(json.dumps(value, default=str))


def write_config(resolved: dict, workdir) -> None:
    """The config of the run that has just begun, or gone on, as `workdir/config.json`."""
    if jax.process_index() == 0:
        path = Path(workdir) / "config.json"
        path.with_suffix(".tmp").write_text(json.dumps(resolved, indent=2, default=str) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
