"""IGNN on COX2: see configs/ignn_mutag.py, whose recipe it is.

python -m experiments.ignn_graphs --config configs/ignn_cox2.py --mode folds
"""

import ml_collections

from configs import ignn_mutag


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ignn_mutag.get_config(variant)
    config.data.name = "COX2"
    config.data.dir = "data/COX2"
    config.steps = ignn_mutag.epochs(467, 200)
    config.optimizer.decay_at = (ignn_mutag.epochs(467, 50),)
    config.eval_every = ignn_mutag.epochs(467, 1)
    return config
