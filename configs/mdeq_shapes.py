"""MDEQ that segments synthetic discs, squares and triangles: no download, minutes on two CPU cores.

    python -m experiments.mdeq_segment --config configs/mdeq_shapes.py
    python -m experiments.mdeq_segment --config configs/mdeq_shapes.py --mode anytime

`deqjax/data/shapes.py` defines the images. Three feature maps, Anderson in both directions, implicit gradients. Results:
docs/mdeq.md.
"""

import ml_collections

from configs import mdeq_cityscapes


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/mdeq_shapes.py has no variant {variant!r}.")
    config = mdeq_cityscapes.base()
    config.data.name = "shapes"
    config.data.augment = "none"
    config.data.batch_size = 16
    config.data.eval_batch_size = 20
    config.data.train_images = 4000
    config.data.eval_images = 200
    config.data.crop = config.data.eval_size = (64, 64)
    config.data.mean, config.data.std = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)
    config.loss.class_weights = False

    config.model.head = "segmentation"
    config.model.n_classes = 4
    config.model.channels = (16, 24, 32)
    config.model.n_groups = 4
    config.model.expansion = 3.0
    config.model.downsample = 1
    config.model.normalized = "branches_and_post"
    config.model.init = "uniform"

    config.deq.hook_ift = True
    config.deq.f_max_iter = 16
    config.deq.b_max_iter = 16
    config.deq.eval_f_max_iter = 24
    config.deq.jac_loss_weight = 0.5
    config.deq.jac_loss_freq = 0.2

    config.optimizer.name = "adam"
    config.optimizer.momentum = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.steps = 600
    config.log_every = 20
    config.eval_every = 200
    config.checkpoint_every = 100
    return config
