# %% [markdown]
# # News from the far end: an implicit graph network on chains
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/ignn.ipynb)
#
# In a graph convolutional network every layer lets a node hear its neighbours, so T layers hear T hops and no further. An
# implicit graph network ([IGNN](https://arxiv.org/abs/2009.06211)) asks for the fixed point of one such layer, in which all
# hops are in. The test for it is a chain whose class only the first node knows. You will train both kinds, see up to which
# node each still knows the answer, and watch the information travel along the chain, one node a step, while the fixed point
# is being found. About half a minute of CPU time; on an accelerator the chains are longer and the training is that of the
# recipe.

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
# ## The task
#
# Chains of two classes. The features of a chain's first node name its class; all other nodes have none. Edges lead from each
# node to the next. The label of *every* node is the class of its chain, so the last node has to hear of the first one.

# %%
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from deqjax.cli import load_config
from deqjax.training.checkpoint import committed_steps
from deqjax.training.loop import train
from deqjax.training.mesh import place_whole
from deqjax.training.start import trained_model
from deqjax.viz import plot_convergence
from experiments.ignn_nodes import NodeTask, graphs_of

# Accelerators round products to few bits unless told not to, and a fixed point is no closer than what f is rounded to.
jax.config.update("jax_default_matmul_precision", "highest")

config, workdir = load_config("configs/ignn_chains.py"), Path("runs/ignn_chains")
is_trained = bool(committed_steps(workdir))
if is_trained:  # by python -m experiments.ignn_nodes --config configs/ignn_chains.py --config.data.length=...
    config.data.length = json.loads((workdir / "config.json").read_text())["data"]["length"]
else:
    workdir = Path(tempfile.mkdtemp())
    config.data.length = 30 if platform == "cpu" else 100
    config.steps, config.eval_every = (200, 50) if platform == "cpu" else (600, 100)
length = config.data.length

figure, ax = plt.subplots(figsize=(10, 1.5))
for y, color in enumerate(("tab:blue", "tab:orange")):
    for x in range(10):
        ax.scatter(x, y, s=300, color=color if x == 0 else "white", edgecolor="black", zorder=2)
        ax.text(x, y, "" if x == 0 else "?", ha="center", va="center")
        ax.annotate("", (x + 0.85, y), (x + 0.15, y), arrowprops={"arrowstyle": "->"})
    ax.text(10, y, f"... {length} nodes", va="center")
ax.set(xlim=(-0.5, 11.5), ylim=(-0.6, 1.6))
ax.axis("off")
plt.show()

# %% [markdown]
# ## Three networks, one recipe
#
# `configs/ignn_chains.py` trains the implicit network; with `explicit_layers` it trains a graph convolutional network of so
# many layers on the same data. The labels of twenty nodes are known, on all the others the networks are tested. If you have
# trained the recipe in `runs/ignn_chains`, its weights are taken for the implicit network.

# %%
models = {}
for name, layers in (("GCN, 2 layers", 2), ("GCN, 10 layers", 10), ("IGNN", 0)):
    print(f"--- {name}")
    config.explicit_layers = layers
    task, folder = NodeTask(config), workdir if layers == 0 else Path(tempfile.mkdtemp())
    if not committed_steps(folder):
        train(task, config, folder)
    models[name] = trained_model(task, config, folder)

# %% [markdown]
# ## Up to which node?
#
# Now the accuracy at every place in the chain, over all nodes whose labels the training did not see. The dashed line is
# chance.

# %%
examples = task.splits["train"]
batch = place_whole(mesh, task.collate(examples))
labels, known = np.asarray(batch["labels"])[:, :length], np.asarray(batch["counted"])[:, :length]
tested = ~known & (np.arange(len(labels))[:, None] < len(examples))  # rows beyond only fill up the mesh


@nnx.jit
def classify(model, batch):
    out = model(graphs_of(batch))
    return jnp.argmax(out.logits, axis=-1), out.stats


