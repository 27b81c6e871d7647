"""IGNN on PPI: 24 tissues, 121 labels per protein, micro-F1 on tissues never seen.

    python -m experiments.ignn_nodes --config configs/ignn_ppi.py
    python -m experiments.ignn_nodes --config configs/ignn_ppi.py --mode eval --config.init_from=ignn-ppi-1.pth

Papers: Implicit Graph Neural Networks (arXiv 2009.06211), micro-F1 97.6; TorchDEQ (arXiv 2310.18605), whose DEQ Zoo reports
for its three checkpoints, validation / test:

| ignn-ppi-1 | ignn-ppi-2 | ignn-ppi-3 |
|---|---|---|
| 97.78 / 98.56 | 97.88 / 98.65 | 98.16 / 98.83 |

For these the best epoch was chosen by the test tissues (`data.select=test`). The data is downloaded on first use (`data.dir`).
Not reproduced here yet. Variants: `:ift` the implicit gradient at a tolerance that makes it one; `:original` the original
repository's network and gradient; `:synthetic` random graphs of PPI's sizes, to try the recipe without the data (after a plus
sign with another: `:ift+synthetic`).
"""

import ml_collections

from configs import ignn_chains

VARIANTS = ("zoo", "ift", "original", "synthetic")


def get_config(variant: str = "zoo") -> ml_collections.ConfigDict:
    chosen = variant.split("+")
    for name in chosen:
        if name not in VARIANTS:
            raise ValueError(f"configs/ignn_ppi.py has no variant {name!r}; there are: {', '.join(VARIANTS)}.")
    config = ignn_chains.get_config()
    config.data.name = "ppi_synthetic" if "synthetic" in chosen else "ppi"
    config.data.dir = "data/ppi"
    config.data.data_seed = 0
    config.data.batch_size = 1

    config.model.network = "ppi"
    config.model.init_weight = "uniform"
    config.model.n_hidden = 256
    config.model.kappa = 0.98
    config.model.spectral_radius = None

    config.deq.f_max_iter = config.deq.b_max_iter = 40
    config.deq.f_tol = 1e-3
    config.deq.b_tol = 1e-6
    config.deq.f_stop_mode = config.deq.b_stop_mode = "abs"
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_options = ml_collections.ConfigDict()
    config.deq.hook_ift = False
    config.deq.grad = 5
    config.deq.tau = 0.5
    config.deq.norm_type = "spectral_norm"
    config.deq.norm_clip = True

    config.optimizer.learning_rate = 0.005
    config.optimizer.weight_decay = 0.0
    config.clip_each = 0.0
    config.steps = 20_000  # 1000 epochs of 20 graphs
    config.log_every = 20
    config.eval_every = 20
    config.checkpoint_every = 200
    config.best_metric = "f1"
    config.export_path = "ignn_ppi.safetensors"

    if "ift" in chosen or "original" in chosen:
        config.deq.f_max_iter = config.deq.b_max_iter = 300
        config.deq.f_tol = config.deq.b_tol = 1e-5
        config.deq.f_stop_mode = config.deq.b_stop_mode = "rel"
        config.deq.hook_ift = True
        config.deq.grad = 1
        config.deq.tau = 1.0
    if "ift" in chosen:
        config.deq.f_solver = config.deq.b_solver = "anderson"
    if "original" in chosen:
        config.model.omega_2 = False
        config.deq.norm_type = "none"
        config.deq.norm_clip = False
    return config
