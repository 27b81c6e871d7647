"""IGNN on NCI1: see configs/ignn_mutag.py, whose recipe it is.

python -m experiments.ignn_graphs --config configs/ignn_nci1.py --mode folds
"""

import ml_collections

from configs import ignn_mutag


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ignn_mutag.get_config(variant)
    config.data.name = "NCI1"
    config.data.dir = "data/NCI1"
    config.steps = ignn_mutag.epochs(4110, 200)
    config.optimizer.decay_at = (ignn_mutag.epochs(4110, 50),)
    config.eval_every = ignn_mutag.epochs(4110, 1)
    return config
