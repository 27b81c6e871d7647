"""Pictures of nature, each a network of its own, trained on a quarter of the pixels and tested on another.

    python -m experiments.deq_inr --config configs/inr_nature.py
    python -m experiments.deq_inr --config configs/inr_nature.py:original/DEQ-gabor-1L256D

Paper: (Implicit)^2 (NeurIPS 2021). Without a variant TorchDEQ's settings: DEQ-siren_like-1L512D, 500 steps at 1e-3; those of
the authors' first code (`original/[DEQ-]FILTER-{L}L{D}D`, with 1L256D, 1L512D and 4L256D) take 2000.
`data/inr/data_div2k.npz` belongs to the code of Fourier Feature Networks. configs/inr_astronaut.py:generalize needs no file.
Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "DEQ-siren_like-1L512D", name: str = "nature", steps: int = 500) -> ml_collections.ConfigDict:
    config = inr_camera.base()
    config.data.name = name
    config.data.count = 16
    config.data.step = 1
    config.data.generalize = True
    inr_camera.preset(config, variant, f"configs/inr_{name}.py")
    config.model.input_scale = 128.0
    config.steps = 2000 if variant.startswith("original/") else steps
    return config
