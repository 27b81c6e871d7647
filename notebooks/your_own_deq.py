# %% [markdown]
# # Your own equilibrium layer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/your_own_deq.ipynb)
#
# Any map from states to states makes an equilibrium layer: a bare function, a Linen module, an NNX module. Here you write the
# same cell in all three, choose its solver and its gradient by measuring them, keep it solvable while it is trained, and split
# its batches over all devices. About a minute on two CPU cores.

# %%
# Installs deqjax where it is missing, as on Colab, and says what this machine has.
import importlib.util
import os
import shutil
import subprocess
import sys

if os.path.isdir("../deqjax/core"):
    os.chdir("..")  # opened in a checkout
elif not os.path.isdir("deqjax/core"):
    if not os.path.isdir("checkout"):
        subprocess.run(["git", "clone", "--quiet", "--depth=1", "https://github.com/deqjax/deqjax", "checkout"], check=True)
    os.chdir("checkout")
    # JAX and what drives the accelerator have to be of one version.
    driver = "[cuda12]" if shutil.which("nvidia-smi") else "[tpu]" if importlib.util.find_spec("libtpu") else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"jax{driver}", ".[notebook]"], check=True)
sys.path.insert(0, os.getcwd())

import jax

from deqjax.training.mesh import make_mesh

platform, n_devices, mesh = jax.default_backend(), jax.device_count(), make_mesh()
print(f"{n_devices} x {platform.upper()} ({jax.devices()[0].device_kind}); a batch is split over {mesh.shape['data']}.")

# %% [markdown]
# ## Three ways to write a cell
#
# An equilibrium layer has three parts. What depends on the input alone is computed once, before the solve: the *injection* `u`.
# The *cell* maps the state `z` to the next, given the injection; the solver applies it as often as it needs. What comes after
# works on the solution. So whatever does not depend on `z` belongs to the injection.
#
# The cell here is one hidden layer with a residual connection and a layer normalisation. First as a bare function of a
# dictionary of weights:

# %%
import flax.linen as nn
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from deqjax import Anderson, fixed_point

# Accelerators multiply float32 matrices with fewer bits unless told otherwise, too few for the tolerances below.
jax.config.update("jax_default_matmul_precision", "highest")

B, D = (64, 64) if platform == "cpu" else (1024, 512)
B *= n_devices
key_u, key_1, key_2 = jax.random.split(jax.random.key(0), 3)
u = jax.random.normal(key_u, (B, D))
weights = {"in": 0.6 * jax.random.normal(key_1, (D, 2 * D)) / D**0.5, "out": jax.random.normal(key_2, (2 * D, D)) / D**0.5}


def bare_cell(z, weights, u):
    h = u + z + nnx.relu(z @ weights["in"]) @ weights["out"]
    return (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)


solver = Anderson(max_steps=60, tol=1e-6)
bare = fixed_point(bare_cell, jnp.zeros_like(u), weights, u, solver=solver)
print(bare.stats.explain())

# %% [markdown]
# As a Linen module. `fixed_point` hands its further arguments to the cell, so that gradients flow to `variables` and `u`:


# %%
class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, u):
        h = nn.Dense(2 * z.shape[-1], use_bias=False, name="in")(z)
        h = u + z + nn.Dense(z.shape[-1], use_bias=False, name="out")(nn.relu(h))
        return nn.LayerNorm(epsilon=0.0, use_bias=False, use_scale=False)(h)


linen_cell = LinenCell()
variables = {"params": {name: {"kernel": weights[name]} for name in weights}}
linen = fixed_point(lambda z, variables, u: linen_cell.apply(variables, z, u), jnp.zeros_like(u), variables, u, solver=solver)
print(linen.stats.explain())

# %% [markdown]
# As an NNX module, which the map closes over. Gradients flow to whatever a map closes over, parameters of modules included:


# %%
class Cell(nnx.Module):
    def __init__(self, width, rngs):
        self.into = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=0.0, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, z, u):
        return self.norm(u + z + self.out(nnx.relu(self.into(z))))


cell = Cell(D, nnx.Rngs(0))
cell.into.kernel[...], cell.out.kernel[...] = weights["in"], weights["out"]
module = fixed_point(lambda z: cell(z, u), jnp.zeros_like(u), solver=solver)
print(module.stats.explain())
for name, solution in {"Linen": linen, "NNX": module}.items():
    print(f"{name}: differs from the bare function by {jnp.max(jnp.abs(solution.value - bare.value)):.0e}")

# %% [markdown]
# The three are one map, and have one fixed point up to the tolerance of the solve.
#
# ## Choosing the solver
#
# Measure on your own map, at the accuracy that you need. The table has the evaluations of `f` until the tolerance, the share of
# samples that got there, and the time of a solve once it is compiled.

# %%
import time

from deqjax import Broyden, Picard


def seconds(function, *args):
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


