"""DDPM / DDIM on CIFAR-10 at 32x32, sampled and inverted in parallel.

    python -m experiments.deq_ddim --config configs/ddim_cifar10.py
    python -m experiments.deq_ddim --config configs/ddim_cifar10.py --mode sample --config.init_from=model-790000.ckpt

Papers: Ho et al. 2020 (arXiv 2006.11239), 35,746,307 parameters, FID 3.17 with 1000 steps of DDPM; Song et al. 2021
(arXiv 2010.02502), FID 4.16 with 100 steps of DDIM (quad), 13.36 with 10; Pokle et al. 2022 (arXiv 2210.12867) for parallel
sampling (1000 timesteps, quad) and inversion (100 images, Adam 0.005 for up to 1000 steps until the error is below 0.5, and
0.01 for the sequential method). The first paper trains for 800,000 steps. Not reproduced here yet. Variant `:sddim`: a
stochastic chain, inverted in 10 timesteps.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sddim"):
        raise ValueError(f"configs/ddim_cifar10.py has no variant {variant!r}; there is: sddim.")
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.name = "cifar10"
    config.data.dir = "data/cifar10"
    config.data.batch_size = 128
    config.data.flip = True
    config.data.held_out = 0.1  # of data sets that come without a test set
    config.data.eval_batch_size = 128
    config.data.eval_images = 1024

    config.model = ml_collections.ConfigDict()
    config.model.image_size = 32
    config.model.image_channels = 3
    config.model.width = 128
    config.model.multipliers = (1, 2, 2, 2)
    config.model.n_blocks = 2
    config.model.attention = (16,)
    config.model.dropout = 0.1
    config.model.resample_conv = True
    config.model.init = "ddpm"  # "torch": the default of PyTorch's layers
    config.dtype = "float32"  # of the network, "bfloat16" on accelerators; all else stays in float32

    config.diffusion = ml_collections.ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.timesteps = 1000
    config.diffusion.start = 1e-4
    config.diffusion.end = 0.02

    # The chain, and how it is solved.
    config.sampler = ml_collections.ConfigDict()
    config.sampler.method = "parallel"  # "sequential", or "ddpm": ancestral sampling
    config.sampler.timesteps = 1000
    config.sampler.selection = "quad"  # "uniform", "custom"
    config.sampler.dedupe = True
    config.sampler.eta = 0.0
    config.sampler.solver = "triangular_anderson"
    config.sampler.options = ml_collections.ConfigDict()  # of the solver, e.g. memory
    config.sampler.tol = 1e-3
    config.sampler.max_steps = 0  # 0: as many as there are timesteps, enough for time-ordered solvers
    config.sampler.window = 0  # timesteps at a time; 0: all
    config.sampler.data_variance = 0.0  # of the linear guess; 0: without one, the paper's system
    config.sampler.chunk = 0  # images per device at a time; 0: all

    config.sampler.seed = 1234  # of latents and noise: image n is the same in any batch

    config.out = "runs/ddim_cifar10/out"  # where the modes put their files

    config.sample = ml_collections.ConfigDict()
    config.sample.n = 64
    config.sample.batch_size = 1
    config.sample.shown = 64  # of them in the grid
    config.sample.save_latents = True

    config.invert = ml_collections.ConfigDict()
    config.invert.images = 1
    config.invert.first = 0  # number of the first training image
    config.invert.in_distribution = False  # targets are samples of the model instead
    config.invert.timesteps = 0  # 0: those of the sampler
    config.invert.gradients = ("one_step",)  # and "implicit", "sequential", one after the other
    config.invert.start = "noise"  # "encode": the image encoded by the chain run backwards
    config.invert.tol = 0.0  # of the solves between updates; 0: sampler.tol
    config.invert.learning_rate = 0.005
    config.invert.steps = 1000
    config.invert.seconds = 0.0  # of optimisation; 0: no limit
    config.invert.at_seconds = ()  # columns of the table: errors after so many seconds of all CPU cores
    config.invert.stop_below = 0.5
    config.invert.warm_start = True
    config.invert.remat = False

    config.eval = ml_collections.ConfigDict()
    config.eval.n = 50_000
    config.eval.batch_size = 64
    config.eval.features = ""  # file of a feature network for FID, see experiments/fid.py; "pixels"
    config.eval.reference = 50_000  # training images to compare with

    config.compare = ml_collections.ConfigDict()
    config.compare.timesteps = (10, 50, 100, 500, 1000)
    config.compare.images = 1
    config.compare.repeats = 3

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.schedule = "constant"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip = 1.0
    config.ema = 0.9999
    config.steps = 800_000

    config.log_every = 100
    config.eval_every = 5000
    config.checkpoint_every = 5000
    config.export_path = "ddim.safetensors"

    if variant == "sddim":
        config.sampler.eta = 1.0
        config.invert.timesteps = 10
        config.invert.learning_rate = 0.01
    return config
