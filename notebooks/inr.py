# %% [markdown]
# # A photograph as the fixed point of a network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/inr.ipynb)
#
# An implicit representation is a network from the coordinates of a pixel to its colour: the picture *is* the weights. Here
# the hidden layer is a fixed point (Huang, Bai and Kolter 2021, "(Implicit)^2"), so a single layer is applied as often as
# each pixel needs. You will fit a photograph, see how it appears step by step while the solver runs and which pixels take
# long, and then zoom in between the pixels. About half a minute of CPU time; on an accelerator the picture has sixteen times
# as many pixels.

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
# ## The picture
#
# `configs/inr_camera.py` fits the cameraman of scikit-image. If you have trained it (`python -m experiments.deq_inr --config
# configs/inr_camera.py`), its weights are used; otherwise they are fitted here: to every second pixel along each side on an
# accelerator, as the recipe does, to every eighth on a CPU.

# %%
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from deqjax import OneStep, Picard, fixed_point
from deqjax.cli import load_config
from deqjax.data.coordinates import coordinates, size
from deqjax.data.photographs import photograph
from deqjax.training.checkpoint import committed_steps
from deqjax.training.loop import train
from deqjax.training.mesh import place_whole
from deqjax.training.start import trained_model
from deqjax.viz import plot_convergence
from experiments.inr_pictures import comparison, displayed
from experiments.inr_signals import SignalTask
from experiments.inr_task import psnr

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config, workdir = load_config("configs/inr_camera.py"), Path("runs/inr_camera")
is_trained = bool(committed_steps(workdir))
if not is_trained:
    workdir = Path(tempfile.mkdtemp())
    if platform == "cpu":
        config.data.step, config.model.input_scale, config.steps = 8, 32.0, 300
task = SignalTask(config)
shape = task.signal.shape
original = task.signal.whole(0)  # [height, width, 1], from 0 to 1
print(f"{shape[0]} x {shape[1]} = {size(shape):,} pixels to fit")

# %% [markdown]
# ## Fitting
#
# All pixels are one batch, spread over the mesh. The solver runs at the first step only: from then on a step begins at the
# equilibrium of the last one and refines it with three evaluations of f, through which the gradient goes (a warm start).

# %%
if not is_trained:
    train(task, config, workdir)
model = trained_model(task, config, workdir)
net = model.signals.net
print(", ".join(f"{name} {value:.4g}" for name, value in task.evaluate(model, "valid").items()))

# %% [markdown]
# `psnr` is the quality in decibels, with each pixel solved from zero; the rest says how those solves went. In the log of the
# training, `psnr_warm` is the same from the states that it keeps, and `warm/gap` how far these are from the solutions.
#
# ## The picture appears
#
# Solve z = f(z) for every pixel at once and decode the state after 1, 2, 3, ... evaluations. The decoder has only ever seen
# equilibria. The last picture is the original.

# %%
shown = (1, 2, 3, 5, 8, 60)
x = place_whole(mesh, {"x": coordinates(np.arange(size(shape)), shape, task.signal.order)})["x"]


@nnx.jit
def solve(net, x):
    injection = net.encode(x, net.weights())
    solver = Picard(max_steps=shown[-1], tol=0.0)  # no pixel stops early, to see all of its residuals
    z = jnp.zeros_like(injection.shift)
    solution = fixed_point(lambda z: net.cell(z, injection), z, solver=solver, gradient=OneStep(), sample_at=shown)
    return [net.decode(z) for z in solution.samples], solution.stats


values, stats = solve(net, x)
pictures = [displayed(np.asarray(v), "image").reshape(*shape, -1) for v in values]
figure, axes = plt.subplots(1, len(shown) + 1, figsize=(14, 2.4))
for ax, picture, title in zip(axes, [*pictures, original], [*(f"{k} of f" for k in shown), "original"], strict=True):
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10)
    ax.axis("off")
plt.show()

