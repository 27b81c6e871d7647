"""The training loop, one for all experiments, to be read from top to bottom. Its settings are in `deqjax.training.settings`."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from deqjax.data.errors import DataError
from deqjax.optim.schedules import learning_rate
from deqjax.training.checkpoint import Checkpoints, DamagedCheckpoint
from deqjax.training.console import console_line, duration, parameter_overview, say, shown
from deqjax.training.errors import UserError
from deqjax.training.lock import locked
from deqjax.training.mesh import batch_devices, make_mesh, place_batch
from deqjax.training.metrics import MetricWriter, Progress, Sums
from deqjax.training.profiling import Profile
from deqjax.training.settings import Settings
from deqjax.training.signals import StopFlag
from deqjax.training.start import meta, start, trained_model, write_config
from deqjax.training.state import TrainState
from deqjax.training.step import prepare, step_function
from deqjax.training.task import Task


def train(task: Task, config: Mapping, workdir, *, allow_changes: bool = False, profile_steps: int = 0) -> TrainState:
    """Trains, from where `workdir` left off, up to `config.steps`; then evaluates.

    Args:
      task: the experiment.
      config: `Settings`, seed, optimizer, and what the task reads.
      workdir: the run's directory; one run at a time uses it.
      allow_changes: go on with a checkpoint although the config is another now.
      profile_steps: trace so many steps, after the first two, to `workdir/profile`.

    Returns:
      The last state.

    Raises:
      UserError: something that the user can mend: settings, data, or a run that diverged.
    """
    # Set-up ----------------------------------------------------------------------------------------------------------
    settings = Settings.read(config)
    with contextlib.ExitStack() as closing:
        closing.enter_context(locked(workdir))
        stop = closing.enter_context(StopFlag())

        # Data, model and optimiser shapes ----------------------------------------------------------------------------
        stream = task.data("train")
        closing.callback(getattr(stream, "cancel", lambda: None))
        mesh = make_mesh(settings.mesh)
        first_batch = place_batch(mesh, stream.batch(0))
        program = prepare(task, config, mesh, first_batch)
        rows = max((x.shape[0] for x in first_batch.values() if x.ndim), default=0)
        axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        say(parameter_overview(program.shapes.params, program.shardings.params))
        say(f"Devices: {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} process(es)")
        slices = Settings.read(config).accumulate  # the task may have chosen it, for the memory that its batches take
        say(f"Batch: {rows} in all, {rows // batch_devices(mesh)} per device, in {slices} slice(s)")
        say(f"Working directory: {Path(workdir).absolute()}")

        # Restore: own checkpoint > resume > initialise from > scratch ------------------------------------------------
        checkpoints = Checkpoints(workdir, settings.keep, settings.best_metric, settings.best_mode)
        state = start(task, config, checkpoints, program, allow_changes)
        checkpoints.open()
        closing.callback(checkpoints.close)
        about = meta(task, config)
        write_config(about["config"], workdir)
        first_step = step = int(state.step)
        # Of a run that stopped because its validation data could not be read.
        owed = step in checkpoints.steps() and checkpoints.meta(step)["evaluation"] is None
        best, stale = float(state.best), int(state.stale)

        # Step function -----------------------------------------------------------------------------------------------
        update = jax.jit(
            step_function(task, config, program, settings.log_every),
            donate_argnums=0,
            out_shardings=(program.shardings, None, None),
        )
        schedule = learning_rate(config["optimizer"])
        seen_batches: set = set()

        # Loop --------------------------------------------------------------------------------------------------------
        writer = MetricWriter(workdir, step, settings.tensorboard, settings.wandb, about["config"])
        closing.callback(writer.close)
        profile = closing.enter_context(Profile(Path(workdir) / "profile", first_step + 2, profile_steps))
        progress = Progress(settings.steps)
        progress.tick(step)
        pending = None

        def log_pending():
            """Writes the line of the last step that is due for one; its numbers are ready or will be soon."""
            nonlocal pending
            if pending is None:
                return
            (at, sums, report), pending = pending, None
            report = {name: float(value) for name, value in jax.device_get(report).items()}
            in_a_row, skipped = report.pop("skipped_in_a_row"), report["skipped"]
            # A skipped update does not move the optimiser's clock.
            rate = float(schedule(at - 1 - skipped + (in_a_row > 0)))
            values = Sums().add(sums).means() | report | {"lr": rate}
            speed = progress.tick(at)
            writer.write(at, {f"train/{name}": value for name, value in values.items()} | speed)
            say(console_line(at, settings.steps, values, speed, getattr(task, "items_per_step", None)))
            if in_a_row > settings.max_bad_steps:
                checkpoints.wait()
                kept = checkpoints.steps()
                raise UserError(
                    f"Training diverged: loss, gradient or update were not finite in the last {in_a_row:.0f} steps, up to step "
                    f"{at}; {f'the checkpoint of step {kept[-1]} is kept' if kept else 'there is no checkpoint yet'}. "
                    "Lower config.optimizer.learning_rate, clip the gradient (config.optimizer.clip), or solve the "
                    "equilibrium more tightly. config.max_bad_steps is how many such steps in a row are put up with."
                )

        def save(evaluation=None):
            log_pending()
            with progress.pause():
                checkpoints.save(step, state, about, evaluation)

        @contextlib.contextmanager
        def reading_data():
            """Data that cannot be read end the run, but cost none of its work."""
            try:
                yield
            except (DataError, OSError) as error:
                # The other processes have no reason to save.
                if step > first_step and jax.process_count() == 1:
                    save()
                    checkpoints.wait()
                raise UserError(
                    f"The data could not be read, so the run stops at step {step}: {error}. Once they can, the same command "
                    f"goes on from step {(checkpoints.steps() or [0])[-1]}."
                ) from error

        while True:
            # Evaluate and save before the next batch is taken: state, clock and data position agree.
            moved, evaluation = step > first_step, None
            at_end = step >= settings.steps or 0 < settings.patience <= stale
            if (moved or owed) and (at_end or (settings.eval_every and step % settings.eval_every == 0)):
                log_pending()
                with progress.pause(), reading_data():
                    result = task.evaluate(program.model(state), "valid") or {}
                writer.write(step, {f"valid/{name}": value for name, value in result.items()})
                say(f"[{step}] valid: {shown(result)}")
                evaluation = {name: float(value) for name, value in result.items() if np.isfinite(value)}
                if settings.best_metric in result:
                    value = evaluation.get(settings.best_metric, np.nan)
                    better = value < best if settings.best_mode == "min" else value > best
                    best, stale = (value, 0) if better else (best, stale + 1)
                    place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), program.shardings.step)  # noqa: E731
                    state = state.replace(best=place(best, state.best), stale=place(stale, state.stale))
                elif result:
                    say(f"config.best_metric={settings.best_metric!r} is not among these, so none is the best.")
                at_end = at_end or 0 < settings.patience <= stale
            stopping = not at_end and stop.requested(step)
            due = settings.checkpoint_every and step % settings.checkpoint_every == 0
            improved = evaluation and settings.best_metric in evaluation and stale == 0
            if (moved or evaluation) and (due or improved or at_end or stopping):
                save(evaluation)
            if at_end or stopping:
                break

            with reading_data():
                batch = place_batch(mesh, stream.batch(step))
            signature = tuple((name, x.shape) for name, x in sorted(batch.items()))
            profile.before(step, state)
            # Nothing moves between host and device behind the loop's back.
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                if signature in seen_batches:
                    state, sums, report = update(state, batch)
                else:
                    # Batches of another shape compile once more.
                    seen_batches.add(signature)
                    with progress.pause():
                        began = time.monotonic()
                        state, sums, report = jax.block_until_ready(update(state, batch))
                    say(f"Compiled the training step and ran it once: {duration(time.monotonic() - began)}")
            # Step n is on its way: now look at step n - 1.
            log_pending()
            step += 1
            if step % settings.log_every == 0 or step == settings.steps:
                pending = (step, sums, report)
        log_pending()
        checkpoints.wait()
        if stopping:
            done = f"saved step {step}" if moved else f"nothing new to save at step {step}"
            say(f"{stop.name}: {done} of {settings.steps}. The same command goes on from there.")
            return state
        if step < settings.steps:
            say(f"Stopped early: the last {stale} evaluations (config.patience) brought no better {settings.best_metric}.")
        elif not moved:
            say(f"The run is finished: {step} of {settings.steps} steps are done. Evaluating.")

        # Final evaluation --------------------------------------------------------------------------------------------
        chosen = state
        for best_step in checkpoints.best_steps():
            if best_step == step:
                break
            try:
                chosen = checkpoints.restore(best_step, program.shapes, program.shardings)
                break
            except DamagedCheckpoint as error:
                say(str(error))
        with reading_data():
            result = task.evaluate(program.model(chosen), "test") or {}
        if result:
            writer.write(step, {f"test/{name}": value for name, value in result.items()})
            say(f"[{step}] test, weights of step {int(chosen.step)}: {shown(result)}")
        if show := getattr(task, "show", None):
            show(program.model(chosen), Path(workdir))
        return state


def evaluate(task: Task, config: Mapping, workdir) -> dict[str, float]:
    """Evaluates the run's best checkpoint (else its latest, else `config.init_from`: see `trained_model`) on both splits.

    Returns:
      The metrics, under `valid/` and `test/`.
    """
    model, results = trained_model(task, config, workdir), {}
    for split in ("valid", "test"):
        if result := task.evaluate(model, split):
            results |= {f"{split}/{name}": float(value) for name, value in result.items()}
            say(f"{split}: {shown(result)}")
    return results
