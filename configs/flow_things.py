"""DEQ-Flow on FlyingThings3D, the second stage of training.

    python -m experiments.deq_flow --config configs/flow_things.py --config.init_from=runs/flow_chairs
    python -m experiments.deq_flow --config configs/flow_things.py --mode eval --config.deq.f_solver=fixed_point_iter \\
        --config.init_from=deq-flow-B-things-1.pth

Paper: Deep Equilibrium Optical Flow Estimation (arXiv 2204.08442); recipe and numbers of TorchDEQ's DEQ Zoo, on the training
splits, which this stage has not seen, after 60 steps of the solver:

| variant | Sintel clean EPE | Sintel final EPE | KITTI EPE | KITTI F1-all |
|---|---|---|---|---|
| base (run 1) | 1.386 | 2.774 | 4.456 | 14.18 |
| huge | 1.267 | 2.589 | 3.764 | 12.97 |
| huge_3x | 1.271 | 2.497 | 3.866 | 13.53 |

Two states, each after 20 plain steps, with three steps of gradient that reach the flow as well. Not reproduced here yet.

Variants as in configs/flow_chairs.py, and `huge_3x`: three times as many steps.
"""

import ml_collections

from configs import flow_chairs


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    longer = variant == "huge_3x"
    config = flow_chairs.get_config("huge" if longer else variant)
    one_step = "_1step" in variant
    config.data.stage = "things"
    config.data.crop = (400, 720)
    config.data.batch_size = 6

    config.model.all_grad = True
    config.deq.f_max_iter = 40
    config.deq.n_states = 1 if one_step else 2
    config.deq.grad = 1 if one_step else 3
    config.deq.eval_factor = 1.5

    config.freeze_batch_norm = True
    config.evaluate = ("sintel_clean", "sintel_final", "kitti")

    config.optimizer.learning_rate = 1.25e-4
    config.steps = (360_000 if longer else 120_000) + 1
    return config
