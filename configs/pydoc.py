"""A small DEQ transformer on the Python manual that every CPython carries: no download, minutes on two CPU cores.

    python -m experiments.deq_lm --config configs/pydoc.py

A true equilibrium: post-norm cell, Anderson in both directions, implicit gradients, Jacobian regularisation. Evaluation
prints the share of segments that reach the tolerance, and the perplexity again at twice the solver steps.
"""

import ml_collections

from configs import wt103


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/pydoc.py has no variant {variant!r}.")
    config = wt103.get_config("seq_ift")
    config.data.name = "pydoc"
    config.data.dir = "data/pydoc"
    config.data.batch_size = 16
    config.data.length = 32
    config.data.eval_batch_size = 4
    config.data.eval_length = 32
    config.data.eval_mem_len = 32

    config.model.d_model = config.model.d_embed = 128
    config.model.n_head = 4
    config.model.d_head = 32
    config.model.d_inner = 384
    config.model.cutoffs = (1000,)
    config.model.div_val = 2
    config.model.mem_len = 32
    config.model.dropout = 0.1
    config.model.init_std = 0.1
    config.model.proj_init_std = 0.1

    config.deq.f_solver = config.deq.b_solver = "anderson"
    config.deq.f_max_iter = 24
    config.deq.b_max_iter = 24
    config.deq.eval_f_max_iter = 40
    config.deq.jac_loss_weight = 0.1
    config.deq.jac_loss_freq = 0.3

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.first_update_full_lr = False
    config.steps = 2000
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 50

    config.generate.prompt = "The following"
    config.generate.n_tokens = 60
    return config
