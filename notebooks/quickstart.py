# %% [markdown]
# # Quickstart: from a fixed point to a trained layer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/quickstart.ipynb)
#
# An equilibrium layer returns the state that its map leaves where it is. Here you solve for such states, differentiate through
# them in three ways and compare what each costs, see how a solve tells you that it failed, and train a layer on handwritten
# digits. About a minute on two CPU cores; an accelerator gets larger problems.

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
# ## A fixed point
#
# The map is one layer of a network, `z -> tanh(z W + x)`, with weights `W` and a batch of inputs `x`. Its fixed points are
# found for all samples of the batch at once, each with a residual of its own. Look at what the statistics say, and at how far
# one more application of the map moves the answer.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from deqjax import Anderson, fixed_point

# Accelerators multiply float32 matrices with fewer bits unless told otherwise, too few for the tolerances below.
jax.config.update("jax_default_matmul_precision", "highest")

B, D = (64, 256) if platform == "cpu" else (1024, 1024)
key_W, key_x = jax.random.split(jax.random.key(0))
W = 1.2 * jax.random.normal(key_W, (D, D)) / D**0.5
x = jax.random.normal(key_x, (B, D))


def f(z, W, x):
    return jnp.tanh(z @ W + x)


solution = jax.jit(lambda W, x: fixed_point(f, jnp.zeros_like(x), W, x, solver=Anderson(max_steps=50, tol=1e-5)))(W, x)
z = solution.value
print(solution.stats.explain())
print(f"evaluations of f: {np.mean(solution.stats.steps):.1f} on average")
print(f"|f(z) - z| / |z| = {jnp.linalg.norm(f(z, W, x) - z) / jnp.linalg.norm(z):.1e}")

# %% [markdown]
# Every sample stopped as soon as its own residual was below `tol`: a result does not depend on its batch mates. `f` was given
# `W` and `x` as arguments; it may as well close over them.
#
# ## Solvers
#
# A solver is a value with its hyper-parameters. The residual curves below show the median sample and the bands around it. Look
# at how many evaluations of `f` each method needs to get to the dashed line.

# %%
from deqjax import Broyden, Picard
from deqjax.viz import plot_convergence

figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), sharex=True, sharey=True, layout="constrained")
for axis, solver in zip(axes, (Picard, Anderson, Broyden), strict=True):
    solve = jax.jit(lambda W, x, solver=solver: fixed_point(f, jnp.zeros_like(x), W, x, solver=solver(max_steps=60, tol=1e-5)))
    plot_convergence(solve(W, x).stats, axis, tol=1e-5)
    axis.set_title(solver.__name__)
plt.show()

# %% [markdown]
# Plain (Picard) iteration gains the same factor with every evaluation. The others remember what they have seen and need fewer;
# each of their steps costs a little more beside `f`.
#
# ## The gradient, three ways
#
# The loss is a sum over the fixed points, differentiated in the weights:
#
# * `Implicit` solves a second fixed-point problem, the adjoint, at the solution;
# * `Phantom` takes a few more steps from the solution and backpropagates through these alone;
# * `Unrolled` backpropagates through every step of the solver.
#
# All take the same number of plain forward steps (`tol=0` ends none early). The compiler says how much memory beside inputs and
# outputs each program needs. The reference is an implicit gradient solved as far as float32 goes.

# %%
import time

from deqjax import Implicit, Phantom, Unrolled

readout = jax.random.normal(jax.random.key(1), (B, D)) / B


def gradient_of_loss(solver, gradient):
    def loss(W, x):
        return jnp.sum(readout * fixed_point(f, jnp.zeros_like(x), W, x, solver=solver, gradient=gradient).value)

    return jax.jit(jax.grad(loss))


reference = gradient_of_loss(Anderson(max_steps=100, tol=1e-7), Implicit(solver=Anderson(max_steps=100, tol=1e-7)))(W, x)


def measure(steps, gradient):
    compiled = gradient_of_loss(Picard(max_steps=steps, tol=0.0), gradient).lower(W, x).compile()
    result, times = jax.block_until_ready(compiled(W, x)), []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(W, x))
        times.append(time.perf_counter() - begin)
    error = float(jnp.linalg.norm(result - reference) / jnp.linalg.norm(reference))
    return error, 1e3 * min(times), compiled.memory_analysis().temp_size_in_bytes / 2**20


budgets = (5, 10, 20, 40)
measured = {
    "implicit": [measure(n, Implicit(solver=Picard(max_steps=n, tol=0.0))) for n in budgets],
    "phantom, 5 steps": [measure(n, Phantom(steps=5)) for n in budgets],
    "unrolled": [measure(n, Unrolled()) for n in budgets],
}
print(f"{'':18}{'steps':>6}{'error':>10}{'ms':>8}{'MiB':>8}")
for name, rows in measured.items():
    for n, (error, ms, mib) in zip(budgets, rows, strict=True):
        print(f"{name:18}{n:6}{error:10.1e}{ms:8.2f}{mib:8.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
for k, (axis, label) in enumerate(zip(axes, ("relative error", "time (ms)", "memory (MiB)"), strict=True)):
    for name, rows in measured.items():
        axis.plot(budgets, [row[k] for row in rows], marker="o", label=name)
    axis.set_xlabel("forward steps")
    axis.set_ylabel(label)
axes[0].set_yscale("log")
axes[0].legend()
plt.show()

# %% [markdown]
# The memory of unrolling grows with the number of steps; that of the other two does not, for they keep the solution and nothing
# of the way to it. The implicit gradient is as exact as its two solves. The phantom gradient saves the second solve and keeps a
# bias that no forward step removes: more of *its* steps do, each of them kept in memory. Times of so small a problem depend on
# what else the machine does; the size of `B` and `D` above is yours to change.
#
# ## When the map does not contract
#
# Now a map whose behaviour is known: turn the state and stretch it by a gain, `z -> gain * (z R) + x` with an orthogonal `R`.
# Below a gain of 1 plain iteration converges, above it does not. Each sample has its own gain; look at what each is told.

# %%
from deqjax import Status, spectral_radius

gains = jnp.array([0.5, 0.98, 1.1, 5.0])
R = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (6, 6)))[0]
inputs = jax.random.normal(jax.random.key(3), (4, 6))