# %% [markdown]
# One evaluation is the explicit network with the same weights, which makes little of them: they were fitted at the fixed
# point. A few evaluations later there is nothing to be seen of the difference from the last.
#
# ## Every pixel has a solve of its own
#
# Left, the residual of all pixels: each is a problem of its own and stops by itself. Right, a map of the steps that each
# pixel needs to the tolerance of the recipe (dashed on the left).

# %%
residual = np.minimum.accumulate(np.asarray(stats.abs_trace), axis=1)
needed = np.minimum(1 + np.sum(residual > config.deq.f_tol, axis=1), shown[-1])
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
plot_convergence(stats, left, mode="abs", tol=config.deq.f_tol)
picture = right.imshow(needed.reshape(shape), cmap="viridis", vmax=np.quantile(needed, 0.995))
right.set_title("solver steps")
right.axis("off")
figure.colorbar(picture, ax=right, extend="max")
plt.show()
print(f"solver steps: {needed.min()} to {needed.max()}, {needed.mean():.1f} on average")

# %% [markdown]
# Most pixels need about the same number of steps, a few need far more. How many depends on the derivative of f there, which
# the fit makes as it likes: nothing in the loss asks for it.
#
# ## What the fit leaves out
#
# Original, fit, and four times their difference.

# %%
plt.figure(figsize=(11, 4))
plt.imshow(comparison(original, pictures[-1])[..., 0], cmap="gray", vmin=0, vmax=1)
plt.axis("off")
plt.show()
weights = sum(p.size for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
print(f"{psnr(np.mean((original - pictures[-1]) ** 2)):.2f} dB with {weights:,} weights for {size(shape):,} pixels")

# %% [markdown]
# What is left is mostly fine detail, at edges and in the grass.
#
# ## Zooming in
#
# The network takes any coordinates, not only those of pixels. Here is the head of the cameraman: the pixels that were fitted,
# the network on a grid finer than these, and the photograph at its full resolution, of which the network has seen those
# pixels alone.

# %%
photo, step = photograph("camera")[..., 0] / 255, config.data.step
top, left, side, fine = 56, 128, 192, 256  # the window, in pixels of the photograph, and samples along a side of it

rows, columns = (start + np.arange(fine) * side / fine for start in (top, left))
places = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)  # column, row
x = 2 * (places / step) / (np.array(shape) - 1) - 1  # the first and the last fitted pixel are at -1 and 1
zoom = nnx.jit(lambda net, x: net(x).values[-1])(net, place_whole(mesh, {"x": x.astype(np.float32)})["x"])
zoom = displayed(np.asarray(zoom), "image").reshape(fine, fine)

figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
fitted = original[top // step : (top + side) // step, left // step : (left + side) // step, 0]
exact = photo[top : top + side, left : left + side]
titles = ("the pixels that were fitted", "the network, between the pixels", "the photograph")
for ax, picture, title in zip(axes, (fitted, zoom, exact), titles, strict=True):
    half = side / len(picture) / 2  # a pixel lies around its place
    extent = (left - half, left + side - half, top + side - half, top - half)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)
    ax.set(xlim=(left, left + side - step), ylim=(top + side - step, top), xticks=[], yticks=[], title=title)
plt.show()

# %% [markdown]
# Between the pixels the network goes on smoothly: the squares are gone. It does not know what no pixel showed it, so the
# photograph's own detail is missing; and where the fit is loose, it waves.
#
# ## Where to go from here
#
# * A picture of your own: `python -m experiments.deq_inr --config configs/inr_camera.py --config.data.path=photo.jpg
#   --config.data.step=1 --config.model.input_scale=200.` (half the number of pixels along a side). Its weights as a small file:
#   `--mode export`; that file at any resolution: `--mode render --config.render.scale=4`.
# * [docs/inr.md](https://github.com/deqjax/deqjax/blob/main/docs/inr.md) compares the equilibrium with explicit networks of
#   the same size, and has recipes for sound, video and solids.
