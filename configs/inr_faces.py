"""A hundred small faces, each a network of its own, fitted at once in one program. No download (scikit-image has them).

    python -m experiments.deq_inr --config configs/inr_faces.py

25 x 25 grey pixels each, one layer of 64, 300 steps. Numbers, time and hardware: docs/inr.md.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/inr_faces.py has no variant {variant!r}.")
    config = inr_camera.base()
    config.data.name = "faces"
    config.data.count = 100
    config.data.step = 1
    config.model.n_hidden = 64
    config.model.input_scale = 12.5
    config.optimizer.learning_rate = 3e-3
    return config
