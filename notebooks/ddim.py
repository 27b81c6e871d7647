# %% [markdown]
# # All steps of a diffusion model at once
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/ddim.ipynb)
#
# A diffusion model makes an image from noise by many calls of a network, each waiting for the one before. The whole chain of
# states is also the solution of one equation, and a solver finds all of them together: every iteration is one call on a large
# batch, and a few iterations are enough ([Pokle et al. 2022](https://arxiv.org/abs/2210.12867)). You will train a small model
# of handwritten digits, sample the same images in sequence and in parallel, and look at both as filmstrips. About a minute
# and a half of CPU time; on an accelerator the training is that of the recipe.

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
# ## The model
#
# `configs/ddim_digits.py` has the recipe: a U-Net that predicts the noise in an image. If you have trained it (`python -m
# experiments.deq_ddim --config configs/ddim_digits.py`), its weights are used. Otherwise it is trained here: as the recipe
# says on an accelerator; with fewer pixels and steps on a CPU, where the digits come out rough.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from deqjax.cli import load_config
from deqjax.data.unlabelled_images import take
from deqjax.models.ddim import chain_denoiser, sample_ddim, solve_joint
from deqjax.training.checkpoint import committed_steps
from deqjax.training.loop import train
from deqjax.training.start import trained_model
from experiments.ddim_pictures import tiled
from experiments.ddim_sampling import Sampler, compare
from experiments.deq_ddim import DiffusionTask

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config, workdir = load_config("configs/ddim_digits.py"), Path("runs/ddim_digits")
is_trained = bool(committed_steps(workdir))
if not is_trained:
    workdir = Path(tempfile.mkdtemp())
    if platform == "cpu":
        config.model.image_size, config.model.attention, config.ema = 8, (), 0.98
        config.steps, config.eval_every, config.log_every, config.checkpoint_every = 280, 0, 20, 0
        config.optimizer.warmup_steps = 20
task = DiffusionTask(config)
if not is_trained:
    train(task, config, workdir)
model = trained_model(task, config, workdir)

# %% [markdown]
# ## One call after the other
#
# The sequential sampler (DDIM) starts from noise and calls the network once for every timestep. First some digits that were
# trained on, then new ones.


# %%
def show(images, columns, width, **labels):
    """Images `[N, H, W, 1]` from -1 to 1 in a grid."""
    page = tiled(images, columns)[..., 0]
    ax = plt.figure(figsize=(width, width * page.shape[0] / page.shape[1])).add_subplot()
    ax.imshow(page, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[], **labels)
    plt.show()


sequential = Sampler(config, task.rates, model, "sequential")
x_T, _ = sequential.latents(range(16))
one_by_one = sequential(x_T)
show(take(task.splits["train"], range(16)) / 127.5 - 1, 8, 7, xlabel="trained on")
show(one_by_one.images, 8, 7, xlabel="sampled, one call after the other")
print(f"{one_by_one.calls} calls of the network, one after the other")

# %% [markdown]
# ## All at once
#
# The parallel sampler guesses the whole trajectory (the noise in every place), calls the network on all timesteps together,
# sums up what the chain would have made of that, and repeats. Timestep k depends on earlier ones only, so it is exact after k
# iterations at the latest; Anderson's method gets there much sooner. The timesteps are spread over the devices of the mesh.

# %%
parallel = Sampler(config, task.rates, model, "parallel")
at_once = parallel(x_T)
show(at_once.images, 8, 7, xlabel="sampled, all at once")
print(f"{at_once.calls} calls in sequence instead of {one_by_one.calls}")
print(f"{at_once.evaluations / len(x_T):.0f} evaluations of the network for each image instead of {one_by_one.calls}")
print(f"largest difference of a pixel, on a scale from -1 to 1: {np.abs(at_once.images - one_by_one.images).max():.1e}")

# %% [markdown]
# The same images. It is not an approximation that trades quality for speed: the tolerance decides how close they are. (Without
# the precision set above, an accelerator's rounding would decide.)
#
# ## The filmstrip
#
# For three latents, each in two rows. Upper row: the sequential sampler, its state after every few calls. Lower row: the
# parallel one, its image after every iteration. Both begin with the same noise and end with the same digit.

# %%
few, chain = x_T[0:12:4], parallel.chain


def in_parallel(model, x):
    return solve_joint(parallel.system(model), x, solver=parallel.solver, record=True)


def in_sequence(model, x):
    return sample_ddim(chain_denoiser(model, chain), chain, x)


solution = parallel.compiled(in_parallel)(few)
calls, T = int(solution.calls), len(chain)
states = np.asarray(parallel.compiled(in_sequence)(few).trajectory)  # [images, T, height, width, 1]
images = np.asarray(solution.record.images)[:calls]  # [iterations, images, ...]

frames = min(14, calls)
at_call, at_iteration = (np.linspace(0, n - 1, frames).round().astype(int) for n in (T, calls))
strip = np.stack([states[:, at_call], np.moveaxis(images[at_iteration], 0, 1)], axis=1)
show(strip.reshape(-1, *strip.shape[3:]), frames, 12, xlabel=f"call 1 ... {T} above, iteration 1 ... {calls} below")

# %% [markdown]
# In sequence the digit comes out of the noise only at the end. In parallel the first guess at the whole digit is there at
# once, and iterations correct it.
#
# ## The equilibrium, timestep by timestep
#
# The residual of each timestep at each iteration, for the first image. Timesteps run downwards, from noise to image.

# %%
calls = int(solution.stats.steps[0])
residuals = np.asarray(solution.record.residuals)[:calls, 0]  # [iterations, T]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
extent = (0.5, calls + 0.5, T, 0)
picture = left.imshow(np.clip(residuals, config.sampler.tol / 10, None).T, aspect="auto", norm="log", extent=extent)
left.set(xlabel="iteration", ylabel="step of the chain")
figure.colorbar(picture, ax=left, label="residual")
right.semilogy(np.arange(1, calls + 1), np.nanmax(residuals, axis=1), marker="o")
right.axhline(config.sampler.tol, color="grey", linestyle="--", linewidth=1)
right.set(xlabel="iteration", ylabel="residual of the worst timestep")
plt.show()

# %% [markdown]
# White are timesteps that are done: they have left the computation. The front moves down far faster than the one step per
# iteration that a sequential sampler makes.
#
# ## What it gains, and what it costs
#
# The experiment's own comparison, for several lengths of the chain. Iterations grow far slower than the length, and a device
# with room for a large batch turns that into time. A CPU has no such room: an iteration costs it nearly as much as its calls
# would one after the other, so that there the speed-up is below one. What does your device say?

# %%
config.compare.timesteps, config.compare.repeats = ((10, 100), 1) if platform == "cpu" else ((10, 50, 200, 1000), 3)
display(Markdown(compare(config, task.rates, model)))

# %% [markdown]
# ## Where to go from here
#
# * Try `config.sampler.solver = "picard"`, or `config.sampler.data_variance = 0` (the paper's system) before the sampler
#   is made: how many iterations then?
# * `python -m experiments.deq_ddim --config configs/ddim_digits.py` trains the whole recipe; `--mode sample`, `--mode
#   compare` and `--mode invert` (latents of given images, by a gradient through the equilibrium) go on from there. Results,
#   and recipes for CIFAR-10, CelebA and LSUN with published weights:
#   [docs/ddim.md](https://github.com/deqjax/deqjax/blob/main/docs/ddim.md).