print(f"{'solver':16}{'evaluations':>12}{'converged':>12}{'ms':>8}")
for candidate in (Picard, Anderson, Broyden):
    settings = candidate(max_steps=100, tol=1e-5)
    solve = jax.jit(lambda u, settings=settings: fixed_point(bare_cell, jnp.zeros_like(u), weights, u, solver=settings))
    stats = solve(u).stats
    row = f"{candidate.__name__:16}{np.mean(stats.steps):12.1f}{np.mean(stats.converged):12.0%}"
    print(f"{row}{1e3 * seconds(solve, u):8.2f}")

# %% [markdown]
# The fewest evaluations need not be the shortest time: what a method does beside evaluating `f` weighs most where `f` is small,
# as here.
#
# ## Choosing the gradient
#
# `check_gradients` computes the gradient by several rules and says how far each is from the implicit one, on this map; without
# `rules` it takes the usual ones. Look for the cheapest rule whose error you would accept.

# %%
from deqjax import GMRES, Implicit, Neumann, Phantom, check_gradients, spectral_radius

steps = (1, 4, 16)
rules = {
    "implicit, GMRES": Implicit(solver=GMRES(max_steps=20, tol=1e-5)),
    "implicit, Neumann, 4 terms": Implicit(solver=Neumann(4)),
    "phantom, 4 damped steps": Phantom(steps=4, damping=0.5),
    **{f"phantom, {k}": Phantom(steps=k) for k in steps},
}
errors = check_gradients(bare_cell, jnp.zeros_like(u), weights, u, rules=rules)
for name, error in errors.items():
    print(f"{name:28}{error:10.1e}")

# %% [markdown]
# A phantom gradient is the implicit one with its series cut off, so its error should fall like the powers of the Jacobian,
# about as the largest eigenvalue to the number of steps. Look whether it does.

# %%
radius = spectral_radius(lambda z: bare_cell(z, weights, u), bare.value, jax.random.key(1), steps=20, method="arnoldi")
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
axis.semilogy(steps, [errors[f"phantom, {k}"] for k in steps], marker="o", label="phantom gradient")
axis.semilogy(steps, [float(radius.mean()) ** k for k in steps], linestyle="--", label="(mean spectral radius) ^ steps")
axis.set_xlabel("differentiated steps")
axis.set_ylabel("relative error of the gradient")
axis.legend()
plt.show()

# %% [markdown]
# It should while the mean is what counts; over many steps the samples with the largest radius are left, and the curve may bend. So
# the spectral radius at your solutions tells how many phantom steps would be enough.
#
# ## A layer with settings, and its regularisation
#
# `DEQ` is the same machinery with settings for training and evaluation by name (those of TorchDEQ). The model below classifies
# points of two interleaved spirals. It is trained three times:
#
# * with nothing that keeps the cell a contraction;
# * with a penalty on the Jacobian at the solution, `jacobian_loss`. It is a mean over the entries of the state, so that its
#   weight goes with the width of the layer: here it is half of it;
# * with a weight whose spectral norm is held at 0.9 by `NormalizedLinear`, which normalises once per forward pass, outside the
#   solve.
#
# Look at what the solver has to do as training goes on.

# %%
import optax

from deqjax import DEQ, DEQConfig, jacobian_loss
from deqjax.nn.layers import NormalizedLinear


class SpiralDEQ(nnx.Module):
    def __init__(self, width: int, config: DEQConfig, rngs: nnx.Rngs):
        self.deq = DEQ(config)
        self.encode = nnx.Linear(2, width, rngs=rngs)
        init = nnx.initializers.variance_scaling(0.25, "fan_in", "normal")  # a contraction to begin with
        self.cell = NormalizedLinear(width, width, config=config, use_bias=False, init=init, rngs=rngs)
        self.decode = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, points, *, train: bool, key=None):
        u, W = self.encode(points), self.cell.effective(train=train)
        f = lambda z: jnp.tanh(W(z) + u)
        out = self.deq(f, jnp.zeros_like(u), train=train, key=key)
        weight = self.deq.config.jac_loss_weight
        # Taken as it is, the solution is not moved by the penalty: only f is.
        at = jax.lax.stop_gradient(out.states[-1])
        penalty = weight * jacobian_loss(f, at, key) if train and weight else 0.0
        return self.decode(out.states[-1]), penalty, out


def spirals(seed, n):
    rng = np.random.default_rng(seed)
    labels, turn = rng.integers(2, size=n), rng.uniform(0.3, 2, n)
    angle = np.pi * (turn + labels) + rng.normal(0, 0.05, n)
    points = turn[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return {"points": points.astype(np.float32), "labels": labels.astype(np.int32)}


@nnx.jit
def train_step(model, optimizer, batch, key):
    def loss(model):
        logits, penalty, out = model(batch["points"], train=True, key=key)
        nll = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]))
        return nll + penalty, {"loss": nll, "steps": jnp.mean(out.stats.steps)}

    gradient, metrics = nnx.grad(loss, has_aux=True)(model)
    optimizer.update(model, gradient)
    return metrics


