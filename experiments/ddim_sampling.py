"""Sampling as a config says: chain, solver and network, compiled once."""

import functools
import json
import os
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.solvers import get_solver
from deqjax.core.stats import Status
from deqjax.data.images import read_image, write_image
from deqjax.models.ddim import (
    Chain,
    JointSystem,
    NonFiniteOutput,
    UNet,
    chain_denoiser,
    check_finite,
    sample_ddim,
    sample_ddpm,
    select_timesteps,
    slerp,
    solve_joint,
    with_dtype,
)
from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.integrity import described
from deqjax.training.mesh import batch_devices, batch_sharding, make_mesh, replicated
from deqjax.training.start import changes
from experiments.ddim_pictures import write_filmstrip, write_grid, write_heat_map

METHODS = ("parallel", "sequential", "ddpm")
# Solvers that work in a window and keep a record.
TIME_ORDERED = ("picard", "fixed_point_iter", "triangular_anderson")


class Outcome(NamedTuple):
    """Images `[B, H, W, C]`; calls of the network in sequence; images that it has seen; where it failed, and which samples were
    solved to the tolerance, `[B]`; seconds, by the clock and of all CPU cores, which tells more on a machine shared with others
    (and nothing about an accelerator)."""

    images: np.ndarray
    calls: int
    evaluations: int
    failed_at: np.ndarray
    converged: np.ndarray
    seconds: float
    cpu_seconds: float


class Sampler:
    """The sampler of `config.sampler` for one model.

    The images of a batch, its noise included, depend on the seed and on their numbers alone. On several devices the parallel
    sampler splits the timesteps over them.
    """

    def __init__(self, config, rates: np.ndarray, model: UNet, method: str | None = None, timesteps: int | None = None):
        """Args:
        config: of the run.
        rates: alpha_bar of every timestep.
        model: the network.
        method, timesteps: in place of the config's.

        Raises:
          ValueError: a setting is wrong.
        """
        c = config.sampler
        self.config, self.shape = config, (config.model.image_size, config.model.image_size, config.model.image_channels)
        self.method = method or c.method
        self.chain = chain_of(config, rates, timesteps)
        self.mesh = make_mesh(config.get("mesh"))
        self.solver = solver_of(config, len(self.chain))
        self.compiled = functools.partial(compiled, with_dtype(model, config.dtype), self.mesh)
        self._run = self.compiled(self._sample)

    def system(self, model: UNet) -> JointSystem:
        """The chain with a network, its timesteps spread over the devices."""
        return system_of(self.config, self.chain, model, self.mesh)

    def latents(self, numbers) -> tuple[jax.Array, jax.Array | None]:
        """Latents of images by number, and the noise of their chains, if these have any."""
        noisy = self.method == "ddpm" or np.any(self.chain.sigma)
        return _latents(self.config.sampler.seed, jnp.asarray(numbers, jnp.uint32), self.shape, len(self.chain) * noisy)

    def __call__(self, x_T, noise=None) -> Outcome:
        """Samples. The first call compiles; seconds are those of the call."""
        began, cpu = time.perf_counter(), time.process_time()
        images, calls, evaluations, *per_sample = jax.block_until_ready(self._run(x_T, noise))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        return Outcome(np.asarray(images), int(calls), int(evaluations), *map(np.asarray, per_sample), seconds, cpu_seconds)

    def _sample(self, model, x_T, noise):
        if self.method == "parallel":
            found = solve_joint(self.system(model), x_T, noise, solver=self.solver, window=self.config.sampler.window)
            return found.image, found.calls, found.evaluations, found.failed_at, found.stats.status == Status.CONVERGED
        run = sample_ddpm if self.method == "ddpm" else sample_ddim
        sampled = run(chain_denoiser(model, self.chain), self.chain, x_T, noise)
        calls = jnp.asarray(len(self.chain))
        return sampled.image, calls, calls * x_T.shape[0], sampled.failed_at, sampled.failed_at < 0


def compiled(model: UNet, mesh, function):
    """`function(model, *arguments)` as a compiled function of the arguments, on all devices of a mesh."""
    graph, state = nnx.split(model)
    state = jax.device_put(state, replicated(mesh))
    # The weights are an argument, too: as constants they would be copied into the program.
    run = jax.jit(lambda state, *arguments: function(nnx.merge(graph, state), *arguments))
    return lambda *arguments: run(state, *jax.device_put(arguments, replicated(mesh)))


def chain_of(config, rates, timesteps: int | None = None) -> Chain:
    """The chain of `config.sampler`, with another number of timesteps if given."""
    c = config.sampler
    timesteps = c.timesteps if timesteps is None else timesteps
    chosen = select_timesteps(c.selection, timesteps, len(rates), dedupe=c.dedupe)
    return Chain.create(rates, chosen, c.eta)


