# %% [markdown]
# # A language model whose hidden states are an equilibrium
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/language_model.ipynb)
#
# The DEQ transformer reads the Python manual, which every CPython carries: nothing is downloaded. You see it learn, how hard
# its equilibria are to find, what it writes, and how its perplexity depends on the number of solver steps. If `make demo` was
# run in this checkout, its model is used; otherwise a small one is trained here, in about a minute on two CPU cores, and the
# full recipe on an accelerator.

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
# ## The recipe
#
# An experiment is a config and a task. `configs/pydoc.py` is the recipe of `make demo`; the task knows the data, the model and
# the loss. On a CPU without a trained model, the cell below makes the recipe small.

# %%
import pathlib
import tempfile

import matplotlib.pyplot as plt

from deqjax.cli import load_config
from deqjax.data.text import unigram_perplexity
from deqjax.training.checkpoint import committed_steps
from experiments.deq_lm import LanguageModelTask

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config = load_config("configs/pydoc.py")
workdir = pathlib.Path("runs/pydoc")
trained_before = bool(committed_steps(workdir))
if not trained_before:
    scratch = pathlib.Path(tempfile.mkdtemp())
    workdir, config.data.dir = scratch / "run", str(scratch / "pydoc")
    if platform == "cpu":
        config.steps, config.log_every, config.eval_every, config.data.batch_size = 270, 15, 0, 8
        config.model.d_model = config.model.d_embed = 64
        config.model.n_head, config.model.d_inner = 2, 128
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 20
task = LanguageModelTask(config)
print(f"{len(task.corpus.train):,} tokens for training, {len(task.corpus.vocab):,} different ones")
print(task.corpus.vocab.decode(task.corpus.train[1000:1040]))

# %% [markdown]
# ## Training
#
# `train` is the loop of every experiment: it goes on where the working directory left off, saves, evaluates, and stops cleanly
# when you interrupt the cell (run it again to go on). Each line has the loss and, under `forward/` and `backward/`, how the
# solves went: mean evaluations of the cell, relative residual, share of segments that reached the tolerance.

# %%
from deqjax.training.loop import train

if trained_before:
    print(f"A run is in {workdir}: using its weights.")
else:
    train(task, config, workdir)

# %% [markdown]
# The same numbers are in `metrics.jsonl` of the working directory. Look at the loss beside what a solve costs:

# %%
from experiments.report import read_run

curves, _ = read_run(workdir)
panels = {
    "loss": ("train/loss", "valid/loss"),
    "evaluations of the cell": ("train/forward/steps", "train/backward/steps"),
    "relative residual": ("train/forward/rel", "train/backward/rel"),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
for axis, (label, names) in zip(axes, panels.items(), strict=True):
    for name in filter(curves.__contains__, names):
        axis.plot(*curves[name], marker="." if len(curves[name][0]) < 30 else None, label=name)
    axis.set_xlabel("training step")
    axis.set_ylabel(label)
    axis.legend(fontsize="small")
axes[2].set_yscale("log")
plt.show()

# %% [markdown]
# `python -m experiments.report WORKDIR` draws all of it, for several runs beside each other.
#
# ## One segment, solved
#
# A segment of text is one sample of the solve: the hidden states of all its words are found together, with the segments before
# it in a memory. Look at how its residual falls in evaluation.

# %%
from flax import nnx

from deqjax.models.transformer import Memory
from deqjax.training.start import trained_model
from deqjax.viz import plot_convergence

model = trained_model(task, config, workdir)
batch = task.data("valid").batch(0)
memory = Memory.empty(config.data.eval_batch_size, config.data.eval_mem_len, config.model.d_model)
solved = nnx.jit(lambda lm, tokens, memory: lm(tokens, memory))(model.lm, batch["tokens"], memory)
print(solved.stats.explain())
plot_convergence(solved.stats, tol=config.deq.f_tol)
plt.show()

# %% [markdown]
# One line is one of the parallel segments. What is decoded into words is the state at the end of the line.
#
# ## What it writes
#
# Words are generated one at a time. A word that was written stays as it is, and so does its hidden state: each new word is a
# solve of length one with the states before it as memory, started at the state of its predecessor.

# %%
for prompt, temperature in (("The following", 0.5), ("The following", 1.0)):
    config.generate.prompt, config.generate.temperature = prompt, temperature
    print(f"--- {prompt!r}, temperature {temperature}\n{task.generate(model)}\n")

# %% [markdown]
# At a low temperature the likely words come again and again, at a high one the rare ones too. How much of the manual's language
# is in the text depends on how long the model was trained: the few steps that a CPU takes here teach it little more than which
# signs are common. Compare with what `make demo` prints.
#
# ## Perplexity against solver steps
#
# An equilibrium model can be stopped anywhere: its depth is chosen when it is used. The same weights are evaluated with limits
# on the number of evaluations of the cell, each from scratch, on the whole validation text. Look where more steps stop helping.

# %%
limits = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40)
results = [task.evaluate(model, "valid", {"f_limit": limit, "f_tol": 0.0}) for limit in limits]
unigram = unigram_perplexity(task.corpus.train, task.corpus.valid, len(task.corpus.vocab))
print(f"{'evaluations':>12}{'perplexity':>12}{'residual':>10}")
for limit, result in zip(limits, results, strict=True):
    print(f"{limit:12}{result['perplexity']:12.1f}{result['forward/rel']:10.1e}")
print(f"a model of word frequencies alone: {unigram:.1f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
axes[0].plot(limits, [result["perplexity"] for result in results], marker="o")
axes[0].axhline(unigram, color="grey", linestyle="--", label="word frequencies alone")
axes[0].legend()
axes[0].set_ylabel("perplexity, validation")
axes[1].semilogy(limits, [result["forward/rel"] for result in results], marker="o")
axes[1].set_ylabel("relative residual")
for axis in axes:
    axis.set_xscale("log")
    axis.set_xlabel("evaluations of the cell")
plt.show()

# %% [markdown]
# The perplexity settles long before the residual does, and stays: more evaluations than the model was trained with change
# nothing, as they would if it had learnt a network of so many layers instead of a fixed point.
#
# The published recipe is `configs/wt103.py`; how it runs on many devices is said in
# [scaling](https://github.com/deqjax/deqjax/blob/main/docs/scaling.md).
