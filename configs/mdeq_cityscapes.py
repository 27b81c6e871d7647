"""MDEQ on Cityscapes.

    python -m experiments.mdeq_segment --config configs/mdeq_cityscapes.py:small --config.init_from=MDEQ_Small_Cls.pth

Paper: Multiscale Deep Equilibrium Models (arXiv 2006.08656). Variants after a colon:

| variant | parameters | published mIoU on the validation set, percent |
|---|---|---|
| `:small` | 9.0M | 75.1 (76.5 was measured with the released weights) |
| `:large` | 56M | 77.8 |
| `:xl` | 80M | 80.3 |

The recipe is that of the authors' second version: it begins with the stem and f of an ImageNet classifier (`config.init_from`;
a run of your own is exported first: `python -m experiments.mdeq_classify --mode export`), unrolls 3 steps in the beginning,
then solves with Broyden both ways. The released weights were trained with `optimizer.schedule=poly`, as here. Hardware of
the authors: 4 or 8 GPUs. Not reproduced here yet.
"""

import ml_collections

from configs import mdeq_cifar10

VARIANTS = ("small", "large", "xl")


def get_config(variant: str = "small") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/mdeq_cityscapes.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}.")
    config = base("mdeq_cityscapes")
    config.model.size = f"cityscapes_{variant}"
    data = config.data
    data.name = "cityscapes"
    data.dir = "data/cityscapes"
    data.augment = "scale_crop"
    data.crop = (768, 1024) if variant == "xl" else (512, 1024)
    data.batch_size = 16 if variant == "xl" else 12
    per_epoch = 2975 // data.batch_size
    config.steps = 500 * per_epoch
    config.eval_every = 5 * per_epoch
    mdeq_cifar10.implicit(config.deq, 27, 30, "abs")
    config.training.pretrain_steps = 40_000 if variant == "xl" else 60_000
    config.training.pretrain_unroll = 3
    mdeq_cifar10.sgd(config.optimizer, 0.01, 2e-4 if variant == "small" else 3e-4, nesterov=False)
    config.optimizer.schedule = "poly"
    return config


def base(recipe: str) -> ml_collections.ConfigDict:
    """What all segmentation configs share."""
    config = mdeq_cifar10.base(recipe)
    for name in ("select", "image_size", "resize", "pad", "crop_area", "crop_aspect", "crop_attempts"):
        del config.data[name]
    config.data.eval_batch_size = 1
    config.data.crop = (512, 1024)
    config.data.base_size = 2048  # what the random scale multiplies
    config.data.eval_size = (1024, 2048)
    config.data.eval_align_corners = True  # False: as the authors' test tool resizes logits
    config.data.train_images = config.data.eval_images = 0  # of the synthetic set, with its seed
    config.data.data_seed = 0

    config.loss = ml_collections.ConfigDict()
    config.loss.class_weights = True
    config.loss.ohem = False
    config.loss.ohem_threshold = 0.9
    config.loss.ohem_min_kept = 131_072

    config.best_metric = "miou"
    config.pictures = 8  # overlays of test images

    config.predict = ml_collections.ConfigDict()
    config.predict.folder = ""
    config.predict.out = f"runs/{recipe}/predictions"
    return config
