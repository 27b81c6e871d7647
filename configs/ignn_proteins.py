"""IGNN on PROTEINS: see configs/ignn_mutag.py, whose recipe it is.

python -m experiments.ignn_graphs --config configs/ignn_proteins.py --mode folds
"""

import ml_collections

from configs import ignn_mutag


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ignn_mutag.get_config(variant)
    config.data.name = "PROTEINS"
    config.data.dir = "data/PROTEINS"
    config.steps = ignn_mutag.epochs(1113, 200)
    config.optimizer.decay_at = (ignn_mutag.epochs(1113, 50),)
    config.eval_every = ignn_mutag.epochs(1113, 1)
    return config