figure, ax = plt.subplots(figsize=(9, 3.5))
for name, model in models.items():
    right = np.asarray(classify(model, batch)[0])[:, :length] == labels
    accuracy = np.sum(right & tested, axis=0) / np.sum(tested, axis=0)
    ax.plot(np.arange(length), accuracy, marker=".", label=name)
    print(f"{name}: accuracy {np.mean(right[tested]):.3f}, at the last node {accuracy[-1]:.3f}")
ax.axhline(0.5, color="grey", linestyle="--", linewidth=1)
ax.set(xlabel="hops from the node that knows", ylabel="accuracy", ylim=(0, 1.05))
ax.legend()
plt.show()

# %% [markdown]
# Beyond its last layer an explicit network guesses, however long it is trained: nothing of the first node reaches it there.
# Of the twenty labels it can learn from those within its reach alone, so that two layers may learn nothing at all. The
# implicit network has the weights of a single layer, and no such limit.
#
# ## The fixed point, node by node
#
# How does one layer carry so far? Follow the plain iteration z, f(z), f(f(z)), ... on one chain. Left: how far each node's
# state is from its equilibrium after so many iterations: black where no news has arrived, bright where it is at rest. Right:
# the length of the states at equilibrium, on a logarithmic scale.

# %%
ignn = models["IGNN"]
chain = {name: array[:1] for name, array in task.collate(examples).items()}
n_iterations = 2 * length + 20


@nnx.jit
def iterate(model, batch):
    graphs = graphs_of(batch)
    adjacency, mask, x = model.encode(graphs)
    layer = model.layers[0]
    injection = layer.encode(x, adjacency, mask, model.radius(graphs))

    def step(z, _):
        return layer.cell(z, injection), z

    equilibrium = layer.solve(injection).states[-1]
    return jax.lax.scan(step, jnp.zeros_like(injection.b), length=n_iterations)[1][:, 0], equilibrium[0]


iterates, equilibrium = (np.asarray(z)[..., :length, :] for z in iterate(ignn, chain))
size = np.linalg.norm(equilibrium, axis=-1)  # [nodes]
apart = np.linalg.norm(iterates - equilibrium, axis=-1) / np.maximum(size, 1e-30)  # [iterations, nodes]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), gridspec_kw={"width_ratios": (3, 2)})
picture = left.imshow(apart.clip(1e-6, 1).T, aspect="auto", norm="log", cmap="magma_r", origin="lower")
left.set(xlabel="iterations", ylabel="hops from the node that knows")
figure.colorbar(picture, ax=left, label="|z - z*| / |z*|")
right.semilogy(np.arange(length), size)
right.set(xlabel="hops from the node that knows", ylabel="|z*|")
figure.tight_layout()
plt.show()

# %% [markdown]
# News advances by one node an iteration at most, and a node settles after the one before it has. On its way the state
# shrinks: the layer has to contract for its fixed point to exist, and what contracts fades. (The last node has no successor,
# and the normalisation of the graph scales it up.) The direction of the state survives, and the network classifies by
# direction alone. That is also why the recipe makes every solve take two steps a node before it may stop (`burn_in`): the
# last nodes' states are so small that they hardly count in the residual of the chain, which the next picture shows.

# %%
_, stats = classify(ignn, batch)
ax = plot_convergence(jax.tree.map(lambda x: x[: len(examples)], stats[0]), tol=config.deq.f_tol)
ax.set_title("residual of a solve, all chains")
plt.show()
print(f"solver steps: {np.asarray(stats[0].steps)[: len(examples)].mean():.1f}; nodes in a chain: {length}")

# %% [markdown]
# ## Where to go from here
#
# * Change `config.data.length` in the second cell and run the notebook again. The longer the chain, the more steps the
#   training takes: the recipe has 600.
# * `python -m experiments.ignn_chain_lengths --config configs/ignn_chains.py --workdir runs/chain_lengths` draws accuracy
#   against length for several seeds. Its results are in
#   [docs/ignn.md](https://github.com/deqjax/deqjax/blob/main/docs/ignn.md), with the recipes for proteins, molecules and
#   products.
