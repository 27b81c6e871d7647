"""Linear regression with everything the loop must carry: noise from the key, a memory, statistics, a probe."""

import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from deqjax.core.fixed_point import fixed_point
from deqjax.core.gradients import adjoint_probe
from deqjax.core.implicit import Implicit
from deqjax.core.solvers.picard import Picard
from deqjax.nn.variables import AdjointProbe, BatchVariable
from deqjax.training.mesh import make_mesh, process_share

BATCH, FEATURES = 16, 4


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict({"seed": 3, "steps": 12, "log_every": 3, "eval_every": 4, "checkpoint_every": 5})
    config.optimizer = ml_collections.ConfigDict({"name": "adam", "learning_rate": 0.05, "clip": 1.0})
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "model": 1})
    config.width = 2 if variant == "wide" else 1
    config.poison_from, config.poison_to, config.sleep, config.tensorboard = 0, 0, 0.0, False
    config.dropout, config.noise = 0.1, 1e-3
    config.accumulate, config.ema, config.patience, config.keep, config.wandb = 1, 0.0, 0, 1, ""
    config.init_from = config.resume = ""
    return config


class TinyModel(nnx.Module):
    def __init__(self, width: int, dropout: float, rngs: nnx.Rngs):
        self.linear = nnx.Linear(FEATURES, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.memory = BatchVariable(jnp.zeros((BATCH, width)))
        self.seen = BatchVariable(jnp.zeros((), jnp.int32))
        self.mean = nnx.BatchStat(jnp.zeros(()))
        self.probe = AdjointProbe(adjoint_probe())

    def __call__(self, x):
        f = lambda z, u: 0.5 * jnp.tanh(z) + u
        solver = Picard(max_steps=60, tol=1e-10)
        u = self.linear(x)
        return fixed_point(
            f, jnp.zeros_like(u), u, solver=solver, gradient=Implicit(solver=solver), adjoint_probe=self.probe[...]
        ).value


class TinyTask:
    name = "tiny"
    free_to_change = ("sleep",)
    modes = ("train", "eval", "weights")
    layout = (("linear/(kernel|bias)", -1, 2),)
    items_per_step = ("rows", BATCH)

    def __init__(self, config):
        if config.width < 1:
            raise ValueError(f"width={config.width}: must be positive.")
        self.config = config

    def model(self, rngs):
        return TinyModel(self.config.width, self.config.dropout, rngs)

    def data(self, split):
        return self

    def batch(self, step):
        part, parts = process_share(make_mesh(self.config.mesh))
        rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
        return {name: x[rows] if x.ndim else x for name, x in self.whole_batch(step).items()}

    def whole_batch(self, step):
        time.sleep(self.config.sleep)
        random = np.random.default_rng((self.config.seed, step))
        x = random.normal(size=(BATCH, FEATURES))
        y = x.sum(axis=1, keepdims=True)
        poisoned = self.config.poison_from <= step < self.config.poison_to
        return {"x": x, "y": np.full_like(y, np.nan) if poisoned else y, "reset": np.asarray(step % 7 == 0)}

    def loss(self, model, batch, key, step):
        memory = jnp.where(batch["reset"], 0.0, model.memory[...])
        prediction = model(model.dropout(batch["x"])) + 0.01 * memory
        loss = jnp.mean((prediction - batch["y"]) ** 2) + self.config.noise * jax.random.normal(key) * jnp.mean(prediction)
        model.memory[...] = jax.lax.stop_gradient(prediction)
        model.seen[...] = model.seen[...] + 1
        model.mean[...] = 0.9 * model.mean[...] + 0.1 * jax.lax.stop_gradient(jnp.mean(prediction))
        rows = len(prediction)
        return loss, {"loss": (loss * rows, jnp.asarray(rows, loss.dtype))}

    def evaluate(self, model, split):
        batch = self.whole_batch(10_000 if split == "valid" else 20_000)
        return {"loss": float(jnp.mean((model(batch["x"]) - batch["y"]) ** 2)), "mean": float(model.mean[...])}

    def import_checkpoint(self, path, model):
        model.linear.kernel[...] = jnp.asarray(np.load(path), jnp.float32)

    def weights(self, model):
        return f"weights {np.asarray(model.linear.kernel[...]).shape}"


if __name__ == "__main__":
    from deqjax.cli import run

    sys.exit(run(TinyTask))
