"""IGNN on chains: is a class that only the first node of a chain knows remembered at its end? No download.

    python -m experiments.ignn_nodes --config configs/ignn_chains.py --config.data.length=50
    python -m experiments.ignn_chain_lengths --config configs/ignn_chains.py --workdir runs/chain_lengths

Paper: Implicit Graph Neural Networks (arXiv 2009.06211), figure 1. Two classes, 20 chains of each, 20 nodes to train on.
`data.length` and `data.classes` say how long and how many. Results, their time and hardware: docs/ignn.md.

The zoo's own settings (variant `:zoo`: one-step gradient, weight normalisation, absolute tolerance 1e-3) fail from length 20
on. These four differ:

* The gradient is implicit, because a gradient of k steps sees k hops.
* A solve takes at least two steps a node, because states fade by a fifth or more at every hop, and what reaches the end of a
  long chain lies below any tolerance.
* There is no weight normalisation, because weight decay shrinks a weight without gradient to nothing, which cannot be
  normalised.
* W starts as a multiple of the identity: from the paper's uniform weights some seeds never learn length 100.
"""

import ml_collections
from ml_collections import config_dict

VARIANTS = ("", "zoo")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/ignn_chains.py has no variant {variant!r}; there is: zoo.")
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.name = "chains"
    config.data.dir = ""
    config.data.length = config_dict.FieldReference(10)
    config.data.classes = 2
    config.data.chains = 0  # per class; 0: 20, and more for chains below 8
    config.data.features = 100
    config.data.noise = 0.0
    config.data.split = "fixed"  # "percent": 5, 10 and 85% of the nodes, as later papers have it
    config.data.portion = 0.06  # of Amazon's labelled nodes, to train on
    config.data.select = "valid"  # "test" chooses the best weights by the test nodes, as the original of some data sets does
    config.data.data_seed = 42
    config.data.batch_size = 0  # graphs per step; 0: all
    config.data.buckets = 4

    config.model = ml_collections.ConfigDict()
    config.model.network = "chains"
    config.model.n_hidden = 16
    config.model.kappa = 0.9
    # One for all; None measures each graph's own. With the originals' margin.
    config.model.spectral_radius = config_dict.placeholder(float)
    config.model.spectral_radius = 1.00001
    config.model.dropout = 0.5
    config.model.omega_2 = config_dict.placeholder(bool)
    config.model.samples = "graphs"
    config.model.init_weight = "identity"  # "uniform" as in the paper
    config.model.init_power_iters = 20
    config.model.aggregation = "auto"
    config.explicit_layers = 0  # T: a graph convolutional network of T layers instead

    config.deq = ml_collections.ConfigDict()
    config.deq.core = "sliced"
    config.deq.f_solver = "fixed_point_iter"
    config.deq.f_max_iter = config.data.get_ref("length") * 2 + 200
    config.deq.f_tol = 1e-6
    config.deq.f_stop_mode = "rel"
    config.deq.b_solver = "fixed_point_iter"
    config.deq.b_max_iter = config.data.get_ref("length") * 2 + 200
    config.deq.b_tol = 1e-6
    config.deq.b_stop_mode = "rel"
    # Not before what the first node says has come to the last: that takes about 2 steps a node, and what comes is so small
    # that no tolerance sees it.
    config.deq.f_options = ml_collections.ConfigDict({"burn_in": config.data.get_ref("length") * 2 + 20})
    config.deq.b_options = ml_collections.ConfigDict({"burn_in": config.data.get_ref("length") * 2 + 20})
    config.deq.eval_f_max_iter = 0
    config.deq.eval_factor = 1.0
    config.deq.eval_f_tol = config_dict.placeholder(float)  # f_tol
    config.deq.preset = config_dict.placeholder(str)  # "torchdeq": the original's solvers, step for step
    config.deq.ift = False
    config.deq.hook_ift = True
    config.deq.grad = 1
    config.deq.tau = 1.0
    config.deq.remat = False
    config.deq.norm_type = "none"
    config.deq.norm_no_scale = False
    config.deq.norm_clip = False
    config.deq.norm_clip_value = 1.0
    config.deq.norm_target_norm = 1.0
    config.deq.sn_n_power_iters = 1

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip = 0.0
    config.clip_each = 0.5  # the gradient of every parameter on its own
    config.steps = 600

    config.log_every = 100
    config.eval_every = 100
    config.checkpoint_every = 500
    config.keep = 1
    config.best_metric = "accuracy"
    config.best_mode = "max"
    config.max_bad_steps = 20
    config.resume = ""
    config.init_from = ""
    config.export_path = "ignn.safetensors"
    config.tensorboard = False
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "model": 1})

    # Of experiments.ignn_chain_lengths.
    config.sweep = ml_collections.ConfigDict()
    config.sweep.lengths = (10, 20, 30, 50, 100)
    config.sweep.seeds = (0, 1, 2)
    config.sweep.explicit_layers = (2, 10)

    if variant == "zoo":
        config.deq.preset = "torchdeq"
        config.deq.f_max_iter = config.deq.b_max_iter = 40
        config.deq.f_tol = 1e-3
        config.deq.f_stop_mode = config.deq.b_stop_mode = "abs"
        config.deq.f_options = ml_collections.ConfigDict()
        config.deq.b_options = ml_collections.ConfigDict()
        config.deq.hook_ift = False
        config.deq.norm_type = "weight_norm"
        config.model.init_weight = "uniform"
        config.steps = 2000
    return config