# %%
from deqjax.training.mesh import place_batch

solves = dict(f_solver="anderson", f_stop_mode="rel", f_tol=1e-4, hook_ift=True, b_solver="anderson")
variants = {
    "nothing": DEQConfig(**solves, norm_type="none"),
    "Jacobian penalty": DEQConfig(**solves, norm_type="none", jac_loss_weight=32.0),
    "spectral norm 0.9": DEQConfig(**solves, norm_type="spectral_norm", norm_no_scale=True, norm_target_norm=0.9),
}
models, histories = {}, {}
for name, deq in variants.items():
    models[name] = SpiralDEQ(64, deq, nnx.Rngs(0))
    rule, history = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), []
    optimizer = nnx.Optimizer(models[name], rule, wrt=nnx.Param)
    for step in range(200):
        batch = place_batch(mesh, spirals(step, 128 * n_devices))
        history.append(train_step(models[name], optimizer, batch, jax.random.key(step)))
    histories[name] = {metric: [float(entry[metric]) for entry in history] for metric in ("loss", "steps")}

figure, axes = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
for axis, metric in zip(axes, ("loss", "steps"), strict=True):
    for name, history in histories.items():
        axis.plot(history[metric], label=name, linewidth=1)
    axis.set_xlabel("training step")
axes[0].legend()
axes[0].set_ylabel("cross entropy")
axes[1].set_ylabel("evaluations of f, mean of the batch")
plt.show()

# %% [markdown]
# Here is how they do on points that were not trained on, beside what explains the curves: the size of the Jacobian on average,
# which the penalty penalises, and the largest spectral radius of any sample, which decides whether that sample can be solved by
# plain iteration.

# %%
test = spirals(10_000, 128 * n_devices)


@nnx.jit
def evaluate(model, batch, key):
    logits, _, out = model(batch["points"], train=False)
    u, W = model.encode(batch["points"]), model.cell.effective()
    f = lambda z: jnp.tanh(W(z) + u)
    radius = spectral_radius(f, out.states[-1], key, steps=20, method="arnoldi")
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["labels"])
    return accuracy, jnp.mean(out.stats.steps), jacobian_loss(f, out.states[-1], key, n_probes=10), jnp.max(radius)


print(f"{'':18}{'accuracy':>10}{'evaluations':>13}{'Jacobian':>10}{'largest spectral radius':>25}")
for name, model in models.items():
    accuracy, evaluations, size, radius = evaluate(model, place_batch(mesh, test), jax.random.key(0))
    print(f"{name:18}{accuracy:10.3f}{evaluations:13.1f}{size:10.3f}{radius:25.2f}")

# %% [markdown]
# Without either, solves get longer, and the loss may jump: beyond a radius of 1 there can be several equilibria, and the solver is
# free to change from one to another. The penalty keeps the Jacobian small on average and promises nothing for a single sample.
# The spectral norm is a bound, as exact as its power iteration: tanh never stretches, so no sample's radius exceeds 0.9 by much
# however long one trains, at the cost of what a map that may not stretch cannot express.
#
# ## All devices
#
# Nothing above was written for one device. `place_batch` put a share of each batch on every device of the mesh, and the
# compiler did the rest: each device solves for its own samples, and a solve tells the others one number per step, whether it is
# done. Here is what lies where, and the same gradient computed with everything on one device. (In evaluation too the solution
# can be differentiated, by the implicit rule.)

# %%
batch = place_batch(mesh, test)
print(f"the batch of {batch['points'].shape[0]} on {len(batch['points'].addressable_shards)} device(s):", end=" ")
print([shard.data.shape[0] for shard in batch["points"].addressable_shards], "rows each")


@nnx.jit
def gradient(model, batch):
    def nll(model):
        logits, _, _ = model(batch["points"], train=False)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]))

    return nnx.grad(nll)(model)


model, one = models["spectral norm 0.9"], jax.devices()[0]
structure, state = nnx.split(model)
spread = gradient(model, batch)
alone = gradient(nnx.merge(structure, jax.device_put(state, one)), jax.device_put(test, one))
differences = [
    np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in zip(*map(jax.tree.leaves, (spread, alone)), strict=True)
]
print(f"largest difference between the two gradients: {max(differences):.0e}")

# %% [markdown]
# On a CPU, `jax.config.update("jax_num_cpu_devices", 8)` before anything else in a fresh session makes eight devices of it, for
# trying this out. Parameters can be split as well, and the work spread over hosts:
# [scaling](https://github.com/deqjax/deqjax/blob/main/docs/scaling.md).
#
# Next: [a language model](https://github.com/deqjax/deqjax/blob/main/notebooks/language_model.ipynb)
# whose training loop does all of this from one config.
