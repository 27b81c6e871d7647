"""Diffusion models whose sampling chain is a joint equilibrium: training, parallel sampling and inversion.

    python -m experiments.deq_ddim --config configs/ddim_digits.py
    python -m experiments.deq_ddim --config configs/ddim_digits.py --mode sample

Modes: train (and resume), sample (images to files), invert (the latents of images), eval (loss, reconstruction error and, with
a feature network, FID), compare (the sequential against the parallel sampler), export (the weights as a state dict, to
`config.export_path`). `config.init_from` takes another run or a published checkpoint.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.naming import did_you_mean
from deqjax.data.unlabelled_images import ImageBatches, Images, take
from deqjax.interop.ddim import export_ddim, load_ddim, published_name
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.ddim import (
    Chain,
    UNet,
    UNetConfig,
    betas,
    chain_denoiser,
    check_slot_by_slot,
    encode,
    sample_ddim,
    signal_rates,
    with_dtype,
)
from deqjax.training.console import say
from deqjax.training.mesh import make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums
from experiments.ddim_data import DATA, read
from experiments.ddim_inversion import GRADIENTS, invert
from experiments.ddim_sampling import (
    METHODS,
    TIME_ORDERED,
    Sampler,
    chain_of,
    compare,
    refuse_non_finite,
    sample,
    say_unsolved,
    solver_of,
)
from experiments.fid import Moments, frechet_distance, load_features

DTYPES = ("float32", "bfloat16", "float64")


class DiffusionTask:
    """What the training loop needs to know about diffusion models."""

    name = "deq_ddim"
    modes = ("train", "sample", "invert", "eval", "compare", "export")
    weights_transfer = True
    free_to_change = ("data.dir", "sampler", "sample", "invert", "eval", "compare", "out", "export_path")

    def __init__(self, config, splits=None):
        """Args:
        config: of the run.
        splits: the images to train on and those held out; by default what the config names, read when it is first asked for.

        Raises:
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.architecture = UNetConfig(**config.model)
        d = config.diffusion
        self.rates = signal_rates(betas(d.schedule, d.timesteps, d.start, d.end))
        # What is wrong with the sampler shows now, not after training.
        for timesteps in (config.sampler.timesteps, config.invert.timesteps or 1, *config.compare.timesteps):
            check_slot_by_slot(solver_of(config, len(chain_of(config, self.rates, timesteps))))
        if splits is not None:
            self.splits = splits
        self.items_per_step = ("images", config.data.batch_size)
        self._evaluate_batch = jax.jit(self._held_out_loss, static_argnums=0)

    @functools.cached_property
    def splits(self) -> dict[str, Images]:
        """The images of the config; published weights sample without any. Raises DataError: see `read`."""
        return read(self.config)

    @property
    def fingerprint(self) -> list:
        return [self.config.data.name, len(self.splits["train"])]

    def model(self, rngs: nnx.Rngs) -> UNet:
        return UNet(self.architecture, rngs)

    def data(self, split: str) -> ImageBatches:
        data = self.config.data
        shard, shards = process_share(make_mesh(self.config.get("mesh")))
        return ImageBatches(self.splits[split], data.batch_size, self.config.seed, data.flip, shard, shards)

    def import_checkpoint(self, path: str, model: UNet) -> None:
        """Published weights: a `.safetensors` or PyTorch state dict, or the list that the DDIM trainer writes."""
        if name := published_name(path):
            better = "" if name.startswith("ema_") else f" Its averaged weights, ema_{name}, make far better images."
            say(f"{path} is the published checkpoint {name}.{better}")
        load_ddim(model, read_checkpoint(path))

    def export(self, model: UNet) -> str:
        """Writes the weights under the DDIM code base's names; `.safetensors`, or `.pth` with PyTorch installed."""
        state_dict = export_ddim(model)
        write_checkpoint(self.config.export_path, state_dict)
        return f"Wrote {len(state_dict)} tensors to {self.config.export_path}."

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: UNet, batch, key, step):
        """Squared error of the predicted noise (Ho et al. 2020, equation 14), summed over an image; the metric is per pixel."""
        key_t, key_noise, key_dropout = jax.random.split(key, 3)
        x, N = as_signal(batch["image"]), len(self.rates)
        B = x.shape[0]
        # Antithetic: each timestep t with N - 1 - t.
        half = jax.random.randint(key_t, (B // 2 + 1,), 0, N)
        t = jnp.concatenate([half, N - 1 - half])[:B]
        error = self._error(model, x, t, jax.random.normal(key_noise, x.shape, x.dtype), key_dropout)
        return jnp.sum(error) / B, {"loss": (jnp.sum(error), jnp.asarray(x.size, x.dtype))}

    def _error(self, model, x, t, noise, key=None):
        """Squared error of the noise predicted in x + noise at timesteps t."""
        rate = jnp.asarray(self.rates, x.dtype)[t][:, None, None, None]
        model = with_dtype(model, self.config.dtype)
        return jnp.square(noise - model(jnp.sqrt(rate) * x + jnp.sqrt(1 - rate) * noise, t, key))

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: UNet, split: str) -> dict[str, float]:
        """The loss per pixel and channel on images that were held out, at timesteps and noise that are the same every time."""
        images, B = self.splits["test"], self.config.data.eval_batch_size
        n = min(len(images), self.config.data.eval_images)
        graph, state = nnx.split(model)
        mesh, results = make_mesh(self.config.get("mesh")), []
        for start in range(0, n, B):
            index = np.arange(start, start + B)
            batch = {"image": take(images, index % n), "index": index.astype(np.int32), "counted": index < n}
            results.append(self._evaluate_batch(graph, state, place_whole(mesh, batch)))
        sums = Sums()
        for metrics in results:
            sums.add(metrics)
        return sums.means()

    def _held_out_loss(self, graph, state, batch):
        x, N = as_signal(batch["image"]), len(self.rates)
        # Timesteps that are spread evenly over any number of images.
        t = jnp.floor(N * ((batch["index"] + 0.5) * 0.6180339887 % 1)).astype(jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.config.seed), i))(batch["index"])
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
        counted = batch["counted"].astype(x.dtype)
        error = jnp.sum(self._error(nnx.merge(graph, state), x, t, noise), axis=(1, 2, 3))
        return {"loss": (jnp.sum(error * counted), jnp.sum(counted) * x[0].size)}

    def report(self, model: UNet) -> None:
        """Prints the loss, the error of encoding and decoding, and of samples their cost and, if asked for, their FID."""
        config, c = self.config, self.config.eval
        # A file that cannot be used shows before the work.
        features = load_features(c.features) if c.features else None
        say(f"held-out loss per pixel: {self.evaluate(model, 'test')['loss']:.5f}")
        sampler = Sampler(config, self.rates, model)
        chain = sampler.chain
        images = as_signal(jnp.asarray(take(self.splits["test"], range(min(c.batch_size, len(self.splits["test"]))))))
        # Backwards there is no noise.
        quiet = Chain.create(self.rates, chain.t[::-1])

        def decoded(model, x):
            denoise = chain_denoiser(model, quiet)
            return sample_ddim(denoise, quiet, encode(denoise, quiet, x)[:, -1]).image

        decoded = sampler.compiled(decoded)
        error = np.asarray(jnp.sum(jnp.square(decoded(images) - images), axis=(1, 2, 3)))
        say(
            f"encoded and decoded in {len(chain)} timesteps each: squared error {error.mean():.4g} per image in [-1, 1], "
            f"RMS {np.sqrt(error.mean() / images[0].size):.4g} per pixel, over {len(images)} held-out images"
        )
        seen, calls, evaluations, seconds, unsolved = Moments(), [], 0, 0.0, 0
        n = -(-c.n // c.batch_size)
        sampler(*sampler.latents(range(c.batch_size)))  # compiles
        for start in range(0, n * c.batch_size, c.batch_size):
            outcome = sampler(*sampler.latents(range(start, start + c.batch_size)))
            refuse_non_finite(outcome.failed_at, chain)
            calls.append(outcome.calls)
            evaluations, seconds = evaluations + outcome.evaluations, seconds + outcome.seconds
            unsolved += int(np.sum(~outcome.converged))
            if features:
                wanted = min(c.n - start, c.batch_size)
                seen.add(features(np.rint(255 * np.clip((outcome.images[:wanted] + 1) / 2, 0, 1)).astype(np.uint8)))
        say(
            f"{n} batches of {c.batch_size} samples, {sampler.method}, {len(chain)} timesteps: {np.mean(calls):.1f} calls of "
            f"the network in sequence, {evaluations / (n * c.batch_size):.1f} evaluations per image, {seconds / n:.3g} s each"
        )
        say_unsolved(unsolved, n * c.batch_size, config)
        if features:
            train, B = self.splits["train"], c.batch_size
            indices = range(min(len(train), c.reference))
            batches = (take(train, indices[start : start + B]) for start in range(0, len(indices), B))
            distance = frechet_distance(seen, Moments.of(features, batches))
            say(f"FID with the features of {c.features}: {distance:.4g}, {c.n} samples against {len(indices)} training images")

    # Sampling and inversion ------------------------------------------------------------------------------------------

    def sample(self, model: UNet) -> str:
        return sample(self.config, self.rates, model)

    def invert(self, model: UNet) -> str:
        return invert(self.config, self.rates, model, None if self.config.invert.in_distribution else self.splits["train"])

    def compare(self, model: UNet) -> str:
        return compare(self.config, self.rates, model)


def as_signal(images):
    """Images of 8 bits as numbers from -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    choices = {"data.name": (config.data.name, DATA), "dtype": (config.dtype, DTYPES)}
    choices |= {"sampler.method": (config.sampler.method, METHODS), "invert.start": (config.invert.start, ("noise", "encode"))}
    choices |= {f"invert.gradients[{i}]": (name, GRADIENTS) for i, name in enumerate(config.invert.gradients)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}{did_you_mean(value, known)} There are: {', '.join(known)}.")
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("dtype='float64': JAX computes in float32 unless the environment has JAX_ENABLE_X64=1.")
    least = {
        "data": ("batch_size", "eval_batch_size", "eval_images"),
        "sample": ("n", "batch_size", "shown"),
        "eval": ("n", "batch_size", "reference"),
    }
    least |= {"invert": ("images", "steps"), "compare": ("images", "repeats")}
    for section, names in least.items():
        for name in names:
            if config[section][name] < 1:
                raise ValueError(f"{section}.{name}={config[section][name]}: must be 1 or more.")
    for name in ("invert.gradients", "compare.timesteps"):
        if not config[name.partition(".")[0]][name.partition(".")[2]]:
            raise ValueError(f"{name} is empty: name one or more.")
    sampler = [("sampler", name) for name in ("window", "chunk", "max_steps", "data_variance")]
    for section, name in (*sampler, ("invert", "tol"), ("invert", "seconds")):
        if not config[section][name] >= 0:
            raise ValueError(f"{section}.{name}={config[section][name]}: must be 0 or more.")
    if not 0 < config.data.held_out < 1:
        raise ValueError(f"data.held_out={config.data.held_out}: must lie between 0 and 1, a share of the images.")
    if config.sampler.window and config.sampler.solver not in TIME_ORDERED:
        raise ValueError(
            f"sampler.window={config.sampler.window}, but {config.sampler.solver!r} takes the whole trajectory; in a window "
            f"work {', '.join(TIME_ORDERED)}."
        )
    for section, name in (("sampler", "tol"), ("invert", "learning_rate")):
        if not config[section][name] > 0:
            raise ValueError(f"{section}.{name}={config[section][name]}: must be positive.")


def main(argv=None):
    from deqjax.cli import run

    return run(DiffusionTask, argv)


if __name__ == "__main__":
    sys.exit(main())