def solver_of(config, n_steps: int, tol: float = 0.0):
    """The solver of `config.sampler` for a chain of so many steps, with another tolerance unless that is 0."""
    c = config.sampler
    return get_solver(c.solver, **{"max_steps": c.max_steps or n_steps, "tol": tol or c.tol, **c.options})


def system_of(config, chain: Chain, model: UNet, mesh, remat: bool = False) -> JointSystem:
    """The joint system of a chain, its time axis over all devices of the mesh that share a batch."""
    c = config.sampler
    spread = batch_sharding(mesh) if batch_devices(mesh) > 1 else None
    settings = {"data_variance": c.data_variance or None, "chunk": c.chunk, "remat": remat, "spread": spread}
    return JointSystem(chain_denoiser(model, chain), chain, **settings)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _latents(seed: int, numbers, shape, n_noise: int):
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)
    drawn = lambda shape, n: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32))(keys)  # noqa: E731
    return drawn(shape, 0), drawn((n_noise, *shape), 1) if n_noise else None


def refuse_non_finite(failed_at, chain: Chain) -> None:
    """Raises UserError, naming samples and timesteps, unless the network's output was finite."""
    try:
        check_finite(failed_at, chain)
    except NonFiniteOutput as error:
        raise UserError(f"{error}") from error


def say_unsolved(count: int, n: int, config) -> None:
    """Says how many images are not those of the chain, because their solves came to the end of their budget."""
    if count:
        say(
            f"{count} of {n} images are not solved to sampler.tol={config.sampler.tol:g}: raise sampler.max_steps, or take "
            "triangular_anderson or picard, which need no more iterations than there are timesteps."
        )


# Files ---------------------------------------------------------------------------------------------------------------


def sample(config, rates, model: UNet) -> str:
    """Samples `config.sample.n` images to files, those that are there already left alone, and makes the pictures.

    Image n is `samples/n.png`; what it was made of, and the image unrounded, is in `latents/n.npz` if asked for.

    Raises:
      UserError: those that are there are of other weights or settings.
    """
    c, out = config.sample, Path(config.out)
    folder, kept_latents = out / "samples", out / "latents"
    for needed in (folder, kept_latents) if c.save_latents else (folder,):
        needed.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(config, rates, model)
    _check_kept(folder, config, model)
    missing = [i for i in range(c.n) if not (folder / f"{i}.png").is_file()]
    calls, seconds, unsolved = [], 0.0, 0
    for start in range(0, len(missing), c.batch_size):
        numbers = missing[start : start + c.batch_size]
        # The last batch is filled up, so that nothing is compiled for it.
        x_T, noise = sampler.latents([*numbers, *numbers[:1] * (c.batch_size - len(numbers))])
        outcome = sampler(x_T, noise)
        refuse_non_finite(outcome.failed_at, sampler.chain)
        for i, number in enumerate(numbers):
            if c.save_latents:
                made_of = {"x_T": x_T[i]} | ({} if noise is None else {"noise": noise[i]})
                np.savez(kept_latents / f"{number}.npz", image=outcome.images[i], **made_of)
            # Under its own name an image is whole, whenever the run is stopped.
            partial = folder / f".{number}.png"
            write_image(partial, (outcome.images[i] + 1) / 2)
            os.replace(partial, folder / f"{number}.png")
        unsolved += int(np.sum(~outcome.converged[: len(numbers)]))
        calls.append(outcome.calls)
        seconds += outcome.seconds
    kept = f"{c.n - len(missing)} images were there already. " if len(missing) < c.n else ""
    if not missing:
        return f"{kept}Nothing to do: give another config.out, or a larger config.sample.n."
    say_unsolved(unsolved, len(missing), config)
    shown = [read_image(folder / f"{i}.png", sampler.shape[-1]) / 127.5 - 1 for i in range(min(c.n, c.shown))]
    written = [write_grid(out / "grid.png", shown), *pictures(config, sampler)]
    return (
        f"{kept}{len(missing)} images in {folder}, {len(sampler.chain)} timesteps, {np.mean(calls):.1f} calls of the network "
        f"in sequence for each batch of {c.batch_size}, {seconds:.1f} s in all. Pictures: {', '.join(map(str, written))}."
    )


def _check_kept(folder: Path, config, model: UNet) -> None:
    """Notes beside a folder what its images are made of. Raises UserError if those that are there are of something else."""
    record, (settings, weights) = folder.with_suffix(".json"), _origin(config, model)
    if any(folder.glob("*.png")):
        try:
            before = json.loads(record.read_text())
            said = [text for text, allowed in changes(before["settings"], settings, ("sampler.chunk",)) if not allowed]
            said += ["the weights are others"] * (before["weights"] != weights)
        except (OSError, ValueError, KeyError):
            said = [f"there is no {record} that tells what they are made of"]
        if said:
            raise UserError(
                f"{folder} holds images that do not go with these: {'; '.join(said)}. Give another config.out, or remove them."
            )
    record.write_text(json.dumps({"settings": settings, "weights": weights}))


