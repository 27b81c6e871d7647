"""MDEQ on CIFAR-10.

    python -m experiments.mdeq_classify --config configs/mdeq_cifar10.py:small

Papers: Multiscale Deep Equilibrium Models (arXiv 2006.08656), Stabilizing Equilibrium Models by Jacobian Regularization
(arXiv 2106.14342), TorchDEQ (arXiv 2310.18605). Variants after a colon:

| variant | recipe | published test accuracy, percent |
|---|---|---|
| `:small` | TorchDEQ's: 159k parameters, Broyden 22, 5 phantom steps, no augmentation | 85.7 (of its ancestor) |
| `:large` | TorchDEQ's: 11.1M parameters, Broyden 18, 5 phantom steps | 95.0 |
| `:tiny` | the authors' second version: unrolled phase, implicit gradient | 87.1 +- 0.4 (the paper's) |
| `:large_ift` | the same, 11.1M parameters | 93.8 +- 0.3 (the paper's) |
| `:large_reg` | the same with Jacobian regularisation, 8 solver steps | 93.1 +- 0.3 at 6 steps |

Published numbers are the best test accuracy of all epochs (`data.select=test`); by default a tenth of the training images
chooses the weights. `data.dir` holds the archive. Hardware of the authors: 1 to 4 GPUs. Not reproduced here yet.
"""

import ml_collections
from ml_collections import config_dict

VARIANTS = ("small", "large", "tiny", "large_ift", "large_reg")
# Fields of the network that a command line may change; what is left alone is as the published size has it.
FIELDS = {
    "head": str, "n_classes": int, "channels": tuple, "head_channels": tuple, "final_channels": int, "final_kernel": int,
    "n_groups": int, "expansion": float, "n_blocks": tuple, "big_kernels": tuple, "downsample": int, "in_channels": int,
    "dropout": float, "block_affine": bool, "fuse_affine": bool, "post_affine": bool, "normalized": str, "init": str,
    "init_normalized": bool, "batch_norm_momentum": float, "dtype": str,
}  # fmt: skip


def get_config(variant: str = "small") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/mdeq_cifar10.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}.")
    config = base("mdeq_cifar10")
    config.model.size = f"cifar10_{variant}"
    data = config.data
    data.name = "cifar10"
    data.dir = "data/cifar10"
    data.augment = "none" if variant in ("small", "tiny") else "crop_flip"
    data.mean, data.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    data.image_size = 32
    data.batch_size = 96 if variant == "large_reg" else 128
    data.eval_batch_size = 500
    epochs = 50 if variant in ("small", "tiny") else 220
    per_epoch = 45_000 // data.batch_size  # 50_000 with data.select=test
    config.steps = epochs * per_epoch
    config.eval_every = per_epoch

    if variant in ("small", "large"):
        phantom(config.deq, "broyden", 22 if variant == "small" else 18, 5, 0.5 if variant == "small" else 0.7)
        sgd(config.optimizer, 0.1, 1e-4, nesterov=False)
        return config
    regularised = variant == "large_reg"
    implicit(config.deq, *((8, 7) if regularised else (18, 20)), "rel")
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 2.5e-6 if variant == "tiny" else 0.0
    config.training.pretrain_unroll = 8 if regularised else 10
    config.training.pretrain_steps = {"tiny": 3000, "large_ift": 20_000, "large_reg": 16_000}[variant]
    if regularised:
        config.deq.jac_loss_freq = 0.02
        config.deq.jac_loss_weight = 0.4
        config.training.jac_stop_step = 90 * per_epoch
        config.training.f_max_iter_jitter = 2
    return config


