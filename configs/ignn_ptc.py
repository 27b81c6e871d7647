"""IGNN on PTC_MR: see configs/ignn_mutag.py, whose recipe it is.

python -m experiments.ignn_graphs --config configs/ignn_ptc.py --mode folds
"""

import ml_collections

from configs import ignn_mutag


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ignn_mutag.get_config(variant)
    config.data.name = "PTC_MR"
    config.data.dir = "data/PTC_MR"
    config.steps = ignn_mutag.epochs(344, 200)
    config.optimizer.decay_at = (ignn_mutag.epochs(344, 50),)
    config.eval_every = ignn_mutag.epochs(344, 1)
    return config
