"""IGNN on graphs whose class depends on nodes that lie far apart: no download, minutes on two CPU cores.

    python -m experiments.ignn_graphs --config configs/ignn_demo_graphs.py
    python -m experiments.ignn_graphs --config configs/ignn_demo_graphs.py --config.explicit_layers=2

Each graph is two paths; one begins with A, one with B, and the end of one is flagged: which? (`deqjax/data/letters.py` has
the rule.) A network that looks 2 hops far cannot do better than chance on paths of 6 to 9 nodes. Results: docs/ignn.md.
"""

import ml_collections

from configs import ignn_mutag


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/ignn_demo_graphs.py has no variant {variant!r}.")
    config = ignn_mutag.get_config()
    config.data.name = "letters"
    config.data.dir = ""
    config.data.graphs = 1000
    config.data.shortest = 6
    config.data.longest = 9
    config.data.data_seed = 0
    config.data.shuffle = True
    config.data.select = "valid"

    config.model.n_hidden = 32
    config.model.dropout = 0.0

    # An equilibrium, and its own gradient.
    config.deq.f_max_iter = config.deq.b_max_iter = 100
    config.deq.f_tol = config.deq.b_tol = 1e-5
    config.deq.f_stop_mode = config.deq.b_stop_mode = "rel"
    config.deq.hook_ift = True
    config.deq.grad = 1
    config.deq.tau = 1.0

    config.optimizer.learning_rate = 0.003
    config.optimizer.schedule = "constant"
    config.steps = 400
    config.log_every = 50
    config.eval_every = 50
    config.checkpoint_every = 200
    return config
