"""A hundred faces of 128 x 128 pixels, each a network of its own, fitted at once in one program.

    python -m experiments.deq_inr --config configs/inr_celeba.py:DEQ-siren_like-1L256D

Paper: (Implicit)^2 (NeurIPS 2021), TorchDEQ's settings: 3000 steps at 3e-3. Variants: `[original/][DEQ-]FILTER-{L}L{D}D`,
published with 1L128D, 1L256D and 4L128D. `data/inr/celeba_128_tiny.npy` comes from the authors' page. configs/inr_faces.py
needs no file. Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "DEQ-siren_like-1L128D") -> ml_collections.ConfigDict:
    config = inr_camera.base()
    config.data.name = "celeba"
    config.data.count = 100
    config.data.step = 1
    inr_camera.preset(config, variant, "configs/inr_celeba.py")
    config.model.input_scale = 64.0
    config.optimizer.learning_rate = 3e-3
    config.steps = 3000
    config.eval_every = 500
    return config
