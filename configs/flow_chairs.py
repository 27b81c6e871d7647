"""DEQ-Flow on FlyingChairs, the first stage of training.

    python -m experiments.deq_flow --config configs/flow_chairs.py
    python -m experiments.deq_flow --config configs/flow_chairs.py:huge

Paper: Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442); recipe of TorchDEQ's DEQ Zoo. 120,000 steps of 12 pairs of
368 x 496: six states, each after six plain steps, with one-step gradients. No number is published for this stage alone. Not
reproduced here yet.

Variants: `base` (B, the default), `huge` (H), `tiny`, `large`, `gigantic`, `huge_1step` (H with one state and 36 steps);
with `+gma` global motion aggregation (`base+gma`).
"""

import ml_collections

SIZES = ("tiny", "base", "large", "huge", "gigantic")


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    name, plus, rest = variant.partition("+")
    size, one_step = name.removesuffix("_1step"), name.endswith("_1step")
    if size not in SIZES or (plus and rest != "gma"):
        raise ValueError(f"variant {variant!r}: must be one of {', '.join(SIZES)}, with _1step or +gma after it.")
    config = ml_collections.ConfigDict()
    config.seed = 1234

    config.data = ml_collections.ConfigDict()
    config.data.stage = "chairs"
    config.data.dir = "data"
    config.data.crop = (368, 496)
    config.data.batch_size = 12
    config.data.threads = 4
    config.data.ahead = 2

    config.model = ml_collections.ConfigDict()
    config.model.size = size
    config.model.gma = bool(plus)
    config.model.all_grad = False
    config.model.old_version = False
    config.model.correlation = "volume"
    config.model.dropout = 0.0
    config.model.dtype = ml_collections.config_dict.placeholder(str)

    config.deq = ml_collections.ConfigDict()
    config.deq.core = "sliced"
    config.deq.f_solver = "simple_fixed_point_iter"
    config.deq.f_max_iter = 36
    config.deq.f_tol = 1e-3
    config.deq.f_stop_mode = "abs"
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_solver = "fixed_point_iter"  # with an implicit gradient
    config.deq.b_max_iter = 40
    config.deq.b_tol = 1e-6
    config.deq.b_stop_mode = "abs"
    config.deq.b_options = ml_collections.ConfigDict()
    config.deq.ift = False
    config.deq.hook_ift = False
    config.deq.n_states = 1 if one_step else 6
    config.deq.indexing = ()
    config.deq.grad = 1
    config.deq.sup_gap = -1
    config.deq.sup_loc = ()
    config.deq.tau = 1.0
    config.deq.gamma = 0.8
    config.deq.eval_factor = 1.5 if one_step else 1.0
    config.deq.eval_f_max_iter = 0
    config.deq.eval_f_tol = ml_collections.config_dict.placeholder(float)  # f_tol
    config.deq.norm_type = "weight_norm"
    config.deq.norm_no_scale = False
    config.deq.norm_clip = False
    config.deq.norm_clip_value = 1.0
    config.deq.norm_target_norm = 1.0
    config.deq.sn_n_power_iters = 1
    config.deq.remat = False
    config.deq.sradius_mode = False
    config.deq.preset = "torchdeq"

    config.freeze_batch_norm = False
    config.noise = False
    config.warm_start = False
    config.fixed_point_reuse = False
    config.evaluate = ("chairs",)
    config.submit = ml_collections.ConfigDict()
    config.submit.set = "sintel"
    config.submit.path = ""
    config.submit.pictures = False
    config.export_path = "deq_flow.safetensors"
    config.viz = ml_collections.ConfigDict()
    config.viz.input = ""
    config.viz.output = "flow_pictures"
    config.viz.steps = (5, 10, 20, 40, 80)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-4
    config.optimizer.lr_min = 1e-6  # with schedule "cosine"
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    config.optimizer.schedule = "onecycle"
    config.steps = ml_collections.FieldReference(120_001)  # the originals take one more than they count
    config.optimizer.max_steps = config.get_ref("steps") + 99
    config.eval_every = 5000
    config.best_metric = "epe"
    return config
