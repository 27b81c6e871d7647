"""A photograph in colour as a network, fitted at all pixels or at a quarter of them. No download (scikit-image has it).

    python -m experiments.deq_inr --config configs/inr_astronaut.py
    python -m experiments.deq_inr --config configs/inr_astronaut.py:generalize

128 x 128 pixels, one layer of 128, 300 steps. `:generalize` trains on every other pixel of every other row and tests on those
between. Numbers, time and hardware: docs/inr.md.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "generalize"):
        raise ValueError(f"configs/inr_astronaut.py has no variant {variant!r}; there is: generalize.")
    config = inr_camera.base()
    config.data.name = "astronaut"
    config.data.step = 4
    config.model.input_scale = 64.0
    if variant == "generalize":
        config.data.generalize = True
        config.model.input_scale = 32.0  # half the number of training pixels along a side
    return config
