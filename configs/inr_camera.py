"""The photograph of a cameraman as a network: an equilibrium of one layer. No download (scikit-image has the picture).

    python -m experiments.deq_inr --config configs/inr_camera.py
    python -m experiments.inr_table --config configs/inr_camera.py

Paper: (Implicit)^2: Implicit Layers for Implicit Representations (NeurIPS 2021). Without a variant: every other pixel of the
picture, 256 x 256, one layer of 128, 1000 steps. Numbers, time and hardware: docs/inr.md.

Variants are the published runs by their names: `[DEQ-]FILTER-{L}L{D}D` with FILTER siren_like, fourier or gabor, e.g.
`:DEQ-siren_like-1L512D` or `:gabor-4L256D` (published: 1L256D, 1L512D and 4L256D), on the whole picture, 5000 steps. Without
DEQ- it is the explicit network, the same weights applied once. `original/` before a name takes the settings of the authors'
first code (clipped spectral norm, I + J^T for a gradient) in place of TorchDEQ's. Not reproduced here yet. `:clipped` is the
offline run with clipped spectral norms: its equilibrium is unique at any learning rate.
"""

import re

import ml_collections
from ml_collections import config_dict

_NAME = re.compile(r"(?P<original>original/)?(?P<deq>DEQ-)?(?P<filter>siren_like|fourier|gabor)-(?P<L>\d+)L(?P<D>\d+)D")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = base()
    config.steps = 1000
    # Of experiments.inr_table: about 17,500 parameters each, but for Gabor filters, which have 18,300 and 18,900.
    config.table = ml_collections.ConfigDict()
    filters = ("siren_like", "fourier", "gabor")
    compared = [f"{network}D" for name in filters for network in (f"DEQ-{name}-1L128", f"{name}-1L128", f"{name}-4L64")]
    config.table.networks = (*compared, "siren-3L92D", "ffn-2L32D")
    config.table.siren_scale = 30.0  # of its first sine, as published
    config.table.seeds = (0,)
    if variant == "clipped":
        clipped(config)
    elif variant:
        preset(config, variant, "configs/inr_camera.py")
        config.data.step = 1
        config.model.input_scale = 256.0
        config.steps = 5000
        config.eval_every = 500
    return config


