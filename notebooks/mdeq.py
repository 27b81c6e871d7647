# %% [markdown]
# # A classifier that can be stopped after any number of steps
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/mdeq.ipynb)
#
# A multiscale deep equilibrium model ([MDEQ](https://arxiv.org/abs/2006.08656)) has one block of convolutions that acts on
# several resolutions at once. Its output is not the end of a stack of layers but the fixed point of that block, which a
# solver looks for. You will train a small one on handwritten digits, then see its accuracy after every number of solver
# steps, from a single solve; which digits are solved quickly and which slowly; and how feature maps settle. About a minute of
# CPU time; on an accelerator the training is that of the recipe.

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
# ## The data and the model
#
# Everything comes from the recipe `configs/mdeq_digits.py`. If you have trained it (`python -m experiments.mdeq_classify
# --config configs/mdeq_digits.py`), its weights are used here. Otherwise the next cells train: all of the recipe on an
# accelerator, a narrower model for fewer steps on a CPU.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from deqjax.cli import load_config
from deqjax.data.augment import normalize
from deqjax.training.checkpoint import committed_steps
from deqjax.training.loop import train
from deqjax.training.mesh import place_whole
from deqjax.training.start import trained_model
from experiments.mdeq_classify import ClassificationTask
from experiments.report import read_run

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config, workdir = load_config("configs/mdeq_digits.py"), Path("runs/mdeq_digits")
is_trained = bool(committed_steps(workdir))
if not is_trained:
    workdir = Path(tempfile.mkdtemp())
    if platform == "cpu":
        config.steps, config.eval_every, config.log_every, config.data.batch_size = 240, 60, 10, 32
        config.model.channels, config.model.final_channels, config.model.expansion = (8, 8), 32, 2.0
        config.deq.f_max_iter, config.deq.b_max_iter, config.deq.jac_loss_weight = 16, 10, 0.0
        config.optimizer.learning_rate = 5e-3
task = ClassificationTask(config)
digits = task.splits["test"]

# %% [markdown]
# Ten of the digits that training does not see. They have 8 x 8 pixels, which is little: some are hard to read for us, too.

# %%
figure, axes = plt.subplots(1, 10, figsize=(10, 1.4))
for ax, image, label in zip(axes, digits.images, digits.labels, strict=False):
    ax.imshow(image[..., 0], cmap="gray_r")
    ax.set_title(label)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Training
#
# Anderson's method finds the fixed point, and the gradient comes from the implicit function theorem: no step of the solver is
# kept for it. A line of the log says how long the solves were (`forward/steps`) and how close they came (`forward/rel`).

# %%
if not is_trained:
    train(task, config, workdir)
model = trained_model(task, config, workdir)

# %% [markdown]
# The curves of the run. Look at the right one: it is how close the solves came to the fixed point, on average over a batch. A
# solve ends at the tolerance (dashed) or at its budget of steps, and how far it comes changes while the block learns.

# %%
curves, _ = read_run(workdir)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
left.plot(*curves["train/accuracy"], label="training")
left.plot(*curves["valid/accuracy"], marker="o", label="validation")
left.set(xlabel="training step", ylabel="accuracy", ylim=(0, 1.02))
left.legend()
right.plot(*curves["train/forward/rel"], color="tab:orange")
right.axhline(config.deq.f_tol, color="grey", linestyle="--", linewidth=1)
right.set(xlabel="training step", ylabel="|f(z) - z| / |f(z)|", yscale="log")
plt.show()

# %% [markdown]
# ## One solve, every accuracy
#
# `trajectory` solves once and hands back the best state so far after any steps that it is asked for. Each of these states is
# decoded by the same head, so one solve tells the accuracy at every budget. The test images are split over the mesh.

# %%
n = len(digits) // n_devices * n_devices  # as many as the devices share evenly
images, labels = normalize(digits.images[:n], config.data.mean, config.data.std), digits.labels[:n]
batch = place_whole(mesh, {"images": images})
steps = tuple(range(1, 31))


@nnx.jit
def solve(model, images):
    states, stats = model.trajectory(model.encode(images), steps)
    states = jax.tree.map(lambda *z: jnp.stack(z), *states)  # the steps along a leading axis
    return jax.lax.map(model.decode, states), states, stats