def base(recipe: str) -> ml_collections.ConfigDict:
    """What all multiscale configs share: every key, with its default. Modes that write files do so below `runs/recipe`."""
    config = ml_collections.ConfigDict()
    config.seed = 42

    config.data = ml_collections.ConfigDict()
    config.data.name = ""
    config.data.dir = ""
    config.data.select = "valid"  # "test": the best test result of all epochs, the originals' protocol
    config.data.augment = "none"
    config.data.batch_size = 128
    config.data.eval_batch_size = 100
    config.data.pad = 4  # pixels by which "crop" and "crop_flip" move an image
    config.data.image_size = 224
    config.data.resize = 256  # the shorter side in evaluation
    config.data.crop_area = (0.08, 1.0)
    config.data.crop_aspect = (3 / 4, 4 / 3)
    config.data.crop_attempts = 10
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.threads = config_dict.placeholder(int)  # one per core
    config.data.ahead = 2

    config.model = ml_collections.ConfigDict()
    config.model.size = ""  # a published one, see deqjax/models/mdeq/config.py
    for name, kind in FIELDS.items():
        config.model[name] = config_dict.placeholder(kind)

    config.training = ml_collections.ConfigDict()
    config.training.pretrain_steps = 0
    config.training.pretrain_unroll = 10
    config.training.pretrain_jac_loss_weight = 0.0
    config.training.jac_stop_step = 0
    config.training.jac_probes = 2
    config.training.f_max_iter_jitter = 0

    config.deq = ml_collections.ConfigDict()
    config.deq.core = "sliced"
    config.deq.f_solver = "anderson"
    config.deq.f_max_iter = 20
    config.deq.f_tol = 1e-3
    config.deq.f_stop_mode = "rel"
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_solver = "anderson"
    config.deq.b_max_iter = 20
    config.deq.b_tol = 1e-3
    config.deq.b_stop_mode = "rel"
    config.deq.b_options = ml_collections.ConfigDict()
    config.deq.eval_f_max_iter = 0
    config.deq.eval_factor = 1.0
    config.deq.eval_f_tol = config_dict.placeholder(float)  # f_tol
    config.deq.preset = config_dict.placeholder(str)  # "torchdeq": the original's solvers, step for step
    config.deq.ift = False
    config.deq.hook_ift = False
    config.deq.grad = (1,)
    config.deq.tau = 1.0
    config.deq.n_states = 1
    config.deq.indexing = ()
    config.deq.sup_gap = -1
    config.deq.sup_loc = ()
    config.deq.gamma = 0.8
    config.deq.remat = False
    config.deq.norm_type = "weight_norm"
    config.deq.norm_no_scale = False
    config.deq.norm_clip = False
    config.deq.norm_clip_value = 1.0
    config.deq.norm_target_norm = 1.0
    config.deq.sn_n_power_iters = 1
    config.deq.sradius_mode = False
    config.deq.jac_loss_weight = 0.0
    config.deq.jac_loss_freq = 0.0
    config.deq.jac_incremental = 0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.0
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip = 0.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 0
    config.optimizer.lr_min = 1e-6
    config.steps = config_dict.FieldReference(1000)
    config.optimizer.max_steps = config.get_oneway_ref("steps")

    config.log_every = 50
    config.best_metric = "accuracy"
    config.best_mode = "max"
    config.export_path = "mdeq.safetensors"

    config.anytime = ml_collections.ConfigDict()
    config.anytime.split = "test"
    config.anytime.steps = ()  # every number up to the budget of evaluation
    config.anytime.out = f"runs/{recipe}/anytime"
    return config


def phantom(deq, solver, steps, k, tau):
    """TorchDEQ's: a solve of all its steps, then k damped ones with gradient."""
    deq.preset = "torchdeq"
    deq.f_solver, deq.f_max_iter, deq.f_stop_mode = solver, steps, "abs"
    deq.grad, deq.tau = (k,), tau


def implicit(deq, forward, backward, stop_mode):
    """The authors': Broyden both ways, the Jacobian at the solver's result."""
    deq.hook_ift = True
    deq.f_solver = deq.b_solver = "broyden"
    deq.f_max_iter, deq.b_max_iter = forward, backward
    deq.f_stop_mode = deq.b_stop_mode = stop_mode


def sgd(optimizer, learning_rate, weight_decay, *, nesterov):
    """With momentum 0.9."""
    optimizer.name, optimizer.momentum, optimizer.nesterov = "sgd", 0.9, nesterov
    optimizer.learning_rate, optimizer.weight_decay = learning_rate, weight_decay
