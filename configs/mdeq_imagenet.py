"""MDEQ on ImageNet.

    python -m experiments.mdeq_classify --config configs/mdeq_imagenet.py:small

Papers: Multiscale Deep Equilibrium Models (arXiv 2006.08656), Stabilizing Equilibrium Models by Jacobian Regularization
(arXiv 2106.14342), TorchDEQ (arXiv 2310.18605). Variants after a colon:

| variant | recipe | published top-1 accuracy, percent (solver steps) |
|---|---|---|
| `:small` | TorchDEQ's: 16.8M parameters, 26 plain steps, 5 phantom steps | 75.7 (26 and 20), 73.6 (10) |
| `:small_ift` | the authors' second version: unrolled phase, Broyden 26, implicit gradient | 75.4 (27) |
| `:small_reg` | the same with Jacobian regularisation | 74.5 (14) |
| `:large` | 67.1M parameters | 77.5 (30) |
| `:large_reg` | the same with Jacobian regularisation | 76.8 (15) |
| `:xl` | 90.5M parameters | 79.2 |

`data.dir` holds train/<class>/*.JPEG and val/<class>/*.JPEG; with `data.name=imagenet_records` train.rec, val.rec and their
.idx files (MXNet's); with `data.name=imagenet_tfds` what TensorFlow Datasets prepared as imagenet2012. Hardware of the
authors: 2 to 8 GPUs. Not reproduced here yet.
"""

import ml_collections

from configs import mdeq_cifar10

VARIANTS = ("small", "small_ift", "small_reg", "large", "large_reg", "xl")


def get_config(variant: str = "small") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/mdeq_imagenet.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}.")
    config = mdeq_cifar10.base("mdeq_imagenet")
    config.model.size = f"imagenet_{variant}"
    data = config.data
    data.name = "imagenet"
    data.dir = "data/imagenet"
    data.augment = "resized_crop"
    data.batch_size = 256 if variant == "xl" else 128
    per_epoch = 1_281_167 // data.batch_size
    config.steps = 100 * per_epoch
    config.eval_every = per_epoch

    if variant == "small":
        # As NVIDIA DALI crops by default.
        data.crop_area, data.crop_aspect, data.crop_attempts = (0.1, 1.0), (0.8, 1.25), 100
        mdeq_cifar10.phantom(config.deq, "fixed_point_iter", 26, 5, 1.0)
        mdeq_cifar10.sgd(config.optimizer, 0.05, 5e-5, nesterov=True)
        config.optimizer.schedule = "cosine_after_warmup"
        return config
    regularised = variant.endswith("_reg")
    mdeq_cifar10.implicit(config.deq, *((14, 14) if regularised else (26, 27)), "abs")
    rate, decay = {"small_ift": (0.05, 5e-5), "small_reg": (0.04, 2e-5)}.get(variant, (0.05, 1e-4))
    mdeq_cifar10.sgd(config.optimizer, rate, decay, nesterov=True)
    config.training.pretrain_steps = 510_000
    config.training.pretrain_unroll = 5 if variant.startswith("small") else 4
    if regularised:
        config.deq.jac_loss_freq = 0.08
        config.deq.jac_loss_weight = 2.5 if variant == "small_reg" else 3.0
        config.deq.jac_incremental = 50_000
        config.training.pretrain_jac_loss_weight = 0.03
        config.training.f_max_iter_jitter = 2
    return config
