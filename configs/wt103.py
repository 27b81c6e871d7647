"""DEQ transformer on WikiText-103, word level.

    python -m experiments.deq_lm --config configs/wt103.py

Papers: Deep Equilibrium Models (arXiv 1909.01377), Stabilizing Equilibrium Models by Jacobian Regularization
(arXiv 2106.14342), TorchDEQ (arXiv 2310.18605). Variants after a colon:

| variant | recipe | published test perplexity (memory 150 / 480) |
|---|---|---|
| (none) | deq-lm: 3 pre-norm blocks, a 12-step unroll | 22.34 / 21.85 |
| `:seq_ift` | deq-seq: post-norm, implicit gradients, Broyden 35/35 | 23.78 / 23.31 |
| `:seq_ift_jr` | the same with Jacobian regularisation | 23.67 / 23.16 |
| `:mem480`, `:seq_ift+mem480`, ... | evaluation with memory 480, of the run given by `--workdir` | |

The numbers are those that the TorchDEQ DEQ Zoo reports for its 98M-parameter models. Its hardware: 4 GPUs, 6.7 GB each, for
deq-lm. Not reproduced here yet.
"""

import ml_collections
from ml_collections import config_dict

VARIANTS = ("lm", "seq_ift", "seq_ift_jr", "mem480")


def get_config(variant: str = "lm") -> ml_collections.ConfigDict:
    chosen = variant.split("+")
    for name in chosen:
        if name not in VARIANTS:
            raise ValueError(f"configs/wt103.py has no variant {name!r}; there are: {', '.join(VARIANTS)}.")
    config = ml_collections.ConfigDict()
    config.seed = 42

    config.data = ml_collections.ConfigDict()
    config.data.name = "wt103"
    config.data.dir = "data/wikitext-103"
    config.data.batch_size = 56
    config.data.length = 150
    config.data.eval_batch_size = 16
    config.data.eval_length = 150
    config.data.eval_mem_len = 480 if "mem480" in chosen else 150
    config.data.varlen = False

    config.model = ml_collections.ConfigDict()
    config.model.recipe = "deq-lm"
    config.model.norm = "pre"
    config.model.d_model = 700
    config.model.d_embed = 700
    config.model.n_head = 10
    config.model.d_head = 70
    config.model.d_inner = 14800
    config.model.n_layer = 3
    config.model.cutoffs = (20000, 40000, 200000)
    config.model.div_val = 4
    config.model.tie_weights = True
    config.model.tie_projections = "shared"
    config.model.local_size = 0
    config.model.mem_len = 150
    config.model.dropout = 0.05
    config.model.dropatt = 0.0
    config.model.position_dropout = config_dict.placeholder(str)  # "features" or "positions"; the recipe's
    config.model.dtype = config_dict.placeholder(str)  # "bfloat16": the solve in half the memory
    config.model.init = "normal"
    config.model.init_std = 0.01
    config.model.proj_init_std = 0.01
    config.model.init_range = 0.05
    config.warm_start = False
    config.pretrain_steps = 0
    config.pretrain_unroll = 2

    config.deq = ml_collections.ConfigDict()
    config.deq.core = "sliced"
    config.deq.f_solver = "fixed_point_iter"
    config.deq.f_max_iter = 0
    config.deq.f_tol = 1e-3
    config.deq.f_stop_mode = "rel"
    config.deq.f_tol_start = config_dict.placeholder(float)  # a tolerance that falls to f_tol
    config.deq.f_tol_anneal_steps = 0
    config.deq.no_stat = config_dict.placeholder(bool)  # True: plain steps without residuals
    config.deq.f_options = ml_collections.ConfigDict()
    config.deq.b_solver = "fixed_point_iter"
    config.deq.b_max_iter = 40
    config.deq.b_tol = 1e-3
    config.deq.b_stop_mode = "rel"
    config.deq.b_options = ml_collections.ConfigDict()
    config.deq.eval_f_max_iter = 12
    config.deq.eval_factor = 1.0
    config.deq.eval_f_tol = config_dict.placeholder(float)  # f_tol
    config.deq.preset = config_dict.placeholder(str)  # "torchdeq": the original's solvers, step for step
    config.deq.ift = False
    config.deq.hook_ift = False
    config.deq.grad = 12
    config.deq.sup_gap = -1
    config.deq.sup_loc = ()
    config.deq.indexing = ()
    config.deq.tau = 1.0
    config.deq.n_states = 1
    config.deq.gamma = 0.8
    config.deq.remat = True
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
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.decay = 0.99  # of rmsprop
    config.optimizer.momentum = 0.0
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip = 0.25
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 8000
    config.optimizer.lr_min = 0.0
    config.optimizer.decay_at = ()  # of the schedule "step"
    config.optimizer.decay_factor = 0.1
    # The original's first update runs at the full rate, by accident of its scheduler.
    config.optimizer.first_update_full_lr = True
    config.steps = config_dict.FieldReference(150_000)
    config.optimizer.max_steps = config.get_oneway_ref("steps")

    config.log_every = 200
    config.eval_every = 5000
    config.checkpoint_every = 1000
    config.keep = 1
    config.best_metric = "loss"
    config.best_mode = "min"
    config.patience = 0  # evaluations without a new best before the run stops; 0: never
    config.max_bad_steps = 20
    config.accumulate = 1  # slices of a batch, one after the other
    config.ema = 0.0  # decay of averaged weights; 0: none
    config.resume = ""
    config.init_from = ""
    config.export_path = "deq_lm.safetensors"
    config.tensorboard = False
    config.wandb = ""  # a project of Weights & Biases
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "model": 1})

    config.generate = ml_collections.ConfigDict()
    config.generate.prompt = "= Robert <unk> ="
    config.generate.n_tokens = 100
    config.generate.temperature = 0.9
    config.generate.top_k = 40
    config.generate.seed = 0

    if "seq_ift" in chosen or "seq_ift_jr" in chosen:
        config.model.recipe = "deq-seq"
        config.model.norm = "post"
        config.model.n_layer = 1
        config.model.d_inner = 48000
        config.deq.f_solver = config.deq.b_solver = "broyden"
        config.deq.f_max_iter = config.deq.b_max_iter = 35
        config.deq.eval_f_max_iter = 35
        config.deq.ift = True
        config.deq.grad = 1
        config.optimizer.warmup_steps = 16000
        config.steps = 300_000
    if "seq_ift_jr" in chosen:
        config.deq.jac_loss_weight = 0.1
        config.deq.jac_loss_freq = 0.4
        config.deq.jac_incremental = 30_000
    return config
