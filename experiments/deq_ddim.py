"""Diffusion models whose sampling chain is a joint equilibrium: training, parallel sampling and inversion.

    python -m experiments.deq_ddim --config configs/ddim_digits.py
    python -m experiments.deq_ddim --config configs/ddim_digits.py --mode sample

Modes: train (and resume), sample (images to files), invert (the latents of images), eval (loss, reconstruction error and, with
a feature network, FID), compare (the sequential against the parallel sampler), export (the weights as a state dict, to
`config.export_path`). `config.init_from` takes another run or a published checkpoint.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.naming import did_you_mean
from deqjax.data.image_sets import ImageBatches, take
from deqjax.interop.ddim import export_ddim, load_ddim, published_name
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.ddim import UNet, UNetConfig, betas, signal_rates, with_dtype
from deqjax.training.console import say
from deqjax.training.mesh import make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums
from experiments.ddim_data import DATA, read

DTYPES = ("float32", "bfloat16", "float64")


class DiffusionTask:
    """What the training loop needs to know about diffusion models."""

    name = "deq_ddim"
    modes = ("train", "sample", "invert", "eval", "compare", "export")
    free_to_change = ("data.dir", "sampler", "sample", "invert", "eval", "compare", "export_path")

    def __init__(self, config, splits=None):
        """Reads the images that the config names, unless they are given.

        Raises:
          DataError: the images are missing or damaged.
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.architecture = UNetConfig(**config.model)
        d = config.diffusion
        self.rates = signal_rates(betas(d.schedule, d.timesteps, d.start, d.end))
        self.splits = read(config) if splits is None else splits
        self.items_per_step = ("images", config.data.batch_size)
        self.fingerprint = [config.data.name, len(self.splits["train"])]
        self._evaluate_batch = jax.jit(self._held_out_loss, static_argnums=0)

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


def as_signal(images):
    """Images of 8 bits as numbers from -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    for name, value, known in (("data.name", config.data.name, DATA), ("dtype", config.dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}{did_you_mean(str(value), known)}. There are: {', '.join(known)}.")
    data = config.data
    for name in ("batch_size", "eval_batch_size", "eval_images"):
        if data[name] < 1:
            raise ValueError(f"data.{name}={data[name]}: must be 1 or more.")


def main(argv=None):
    from deqjax.training.main import run

    return run(DiffusionTask, argv)


if __name__ == "__main__":
    sys.exit(main())