def _origin(config, model: UNet) -> tuple[dict, int]:
    """What an image depends on beside its number: settings, as JSON gives them back, and a checksum of the weights."""
    given = config.to_dict()
    settings = {name: given[name] for name in ("model", "diffusion", "sampler", "dtype")}
    weights = json.dumps(described(nnx.state(model, nnx.Param)), sort_keys=True)
    return json.loads(json.dumps(settings)), zlib.crc32(weights.encode())


def pictures(config, sampler: Sampler) -> list[Path]:
    """Filmstrip and heat map of a solve, predictions along the chain, and images between two latents."""
    out, n, chain = Path(config.out), min(config.sample.n, 4), sampler.chain
    x_T, noise = sampler.latents(range(n))
    written = []
    ancestral = sampler.method == "ddpm"
    if config.sampler.solver in TIME_ORDERED and not ancestral:
        settings = {"solver": sampler.solver, "window": config.sampler.window, "record": True}
        solve = lambda model, x, z: solve_joint(sampler.system(model), x, z, **settings)  # noqa: E731
        solution = sampler.compiled(solve)(x_T, noise)
        written.append(write_filmstrip(out / "filmstrip.png", solution.record.images, int(solution.calls)))
        residuals = solution.record.residuals[: int(solution.calls), 0]
        written.append(write_heat_map(out / "residuals.png", residuals, chain.t, config.sampler.tol))
    by = sample_ddpm if ancestral else sample_ddim
    run = lambda model, x, z: by(chain_denoiser(model, chain), chain, x, z)  # noqa: E731
    predictions = sampler.compiled(lambda *at: run(*at).predictions)(x_T, noise)
    chosen = np.unique(np.linspace(0, len(chain) - 1, 10).astype(int))
    strip = np.asarray(predictions)[:, chosen]
    written.append(write_grid(out / "predictions.png", strip.reshape(-1, *strip.shape[2:]), columns=len(chosen)))
    if n > 1 and noise is None:
        between = slerp(x_T[0], x_T[1], jnp.linspace(0, 1, 11))
        images = sampler.compiled(lambda model, x: run(model, x, None).image)(between)
        written.append(write_grid(out / "interpolation.png", images, columns=11))
    return written


# Comparison ----------------------------------------------------------------------------------------------------------


def compare(config, rates, model: UNet) -> str:
    """The sequential against the parallel sampler on the same latents, for every number of timesteps: a table."""
    c, rows = config.compare, []
    devices = batch_devices(make_mesh(config.get("mesh")))
    for T in c.timesteps:
        samplers = {method: Sampler(config, rates, model, method, T) for method in ("sequential", "parallel")}
        latents = samplers["parallel"].latents(range(c.images))
        outcomes = {}
        for method, sampler in samplers.items():
            outcomes[method] = sampler(*latents)  # compiles
            refuse_non_finite(outcomes[method].failed_at, sampler.chain)
            runs = [sampler(*latents) for _ in range(c.repeats)]
            medians = {name: float(np.median([getattr(r, name) for r in runs])) for name in ("seconds", "cpu_seconds")}
            outcomes[method] = outcomes[method]._replace(**medians)
        sequential, parallel = outcomes["sequential"], outcomes["parallel"]
        say_unsolved(int(np.sum(~parallel.converged)), c.images, config)
        rows.append(
            {
                "T": len(samplers["parallel"].chain),
                "sequential calls": sequential.calls,
                "parallel calls": parallel.calls,
                "evaluations": parallel.evaluations // c.images,
                "max difference": float(np.max(np.abs(sequential.images - parallel.images))),
                "8-bit difference": int(np.max(np.abs(_eight_bits(sequential.images) - _eight_bits(parallel.images)))),
                "sequential s": sequential.seconds,
                "parallel s": parallel.seconds,
                "speed-up": sequential.seconds / parallel.seconds,
                "of all cores": sequential.cpu_seconds / max(parallel.cpu_seconds, 1e-9),
            }
        )
        say(f"T={rows[-1]['T']}: {rows[-1]['parallel calls']} calls in sequence instead of {rows[-1]['sequential calls']}")
    s = config.sampler
    kind = jax.devices()[0].device_kind
    head = (
        f"{c.images} image(s) at once, {devices} device(s) of kind {kind}, {s.solver}, tolerance {s.tol:g}, "
        f"window {s.window or 'all'}, eta {s.eta:g}, {s.selection}, data_variance {s.data_variance:g}, {config.dtype}"
    )
    return f"{head}\n\n{table(rows)}"


def _eight_bits(images):
    return np.rint(255 * np.clip((images + 1) / 2, 0, 1)).astype(int)


def table(rows: list[dict]) -> str:
    """Rows of equal keys in Markdown."""

    def shown(value):
        if isinstance(value, float):
            return f"{value:.1e}" if value and not 1e-2 <= abs(value) < 1e4 else f"{value:.3g}"
        return str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
