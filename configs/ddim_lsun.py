"""DDPM / DDIM on LSUN at 256x256: bedrooms, or churches and cats by the variants `:church` and `:cat`.

    python -m experiments.deq_ddim --config configs/ddim_lsun.py:church
    python -m experiments.deq_ddim --config configs/ddim_lsun.py --mode sample --config.init_from=model-2388000.ckpt

Ho et al. 2020 (arXiv 2006.11239): 113,673,219 parameters; bedrooms were trained for 2.39 million steps, churches for 4.43.
Pokle et al. 2022 (arXiv 2210.12867) sample in 25 timesteps, where a single device gains nothing from working in parallel, and
invert in 10. Not reproduced here yet. `:sddim` (after a plus sign with another): a stochastic chain with eta 0.5.
"""

import ml_collections

from configs import ddim_cifar10

CATEGORIES = {"bedroom": "bedroom", "church": "church_outdoor", "cat": "cat"}


def get_config(variant: str = "bedroom") -> ml_collections.ConfigDict:
    chosen = variant.split("+")
    for name in chosen:
        if name not in (*CATEGORIES, "sddim"):
            raise ValueError(f"configs/ddim_lsun.py has no variant {name!r}; there are: {', '.join(CATEGORIES)}, sddim.")
    category = next((CATEGORIES[name] for name in chosen if name in CATEGORIES), "bedroom")
    config = ddim_cifar10.get_config()
    config.data.name = f"lsun_{category}"
    config.data.dir = "data/lsun"
    config.data.batch_size = 64
    config.data.eval_batch_size = 16
    config.data.eval_images = 256
    config.model.image_size = 256
    config.model.multipliers = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0

    config.sampler.timesteps = 25
    config.sampler.selection = "uniform"
    config.invert.timesteps = 10
    config.invert.steps = 500 if category == "church_outdoor" else 2000
    config.out = f"runs/ddim_{category}/out"

    config.optimizer.learning_rate = 2e-5
    config.optimizer.clip = 0.0
    config.ema = 0.999
    config.steps = 2_400_000

    if "sddim" in chosen:
        config.sampler.eta = 0.5
        config.invert.steps = 2000
    return config
