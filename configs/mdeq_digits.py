"""MDEQ on the handwritten digits that scikit-learn carries: no download, minutes on two CPU cores.

    python -m experiments.mdeq_classify --config configs/mdeq_digits.py
    python -m experiments.mdeq_classify --config configs/mdeq_digits.py --mode anytime

Two feature maps of 8 x 8 and 4 x 4, a true equilibrium: Anderson in both directions, implicit gradients. Results: docs/mdeq.md.
"""

import ml_collections

from configs import mdeq_cifar10


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/mdeq_digits.py has no variant {variant!r}.")
    config = mdeq_cifar10.base("mdeq_digits")
    config.data.name = "digits"
    config.data.augment = "crop"
    config.data.pad = 1
    config.data.batch_size = 64
    config.data.image_size = 8
    config.data.mean, config.data.std = (0.305,), (0.376,)
    config.best_metric, config.best_mode = "loss", "min"

    config.model.head = "classification"
    config.model.n_classes = 10
    config.model.in_channels = 1
    config.model.channels = (16, 16)
    config.model.head_channels = (8, 16)
    config.model.final_channels = 64
    config.model.n_groups = 4
    config.model.expansion = 3.0
    config.model.init = "uniform"
    config.model.dropout = 0.1

    config.deq.hook_ift = True
    config.deq.f_max_iter = 24
    config.deq.b_max_iter = 24
    config.deq.eval_f_max_iter = 30
    config.deq.jac_loss_weight = 0.5
    config.deq.jac_loss_freq = 0.3

    config.optimizer.learning_rate = 2e-3
    config.steps = 500
    config.eval_every = 250
    config.checkpoint_every = 100
    return config
