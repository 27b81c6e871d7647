"""DDPM / DDIM on CelebA at 64x64, sampled and inverted in parallel.

    python -m experiments.deq_ddim --config configs/ddim_celeba.py
    python -m experiments.deq_ddim --config configs/ddim_celeba.py --mode invert --config.init_from=ckpt.pth

Song et al. 2021 (arXiv 2010.02502): 78,700,803 parameters, FID 6.53 with 100 steps of DDIM, 3.51 with 1000. Their checkpoint is
a list, whose last entry, the averaged weights, is what is read. Pokle et al. 2022 (arXiv 2210.12867) sample it in 500 timesteps
and invert in 20. Not reproduced here yet. Variant `:sddim`: a stochastic chain with eta 0.1.
"""

import ml_collections

from configs import ddim_cifar10


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sddim"):
        raise ValueError(f"configs/ddim_celeba.py has no variant {variant!r}; there is: sddim.")
    config = ddim_cifar10.get_config()
    config.data.name = "celeba"
    config.data.dir = "data/celeba"
    config.model.image_size = 64
    config.model.multipliers = (1, 2, 2, 2, 4)

    config.sampler.timesteps = 500
    config.sampler.selection = "uniform"
    config.sampler.window = 100
    config.invert.timesteps = 20
    config.invert.learning_rate = 0.001
    config.invert.steps = 500
    config.out = "runs/ddim_celeba/out"
    config.steps = 500_000

    if variant == "sddim":
        config.sampler.eta = 0.1
        config.invert.learning_rate = 0.01
        config.invert.steps = 2000
    return config