def stretch(z):
    return gains[:, None] * (z @ R) + inputs


plain = fixed_point(stretch, jnp.zeros_like(inputs), solver=Picard(max_steps=80, tol=1e-5)).stats
radius = spectral_radius(stretch, jnp.zeros_like(inputs), jax.random.key(4), steps=6, method="arnoldi")
for gain, r, status in zip(gains, radius, plain.status, strict=True):
    print(f"gain {gain:.2f}: spectral radius {r:.2f}, {Status(int(status)).name.lower()}")
print()
print(plain.explain())
axis = plot_convergence(plain, mode="abs", tol=1e-5)
axis.legend([f"gain {gain:.2f}" for gain in gains])
plt.show()

# %% [markdown]
# Four samples, four fates, and no exception: the numbers of one sample never spoil those of another, and a training step that
# met this would go on with the best state seen. `spectral_radius` tells the same of any map at any state: it is the factor by
# which plain iteration shrinks or grows an error in the long run.
#
# The advice names other solvers. Unless the gain is exactly 1 there is a fixed point, and a method that combines past
# evaluations finds it:

# %%
accelerated = fixed_point(stretch, jnp.zeros_like(inputs), solver=Anderson(max_steps=80, memory=8, tol=1e-5)).stats
print(accelerated.explain())
print(f"evaluations of f: {accelerated.steps}")

# %% [markdown]
# That works for six numbers. For a network, keep the map tame instead:
# [your_own_deq](https://github.com/deqjax/deqjax/blob/main/notebooks/your_own_deq.ipynb) shows how.
#
# ## A layer trained on handwritten digits
#
# The images of 8 x 8 pixels come with scikit-learn. A linear layer encodes the image, the equilibrium of a small cell processes
# it, a linear layer decodes. Batches are split over the devices of the mesh, the weights are on each of them. Look at the
# accuracy on images that were not trained on.

# %%
import optax
from flax import nnx

from deqjax.data.digits import digits
from deqjax.training.mesh import place_batch


class DigitsDEQ(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        half = nnx.initializers.variance_scaling(0.25, "fan_in", "normal")  # half the usual size: a contraction to begin with
        self.encode = nnx.Linear(64, width, rngs=rngs)
        self.cell = nnx.Linear(width, width, use_bias=False, kernel_init=half, rngs=rngs)
        self.decode = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        u = self.encode((images.reshape(len(images), -1) / 255 - 0.3) / 0.38)
        solver, gradient = Anderson(max_steps=40, tol=1e-4), Implicit(solver=Anderson(max_steps=40, tol=1e-4))
        solution = fixed_point(lambda z: jnp.tanh(self.cell(z) + u), jnp.zeros_like(u), solver=solver, gradient=gradient)
        return self.decode(solution.value), solution.stats


@nnx.jit
def train_step(model, optimizer, batch):
    def loss(model):
        logits, stats = model(batch["images"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])), stats

    (value, stats), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradient)
    return value, jnp.mean(stats.steps)


model = DigitsDEQ(128, nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3)), wrt=nnx.Param)
train, test, history = digits("train"), digits("test"), []
rows = np.random.default_rng(0)
for _ in range(200):
    chosen = rows.integers(len(train), size=64 * n_devices)
    batch = place_batch(mesh, {"images": train.images[chosen].astype(np.float32), "labels": train.labels[chosen]})
    history.append(train_step(model, optimizer, batch))

logits, stats = nnx.jit(lambda model, images: model(images))(model, jnp.asarray(test.images, jnp.float32))
print(f"test accuracy {np.mean(np.argmax(logits, axis=1) == test.labels):.3f}")
print(stats.explain())

# %%
losses, steps = np.array(history).T
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
axes[0].plot(losses)
axes[0].set_ylabel("training loss")
axes[1].plot(steps)
axes[1].set_ylabel("evaluations of f, mean of the batch")
for axis in axes[:2]:
    axis.set_xlabel("training step")
plot_convergence(stats, axes[2], tol=1e-4)
axes[2].set_title("test images")
plt.show()

# %% [markdown]
# The layer learns, and the picture in the middle says what its solves cost meanwhile. In the last one the line is the median of
# the images that are not solved yet, so that its end belongs to the hardest alone. Nothing here keeps the weights from growing
# until solves reach their limit; the usual remedies, a penalty on the Jacobian and normalised weights, are in
# [your_own_deq](https://github.com/deqjax/deqjax/blob/main/notebooks/your_own_deq.ipynb).
#
# Where to go on: [a layer of your own](https://github.com/deqjax/deqjax/blob/main/notebooks/your_own_deq.ipynb),
# [a language model](https://github.com/deqjax/deqjax/blob/main/notebooks/language_model.ipynb),
# [many devices and hosts](https://github.com/deqjax/deqjax/blob/main/docs/scaling.md).
