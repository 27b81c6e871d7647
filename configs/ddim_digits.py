"""A diffusion model of scikit-learn's handwritten digits, padded to 16x16: no download, minutes on two CPU cores.

    python -m experiments.deq_ddim --config configs/ddim_digits.py
    python -m experiments.deq_ddim --config configs/ddim_digits.py --mode compare

Results, their time and hardware: docs/ddim.md.
"""

import ml_collections

from configs import ddim_cifar10


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/ddim_digits.py has no variant {variant!r}.")
    config = ddim_cifar10.get_config()
    config.data.name = "digits"
    config.data.dir = ""
    config.data.batch_size = 64
    config.data.flip = False
    config.data.eval_batch_size = 60
    config.data.eval_images = 179

    config.model.image_size = 16
    config.model.image_channels = 1
    config.model.width = 32
    config.model.multipliers = (1, 2)
    config.model.n_blocks = 1
    config.model.attention = (8,)
    config.model.dropout = 0.0

    config.sampler.timesteps = 50
    config.sampler.selection = "uniform"
    config.sampler.data_variance = 1.0
    config.sampler.tol = 1e-5
    config.out = "runs/ddim_digits/out"
    config.sample.batch_size = 16
    config.invert.images = 4
    config.invert.timesteps = 10
    config.invert.gradients = ("one_step", "sequential")
    config.invert.tol = 2e-2
    config.invert.learning_rate = 0.1
    config.invert.steps = 1000
    config.invert.seconds = 20.0
    config.invert.stop_below = 0.0
    config.eval.n = 256
    config.eval.features = "pixels"
    config.compare.timesteps = (10, 50, 1000)

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.max_steps = config.get_oneway_ref("steps")
    config.ema = 0.995
    config.steps = 2000
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 250
    return config