logits, states, stats = solve(model, batch["images"])
probabilities = np.asarray(jax.nn.softmax(logits))  # [steps, images, classes]
residual = np.minimum.accumulate(np.asarray(stats.rel_trace), axis=1)  # of the best state so far
accuracy = (probabilities.argmax(axis=-1) == labels).mean(axis=1)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
left.plot(steps, accuracy, marker="o")
left.set(xlabel="solver steps", ylabel="test accuracy", ylim=(0, 1.02))
right.plot(steps, np.median(residual, axis=0), color="tab:orange", label="median")
low, high = np.quantile(residual, [0.05, 0.95], axis=0)
right.fill_between(steps, low, high, color="tab:orange", alpha=0.25, label="90% of the images")
right.axhline(config.deq.f_tol, color="grey", linestyle="--", linewidth=1, label="tolerance")
right.set(xlabel="solver steps", ylabel="|f(z) - z| / |f(z)|", yscale="log")
right.legend()
plt.show()
print("\n".join(f"after {k:2d} steps: accuracy {accuracy[k - 1]:.3f}" for k in (1, 2, 3, 5, 10, 30)))

# %% [markdown]
# The accuracy is at its height long before the residual is at its lowest: the label is decided early, the rest of the solve
# moves digits behind the point. With a deep network you would have had to train one for every depth to draw this curve.
#
# ## Quick digits and slow ones
#
# Each image has its own residual and stops on its own. Here are the eight that reach the tolerance first and the eight that
# need longest, with their true label, what the model says, and the steps.

# %%
needed = 1 + np.sum(residual > config.deq.f_tol, axis=1)
order = np.argsort(needed, kind="stable")
said = probabilities[-1].argmax(axis=-1)

figure, axes = plt.subplots(2, 8, figsize=(10, 3.4))
for ax, i in zip(axes.flat, [*order[:8], *order[-8:]], strict=True):
    ax.imshow(digits.images[i, ..., 0], cmap="gray_r")
    color = "black" if said[i] == labels[i] else "tab:red"
    ax.set_title(f"{labels[i]} read as {said[i]}\n{min(needed[i], len(steps))} steps", fontsize=9, color=color)
    ax.axis("off")
figure.tight_layout()
plt.show()
print(f"solver steps: {needed.min()} at least, {np.median(needed):.0f} in the median, {min(needed.max(), len(steps))} at most")

# %% [markdown]
# Nobody told the solver what to take its time for, and slow is not wrong. The number of steps is a by-product of the solve; a
# batch is done when its slowest image is.
#
# ## Changing its mind
#
# Next, the probabilities of the ten classes while the solver runs, for the four images whose answer moved most after the
# first step. A column is a step, the bright row is the current answer.

# %%
moved = np.abs(probabilities - probabilities[-1:]).sum(axis=-1)[:8].sum(axis=0)
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True)
for ax, i in zip(axes, np.argsort(-moved)[:4], strict=True):
    ax.imshow(probabilities[:12, i].T, aspect="auto", vmin=0, vmax=1, extent=(0.5, 12.5, 9.5, -0.5))
    ax.set(title=f"a {labels[i]}", xlabel="solver steps", yticks=range(10))
    small = ax.inset_axes((0.68, 0.68, 0.3, 0.3))
    small.imshow(digits.images[i, ..., 0], cmap="gray_r")
    small.axis("off")
axes[0].set_ylabel("class")
plt.show()

# %% [markdown]
# ## Two resolutions settle together
#
# The state is a pair of feature maps, 8 x 8 and 4 x 4, and neither waits for the other. Shown is the root mean square over
# channels after some steps for one digit, and in the last column what the state still lacked after three steps.

# %%
chosen = (1, 2, 3, 5, 10, 30)
i = order[-1]
figure, axes = plt.subplots(2, len(chosen) + 1, figsize=(11, 3.4))
for row, maps, size in zip(axes, states, (8, 4), strict=True):
    maps = np.asarray(maps[:, i])  # [steps, height, width, channels]
    strength = np.sqrt(np.mean(maps**2, axis=-1))
    for ax, k in zip(row, chosen, strict=False):
        ax.imshow(strength[k - 1], vmin=0, vmax=strength.max())
        ax.set_title(f"{k} step{'s' * (k > 1)}", fontsize=9)
    row[-1].imshow(np.sqrt(np.mean((maps[2] - maps[-1]) ** 2, axis=-1)), vmin=0, vmax=strength.max())
    row[-1].set_title("3 steps - 30 steps", fontsize=9)
    row[0].set_ylabel(f"{size} x {size}")
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Where to go from here
#
# * `python -m experiments.mdeq_classify --config configs/mdeq_digits.py` trains the whole recipe; with `--mode anytime` it
#   prints and draws the table of the section on accuracy. What it reaches is in
#   [docs/mdeq.md](https://github.com/deqjax/deqjax/blob/main/docs/mdeq.md), with the recipes for CIFAR-10, ImageNet and
#   Cityscapes.
# * The recipe keeps solves short by a term of the loss, `config.deq.jac_loss_weight`, the Jacobian regularisation. Train with
#   0.5 and with 0: what becomes of the solver steps?
# * The notebook `ddim` solves for all steps of a diffusion model at once, `flow` begins a solve where the last one ended.
