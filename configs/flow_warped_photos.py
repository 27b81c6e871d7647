"""DEQ-Flow, tiny, on photographs warped by known fields: no download, minutes on two CPU cores.

    python -m experiments.deq_flow --config configs/flow_warped_photos.py
    python -m experiments.deq_flow --config configs/flow_warped_photos.py --mode viz

The set is written to `data.dir` on first use, see `deqjax/data/warped_photos.py`. Zero flow has an EPE of 9.52 on the held-out
pairs; expect 1.6 at the end, after 7 minutes, and 2.1 half-way (docs/flow.md).
"""

import ml_collections

from configs import flow_chairs


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/flow_warped_photos.py has no variant {variant!r}.")
    config = flow_chairs.get_config("tiny")
    config.data.stage = "warped_photos"
    config.data.dir = "data/warped_photos"
    config.data.batch_size = 2
    config.data.crop = (96, 128)
    config.data.n_train = 400
    config.data.n_valid = 40
    config.data.size = (112, 144)
    config.data.motion = 12.0
    config.data.data_seed = 0
    config.data.min_scale = 0.0
    config.data.max_scale = 0.2
    config.data.strength = 0.2
    config.evaluate = ("warped_photos",)

    config.deq.f_max_iter = 12
    config.deq.n_states = 4
    config.deq.eval_f_max_iter = 16

    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 1e-5
    config.steps = 1500
    config.optimizer.max_steps = config.get_ref("steps") + 100
    config.log_every = 50
    config.eval_every = 250
    return config
