"""Pictures of text, each a network of its own, trained on a quarter of the pixels and tested on another.

    python -m experiments.deq_inr --config configs/inr_text.py

Paper: (Implicit)^2 (NeurIPS 2021), TorchDEQ's settings: DEQ-siren_like-1L512D, 1000 steps at 1e-3. Variants as in
configs/inr_nature.py; `data/inr/data_2d_text.npz` comes from the same place. Not reproduced here yet.
"""

import ml_collections

from configs import inr_nature


def get_config(variant: str = "DEQ-siren_like-1L512D") -> ml_collections.ConfigDict:
    return inr_nature.get_config(variant, "text", 1000)
