"""DEQ-Flow on KITTI 2015, the last stage of training.

    python -m experiments.deq_flow --config configs/flow_kitti.py:huge --config.init_from=runs/flow_sintel_huge
    python -m experiments.deq_flow --config configs/flow_kitti.py:huge --mode submit --config.submit.path=submission

Paper: Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442); recipe of the authors' first version: 36 steps of Broyden's
method, six states with one-step gradients. Not reproduced here yet.

Variants as in configs/flow_sintel.py.
"""

import ml_collections

from configs import flow_sintel


def get_config(variant: str = "huge") -> ml_collections.ConfigDict:
    config = flow_sintel.get_config(variant)
    config.data.stage = "kitti"
    config.data.crop = (288, 960)
    config.deq.grad = 1
    config.submit.set = "kitti"

    config.optimizer.learning_rate = 1e-4
    config.steps = 50_001
    return config
