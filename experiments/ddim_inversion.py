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

    Saves the latents and the pictures before and after. Seconds are those of optimisation steps, without compilation. Errors
    are those of the images that the sequential sampler makes of the latents, however loosely the equilibrium was solved.

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
            options = {"solver": solver_of(config, len(chain), c.tol), "window": config.sampler.window}
            options |= {"optimizer": optax.adam(c.learning_rate), "warm_start": c.warm_start}
            return inversion(system, target, noise, gradient=gradient, **options)

        state = sampler.compiled(lambda model, x, method=method: method(model)[0](x))(x_T)
        update = sampler.compiled(lambda model, state, method=method: method(model)[1](state))

        def error(state):
            return float(jnp.sum(jnp.square(sampled(state.best_x_T, noise)[:, -1] - target)) / len(target))

        rows.append({"gradient": gradient, "first": error(state)})
        history, marks, state = _optimise(update, error, state, c)
        refuse_non_finite(state.failed_at, chain)
        rows[-1] |= _costs(history, len(target)) | marks | {"at the end": error(state)}
        rows[-1]["RMS per pixel"] = float(np.sqrt(rows[-1]["at the end"] / target[0].size))
        say(f"{gradient}: {rows[-1]['steps']} steps, error {rows[-1]['at the end']:.4g}")
        trajectory = np.asarray(sampled(state.best_x_T, noise))
        pictures.append(trajectory[:, -1])
        files.append(out / f"inverted_{gradient}.npz")
        arrays = {"x_T": state.best_x_T, "image": trajectory[:, -1], "target": target, "trajectory": trajectory}
        np.savez(files[-1], **arrays, **({} if noise is None else {"noise": noise}))
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


def _optimise(update, error, state, c):
    """Runs until the budget of steps or seconds is spent, or every image is good enough.

    Returns:
      The history, `(seconds, of all CPU cores, calls, evaluations)` of every step; the errors at the marks; the last state.
    """
    jax.block_until_ready(update(state))  # compiles
    history, marks, seconds, cpu_seconds = [], dict.fromkeys((f"after {at:g} s" for at in c.at_seconds), "-"), 0.0, 0.0
    for _ in range(c.steps):
        before = state
        began, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(update(state))
        seconds, cpu_before = seconds + time.perf_counter() - began, cpu_seconds
        cpu_seconds += time.process_time() - cpu
        for name, at in zip(marks, c.at_seconds, strict=True):
            if cpu_before < at <= cpu_seconds:
                marks[name] = error(before)
        history.append((seconds, cpu_seconds, int(state.calls), int(state.evaluations)))
        good = np.max(np.asarray(state.best_loss)) < c.stop_below
        if (c.seconds and seconds >= c.seconds) or good or np.any(np.asarray(state.failed_at) >= 0):
            break
    return history, marks, state


def _costs(history, n_images) -> dict:
    seconds, cpu_seconds, calls, evaluations = (np.array(column) for column in zip(*history, strict=True))
    row = {"steps": len(history), "seconds": float(seconds[-1]), "of all cores": float(cpu_seconds[-1])}
    row["calls in sequence per step"] = float(np.mean(calls))
    return row | {"evaluations per step and image": float(np.mean(evaluations) / n_images)}
