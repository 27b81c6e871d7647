"""DEQ-Flow on the mixture for Sintel, the third stage of training: Sintel, KITTI, HD1K and FlyingThings3D.

    python -m experiments.deq_flow --config configs/flow_sintel.py:huge --config.init_from=runs/flow_things_huge
    python -m experiments.deq_flow --config configs/flow_sintel.py:huge --mode submit --config.submit.path=submission

Paper: Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442); recipe of the authors' first version: 36 steps of Broyden's
method, six states with three steps of gradient each. Sintel's server gave H 1.519 (clean) and 2.886 (final). Not reproduced
here yet. In a batch, pairs of Sintel count 100 times (each rendering), of KITTI 200, of HD1K 5, of FlyingThings3D (clean) once.

Variants: the sizes of configs/flow_chairs.py, each with `+gma`. Checkpoints of the first version need
`--config.model.old_version=True`.
"""

import ml_collections

from configs import flow_things


def get_config(variant: str = "huge") -> ml_collections.ConfigDict:
    if "_" in variant:
        raise ValueError(f"variant {variant!r}: this stage has one recipe, for every size, with +gma or without.")
    config = flow_things.get_config(variant)
    config.data.stage = "sintel"
    config.data.crop = (368, 768)

    config.model.all_grad = False
    config.deq.f_solver = "broyden"
    config.deq.f_max_iter = 36
    config.deq.n_states = 6
    config.deq.grad = 3
    config.deq.gamma = 0.9

    config.evaluate = ("kitti",)
    return config