def base() -> ml_collections.ConfigDict:
    """Every setting of a representation, with the values of the offline picture."""
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.kind = "image"  # image, audio, video, occupancy or sdf
    config.data.name = "camera"
    config.data.path = ""  # a file instead
    config.data.dir = "data/inr"  # of the published sets
    config.data.count = 1  # pictures of a set, all fitted at once
    config.data.step = 2  # take every so-manieth sample along each axis
    config.data.channels = 0  # of pictures and video; 1: grey; 3: colour; 0: as they are
    config.data.generalize = False  # train on every other pixel of every other row, test on those between
    config.data.seconds = 0.0  # of sound; 0: all
    config.data.rate = 8000  # of the computed melody
    config.data.frames = 0  # of video; 0: all
    config.data.batch_size = 0  # coordinates per step; 0: all
    config.data.eval_points = 20_000  # of shapes
    config.data.grid = 64  # samples along each side of a shape that is drawn
    config.data.memory_gib = 8.0  # for batches and states, on each device

    config.model = ml_collections.ConfigDict()
    config.model.network = "deq"  # "one_pass": the same weights applied once; "siren", "ffn"
    config.model.filter = "siren_like"
    config.model.n_hidden = 128
    config.model.n_layers = 1
    config.model.input_scale = 128.0
    config.model.gabor_alpha = 3.0
    config.model.recipe = "zoo"
    config.model.omega = 30.0
    config.model.n_features = 256
    config.model.feature_scale = 10.0
    config.model.linear_output = config_dict.placeholder(bool)
    config.model.dtype = config_dict.placeholder(str)
    config.model.init_power_iters = 20

    config.warm_start = True  # begin each step at the last one's equilibrium
    config.warm_start_dtype = "float32"
    config.resolve_every = 0  # run the solver at every so-manieth step, too; 0: at the first visit only

    config.deq = ml_collections.ConfigDict()
    config.deq.core = "sliced"
    config.deq.f_solver = "fixed_point_iter"
    config.deq.f_max_iter = 100
    config.deq.f_tol = 1e-3
    config.deq.f_stop_mode = "abs"
    config.deq.b_solver = "fixed_point_iter"
    config.deq.b_max_iter = 40
    config.deq.b_tol = 1e-6
    config.deq.b_stop_mode = "abs"
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_options = ml_collections.ConfigDict()
    config.deq.eval_f_max_iter = 0
    config.deq.eval_factor = 1.0
    config.deq.eval_f_tol = config_dict.placeholder(float)  # f_tol
    config.deq.preset = config_dict.placeholder(str)  # "torchdeq": the original's solvers, step for step
    config.deq.ift = False
    config.deq.hook_ift = False
    config.deq.grad = 3
    config.deq.tau = 1.0
    config.deq.n_states = 1
    config.deq.gamma = 0.8
    config.deq.remat = False
    config.deq.norm_type = "weight_norm"
    config.deq.norm_no_scale = False
    config.deq.norm_clip = False
    config.deq.norm_clip_value = 1.0
    config.deq.norm_target_norm = 1.0
    config.deq.sn_n_power_iters = 1
    config.deq.jac_loss_weight = 0.0
    config.deq.jac_loss_freq = 0.0
    config.deq.sradius_mode = False

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.max_steps = 0
    config.optimizer.lr_min = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip = 0.0
    config.optimizer.clip_value = 0.0
    config.steps = 300

    config.log_every = 50
    config.eval_every = 100
    config.best_metric = "psnr"
    config.best_mode = "max"

    config.export_path = "signal.inr"  # what export writes and render reads; .safetensors or .pth: a state dict instead
    config.export_dtype = "float16"  # of large kernels: float32, float16 or int8
    config.render = ml_collections.ConfigDict()
    config.render.output = "render.png"
    config.render.scale = 1.0  # times the signal's own resolution
    config.render.shape = ()  # or the resolution itself, e.g. (1024, 1024)
    return config


def preset(config: ml_collections.ConfigDict, name: str, file: str) -> None:
    """Puts the network that a published name stands for into a config.

    Raises:
      ValueError: it is no such name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{file} has no variant {name!r}; there is [original/][DEQ-](siren_like|fourier|gabor)-(L)L(D)D.")
    config.model.network = "deq" if match["deq"] else "one_pass"
    config.model.filter = match["filter"]
    config.model.n_layers = int(match["L"])
    config.model.n_hidden = int(match["D"])
    config.warm_start = config.warm_start and bool(match["deq"])
    if match["original"]:
        original(config)


def original(config: ml_collections.ConfigDict, spectral: bool = True) -> None:
    """The settings of the authors' first code."""
    config.model.recipe = "original"
    config.deq.f_max_iter = 100
    config.deq.f_tol = 1e-3
    config.deq.f_stop_mode = "rel"
    # The first two terms of the Neumann series: I + J^T.
    config.deq.hook_ift = True
    config.deq.b_max_iter = 2
    config.deq.b_options = ml_collections.ConfigDict({"monitor": False})
    config.deq.norm_type = "none"
    if spectral:
        clipped(config)


def clipped(config: ml_collections.ConfigDict) -> None:
    """Spectral norms of at most 0.97: with these filters f is a contraction, and its equilibrium unique."""
    config.deq.norm_type = "spectral_norm"
    config.deq.norm_no_scale = True
    config.deq.norm_target_norm = 0.97
    config.deq.norm_clip = True
    config.deq.norm_clip_value = 1.0
    config.deq.sn_n_power_iters = 5
