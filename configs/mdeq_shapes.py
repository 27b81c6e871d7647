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
    config = mdeq_cityscapes.base("mdeq_shapes")
    config.data.name = "shapes"
    config.data.batch_size = 16
    config.data.eval_batch_size = 50
    config.data.train_images = 4000
    config.data.eval_images = 200
    config.data.crop = config.data.eval_size = (32, 32)
    config.data.mean, config.data.std = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)
    config.loss.class_weights = False

    config.model.head = "segmentation"
    config.model.n_classes = 4
    config.model.channels = (12, 16, 24)
    config.model.n_groups = 4
    config.model.expansion = 2.0
    config.model.normalized = "branches_and_post"
    config.model.init = "uniform"

    config.deq.hook_ift = True
    config.deq.f_max_iter = 12
    config.deq.b_max_iter = 12
    config.deq.eval_f_max_iter = 20
    config.deq.jac_loss_weight = 1.0
    config.deq.jac_loss_freq = 0.2

    config.optimizer.learning_rate = 5e-3
    config.steps = 300
    config.log_every = 20
    config.eval_every = 150
    config.checkpoint_every = 50
    return config
