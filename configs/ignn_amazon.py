"""IGNN on Amazon: products bought together, 58 overlapping categories, no features but the graph.

    python -m experiments.ignn_nodes --config configs/ignn_amazon.py --config.data.portion=0.09

Paper: Implicit Graph Neural Networks (arXiv 2009.06211), figures of micro- and macro-F1 against the portion of labelled nodes
trained on (`data.portion`, 0.05 to 0.09). As in the paper, a product is given as many categories as it has. The data is the
prepared folder `amazon-all` of the SSE code, in `data.dir`; it cannot be downloaded by a program. Not reproduced here yet.

86 million parameters, two tables of 334,863 products. One graph cannot be split over devices: several repeat the same work
(`mesh.model`).
"""

import ml_collections

from configs import ignn_chains


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/ignn_amazon.py has no variant {variant!r}.")
    config = ignn_chains.get_config()
    config.seed = 2333
    config.data.name = "amazon"
    config.data.dir = "data/amazon-all"
    config.data.data_seed = 2333

    config.model.network = "amazon"
    config.model.init_weight = "uniform"
    config.model.n_hidden = 128
    config.model.kappa = 0.95
    config.model.spectral_radius = 1.00001

    config.deq.f_max_iter = config.deq.b_max_iter = 300
    config.deq.f_tol = config.deq.b_tol = 1e-5
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_options = ml_collections.ConfigDict()

    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 0.0
    config.clip_each = 0.0
    config.steps = 5000
    config.log_every = 10
    config.eval_every = 50
    config.checkpoint_every = 50
    config.best_metric = "f1"
    config.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": 1, "model": -1})
    return config
