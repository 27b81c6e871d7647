"""The training loop, one for all experiments, to be read from top to bottom.

Read from the config (default in brackets): seed, steps, mesh [all devices on `data`], optimizer (see
`deqjax.training.optimizer`), log_every [100], eval_every [0: at the end], checkpoint_every [eval_every], keep [1],
best_metric ["loss"], best_mode ["min"], max_bad_steps [20], resume and init_from [""], tensorboard [True].
"""

import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.training.checkpoint import Checkpoints
from deqjax.training.console import console_line, duration, say, shown
from deqjax.training.errors import UserError
from deqjax.training.mesh import batch_devices, make_mesh, place_batch
from deqjax.training.metrics import MetricWriter, Progress, Sums
from deqjax.training.optimizer import learning_rate
from deqjax.training.signals import StopFlag
from deqjax.training.start import meta, start, trained_model, write_config
from deqjax.training.state import TrainState, count_parameters
from deqjax.training.step import prepare, step_function
from deqjax.training.task import Task


def train(task: Task, config: Mapping, workdir) -> TrainState:
    """Trains, from where `workdir` left off, up to `config.steps`; then evaluates.

    Returns:
      The last state.

    Raises:
      UserError: something that the user can mend, in the setting up, in the data, or a run that diverged.
    """
    # Set-up ----------------------------------------------------------------------------------------------------------
    total_steps, log_every = int(config["steps"]), max(int(config.get("log_every", 100)), 1)
    eval_every = int(config.get("eval_every", 0))
    checkpoint_every = int(config.get("checkpoint_every", eval_every))
    max_bad_steps = int(config.get("max_bad_steps", 20))
    metric, mode = config.get("best_metric", "loss"), config.get("best_mode", "min")

    # Data, model and optimiser shapes --------------------------------------------------------------------------------
    stream = task.data("train")
    mesh = make_mesh(config.get("mesh"))
    first_batch = place_batch(mesh, stream.batch(0))
    program = prepare(task, config, mesh, first_batch)
    rows = max((x.shape[0] for x in first_batch.values() if x.ndim), default=0)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"Devices: {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} process(es)")
    say(f"Batch: {rows} in all, {rows // batch_devices(mesh)} per device")
    say(f"Parameters: {count_parameters(program.shapes.params):,}")
    say(f"Working directory: {Path(workdir).absolute()}")

    # Restore: own checkpoint > resume > initialise from > scratch ----------------------------------------------------
    checkpoints = Checkpoints(workdir, int(config.get("keep", 1)), metric, mode)
    state = start(task, config, checkpoints, program)
    write_config(meta(task, config)["config"], workdir)
    first_step = step = int(state.step)
    best = float(state.best)
    if step >= total_steps:
        say(f"The run is finished: {step} of {total_steps} steps are done. Evaluating.")

    # Step function ---------------------------------------------------------------------------------------------------
    update = jax.jit(
        step_function(task, config, program, log_every), donate_argnums=0, out_shardings=(program.shardings, None, None)
    )
    schedule = learning_rate(config["optimizer"])
    seen_batches: set = set()

    # Loop ------------------------------------------------------------------------------------------------------------
    writer = MetricWriter(workdir, step, bool(config.get("tensorboard", True)))
    progress = Progress(total_steps)
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
        say(console_line(at, total_steps, values, speed, getattr(task, "items_per_step", None)))
        if in_a_row > max_bad_steps:
            latest = checkpoints.latest_step()
            kept = "there is no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is kept"
            raise UserError(
                f"Training diverged: the loss or its gradient was not finite in the last {in_a_row:.0f} steps, up to step "
                f"{at}; {kept}. Lower config.optimizer.learning_rate, clip the gradient (config.optimizer.clip), or solve "
                "the equilibrium more tightly. config.max_bad_steps is how many such steps in a row are put up with."
            )

    try:
        with StopFlag() as stop:
            while True:
                # Evaluate and save before the next batch is taken: state, clock and data position agree.
                at_end, moved = step >= total_steps, step > first_step
                result: dict[str, float] = {}
                if moved and (at_end or (eval_every and step % eval_every == 0)):
                    log_pending()
                    with progress.pause():
                        result = task.evaluate(program.model(state), "valid") or {}
                    writer.write(step, {f"valid/{name}": value for name, value in result.items()})
                    say(f"[{step}] valid: {shown(result)}")
                value = result.get(metric)
                ranked = {metric: float(value)} if value is not None and np.isfinite(value) else None
                if improved := ranked is not None and (value < best if mode == "min" else value > best):
                    best = float(value)
                    state = state.replace(best=jax.device_put(jnp.asarray(best, float), program.shardings.best))
                stopping = not at_end and stop.requested(step)
                due = checkpoint_every and step % checkpoint_every == 0
                if moved and (due or improved or at_end or stopping):
                    log_pending()
                    with progress.pause():
                        checkpoints.save(step, state, meta(task, config), ranked)
                if at_end or stopping:
                    break

                batch = place_batch(mesh, stream.batch(step))
                signature = tuple((name, x.shape) for name, x in sorted(batch.items()))
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
                if step % log_every == 0 or step == total_steps:
                    pending = (step, sums, report)
        checkpoints.wait()
        if stopping:
            say(f"{stop.name}: saved step {step} of {total_steps}. The same command goes on from there.")
            return state

        # Final evaluation --------------------------------------------------------------------------------------------
        best_step = checkpoints.best_step()
        chosen = state
        if best_step is not None and best_step != step:
            chosen = checkpoints.restore(best_step, program.shapes, program.shardings)
        result = task.evaluate(program.model(chosen), "test") or {}
        if result:
            writer.write(step, {f"test/{name}": value for name, value in result.items()})
            say(f"[{int(chosen.step)}] test, weights of step {int(chosen.step)}: {shown(result)}")
        if show := getattr(task, "show", None):
            show(program.model(chosen), Path(workdir))
        return state
    finally:
        # Close -------------------------------------------------------------------------------------------------------
        writer.close()
        checkpoints.close()


def evaluate(task: Task, config: Mapping, workdir) -> dict[str, float]:
    """Evaluates the run's best checkpoint (else its latest, else `config.init_from`) on "valid" and "test".

    Returns:
      The metrics, under `valid/` and `test/`.
    """
    model, results = trained_model(task, config, workdir), {}
    for split in ("valid", "test"):
        if result := task.evaluate(model, split):
            results |= {f"{split}/{name}": float(value) for name, value in result.items()}
            say(f"{split}: {shown(result)}")
    return results
