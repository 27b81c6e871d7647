# %% [markdown]
# # Optical flow, and a clip in which every solve begins where the last one ended
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/flow.ipynb)
#
# Optical flow says for every pixel of a frame where it is in the next one. [DEQ-Flow](https://arxiv.org/abs/2204.08442) finds
# it as the fixed point of an update that looks up how well the frames match, and corrects. You will see flow and error on
# photographs that a small model has not seen in training, and then follow a moving camera: between frames little changes, so a
# solve that begins at the last pair's solution needs fewer steps. Less than a minute of CPU time, with weights that come along;
# on an accelerator you train them first.

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
# The recipe is `configs/flow_warped_photos.py`: photographs warped by known fields. If you have trained it (`python -m
# experiments.deq_flow --config configs/flow_warped_photos.py`), its weights are used. Otherwise an accelerator trains it here,
# and a CPU, which takes minutes for that (docs/flow.md), takes weights that were trained so and rounded to 16 bits.

# %%
import itertools
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from deqjax.cli import load_config
from deqjax.data.flow_colors import flow_to_image
from deqjax.training.checkpoint import committed_steps
from deqjax.training.loop import train
from deqjax.training.start import trained_model
from experiments.deq_flow import FlowTask
from experiments.flow_evaluation import carried_on, estimator
from experiments.flow_warm_start import LEVELS, glide, residuals, steps_to

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config, workdir = load_config("configs/flow_warped_photos.py"), Path("runs/flow_warped_photos")
config.data.dir = tempfile.mkdtemp()  # the warped photographs are written there
is_trained = bool(committed_steps(workdir))
if not is_trained:
    workdir = Path(tempfile.mkdtemp())
    config.data.batch_size = -(-config.data.batch_size // n_devices) * n_devices  # as the devices share evenly
    if platform == "cpu":
        config.init_from = "notebooks/flow_warped_photos.safetensors"
        config.data.n_train, config.data.n_valid = 1, 8  # pairs to write
config.viz.steps = (1, 2, 4, 8, 16, 40)  # at which to draw the error
task = FlowTask(config)

# %% [markdown]
# The loss is taken at several states on the way to the fixed point, each with the gradient of one step.

# %%
if not is_trained and not config.init_from:
    train(task, config, workdir)
model = trained_model(task, config, workdir)

# %% [markdown]
# ## Flow on photographs that training never showed
#
# Pairs from two photographs kept for validation. Hue is the direction of the flow, saturation its
# length; where the truth is unknown, because a pixel leaves the frame, it is black. Look whether the colours of the estimate
# are those of the truth.

# %%
folder = Path(tempfile.mkdtemp())
task.show(model, folder)
plt.figure(figsize=(12, 7))
plt.imshow(plt.imread(folder / "samples.png"))
plt.axis("off")
plt.show()

# %% [markdown]
# The numbers beside the last column are the mean errors of the pairs, in pixels.
#
# ## Residual and error, step by step
#
# For the same pairs: one solve, and after some of its steps the residual of the best state so far (blue) and the error of the
# flow that is decoded from it (red).

# %%
plt.figure(figsize=(7, 5))
plt.imshow(plt.imread(folder / "convergence.png"))
plt.axis("off")
plt.show()
print(f"solver steps in training: {config.deq.f_max_iter}")

# %% [markdown]
# The model has its flow after a few steps; the residual goes on falling, the error stays, for the flow is at rest.
#
# ## A clip
#
# The camera glides over a photograph of the training set and turns slowly. Each pair begins at the hidden state and the flow of
# the pair before. All pictures of the lower row have nearly one colour, that of the direction in which the picture moves.

# %%
clip = glide(9, tuple(config.data.size), motion=0.4 * config.data.motion)
estimate, start, colours = estimator(model, "sintel"), None, []  # on the mesh
for first, second in itertools.pairwise(clip):
    found = estimate(first, second, start)
    start = carried_on(found.z, warm_start=False, fixed_point_reuse=True)
    colours.append(flow_to_image(np.asarray(found.flow[0]), longest=config.data.motion))

figure, axes = plt.subplots(2, len(colours), figsize=(13, 2.8))
for column, frame, colour in zip(axes.T, clip, colours, strict=False):
    column[0].imshow(frame)
    column[1].imshow(colour)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("frame")
axes[1, 0].set_ylabel("flow")
plt.show()

# %% [markdown]
# ## Warm against cold
#
# All pairs but the first are solved three times: *cold*, from zero; with a *warm start*, the flow of the pair before, carried
# along by itself; and with *fixed point reuse*, its hidden state as well. Left, the residual on average over pairs. Right,
# the steps until it is below some levels, as parts of the first residual of a cold solve.

# %%
traces = residuals(model, clip, 40)
del traces["both"]  # counts the flow twice, see docs/flow.md
first = traces["cold"][:, 0].mean()
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
for k, (way, trace) in enumerate(traces.items()):
    left.semilogy(np.arange(1, 41), np.minimum.accumulate(trace, axis=1).mean(axis=0), label=way)
    needed = [np.mean([steps_to(t, level * first) for t in trace]) for level in LEVELS]
    right.bar(np.arange(len(LEVELS)) + 0.27 * (k - 1), needed, 0.25)
    print(f"{way:18s}" + "".join(f"  to {level:g}: {n:4.1f} steps" for level, n in zip(LEVELS, needed, strict=True)))
left.set(xlabel="solver steps", ylabel="|f(z) - z|")
left.legend()
right.set_xticks(range(len(LEVELS)), [f"{level:g}" for level in LEVELS])
right.set(xlabel="residual, as a part of the first", ylabel="solver steps")
plt.show()

# %% [markdown]
# With the hidden state of the last pair a solve begins closer to its end, and needs fewer steps. A fixed point does not
# depend on where the solver begins, as long as there is only one in reach: in a video, what the last pair was solved for is
# not lost.
#
# ## Where to go from here
#
# * `python -m experiments.deq_flow --config configs/flow_warped_photos.py` trains the recipe, and `--mode viz
#   --config.viz.input=clip.mp4` draws the flow of a video of yours, warm with `--config.fixed_point_reuse=True`.
# * `python -m experiments.flow_warm_start --config configs/flow_warped_photos.py` prints the table of the last section for
#   it.
# * Results, the published recipes and how to read published weights:
#   [docs/flow.md](https://github.com/deqjax/deqjax/blob/main/docs/flow.md).
