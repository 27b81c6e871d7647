"""Inversion as a config says: from images to latents, by one or several gradients in turn."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deqjax.data.errors import DataError
from deqjax.data.unlabelled_images import take
from deqjax.models.ddim import UNet, chain_denoiser, encode, inversion, sample_ddim
from deqjax.training.console import say
from experiments.ddim_pictures import write_grid
from experiments.ddim_sampling import Sampler, refuse_non_finite, solver_of, system_of, table

GRADIENTS = ("one_step", "implicit", "sequential")


def invert(config, rates, model: UNet, images) -> str:
    """Finds latents of `config.invert.images` images with each of `config.invert.gradients`; a table of errors against time.

    Saves the latents and the pictures before and after. Seconds are those of optimisation steps, without compilation.

    Raises:
      DataError: there are not so many images.
    """
    c, out = config.invert, Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(config, rates, model, "sequential", c.timesteps or None)
    chain, target = sampler.chain, _targets(config, sampler, images)
    x_T, noise = sampler.latents(range(c.first, c.first + c.images))
    if c.start == "encode":
        x_T = sampler.compiled(lambda model, x: encode(chain_denoiser(model, chain), chain, x))(target)[:, -1]
    # What a latent gives does not depend on how it was found.
    sampled = sampler.compiled(lambda model, x, z: sample_ddim(chain_denoiser(model, chain), chain, x, z).trajectory)
    rows, pictures, files = [], [target], []
    for gradient in c.gradients:

        def method(model, gradient=gradient):
            system = system_of(config, chain, model, sampler.mesh, remat=c.remat)
            options = {"solver": solver_of(config, len(chain)), "window": config.sampler.window, "warm_start": c.warm_start}
            return inversion(system, target, noise, gradient=gradient, optimizer=optax.adam(c.learning_rate), **options)

        state = sampler.compiled(lambda model, x, method=method: method(model)[0](x))(x_T)
        update = sampler.compiled(lambda model, state, method=method: method(model)[1](state))
        history, state = _optimise(update, state, c)
        refuse_non_finite(state.failed_at, chain)
        rows.append({"gradient": gradient, **_summary(history, target, c.at_seconds)})
        trajectory = np.asarray(sampled(state.best_x_T, noise))
        image = trajectory[:, -1]
        error = float(np.mean(np.sum(np.square(image - target), axis=(1, 2, 3))))
        say(f"{gradient}: {rows[-1]['steps']} steps, error {rows[-1]['best']:.4g}; sampled in sequence {error:.4g}")
        pictures.append(image)
        files.append(out / f"inverted_{gradient}.npz")
        arrays = {"x_T": state.best_x_T, "image": image, "target": target, "trajectory": trajectory}
        np.savez(files[-1], loss=state.best_loss, **arrays, **({} if noise is None else {"noise": noise}))
    # A column per image: the target, then what each gradient has found.
    stacked = np.concatenate([np.asarray(p) for p in pictures])
    files.append(write_grid(out / "inversion.png", stacked, columns=len(target)))
    head = (
        f"{len(target)} image(s), {len(chain)} timesteps ({config.sampler.selection}), Adam {c.learning_rate:g}, start: "
        f"{c.start}. Error: squared, summed over an image in [-1, 1], mean over images, of the best latent of each."
    )
    return f"{head}\n\n{table(rows)}\n\nWrote {', '.join(map(str, files))}."


def _targets(config, sampler: Sampler, images):
    """The images to invert, `[B, H, W, C]`: training images, or samples of other latents than the optimisation begins with."""
    c = config.invert
    numbers = range(c.first, c.first + c.images)
    if c.in_distribution:
        outcome = sampler(*sampler.latents([n + 2**31 for n in numbers]))
        refuse_non_finite(outcome.failed_at, sampler.chain)
        # Like any image. Samples of a model that is not fully trained go beyond.
        return jnp.asarray(np.clip(outcome.images, -1, 1))
    if c.first < 0 or numbers.stop > len(images):
        raise DataError(f"invert.first and invert.images ask for images {c.first} to {numbers.stop - 1} of {len(images)}.")
    return jnp.asarray(take(images, numbers).astype(np.float32) / 127.5 - 1)


def _optimise(update, state, c):
    """Runs until the budget of steps or seconds is spent, or every image is good enough.

    Returns:
      The history, `(seconds, of all CPU cores, best losses, calls, evaluations)` of every step, and the last state.
    """
    jax.block_until_ready(update(state))  # compiles
    history, seconds, cpu_seconds = [], 0.0, 0.0
    for _ in range(c.steps):
        began, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(update(state))
        seconds, cpu_seconds = seconds + time.perf_counter() - began, cpu_seconds + time.process_time() - cpu
        best = np.asarray(state.best_loss)
        history.append((seconds, cpu_seconds, best, int(state.calls), int(state.evaluations)))
        if (c.seconds and seconds >= c.seconds) or np.max(best) < c.stop_below or np.any(np.asarray(state.failed_at) >= 0):
            break
    return history, state


def _summary(history, target, at_seconds) -> dict:
    seconds, cpu_seconds, best, calls, evaluations = (np.array(column) for column in zip(*history, strict=True))
    errors = best.mean(axis=1)
    row = {"steps": len(history), "seconds": float(seconds[-1]), "of all cores": float(cpu_seconds[-1])}
    row["calls in sequence per step"] = float(np.mean(calls))
    row["evaluations per step and image"] = float(np.mean(evaluations) / len(target))
    row["first"] = float(errors[0])
    for at in at_seconds:
        done = np.sum(cpu_seconds <= at)
        row[f"after {at:g} s"] = float(errors[done - 1]) if done else "-"
    return row | {"best": float(errors[-1]), "RMS per pixel": float(np.sqrt(errors[-1] / target[0].size))}
