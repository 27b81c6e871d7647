"""A sound as a network. Without a variant a plucked melody that is computed: nothing to download.

    python -m experiments.deq_inr --config configs/inr_audio.py
    python -m experiments.deq_inr --config configs/inr_audio.py --config.data.path=any.wav --config.model.input_scale=25000.
    python -m experiments.deq_inr --config configs/inr_audio.py:DEQ-siren_like-1L512D --config.data.name=counting

Two seconds at 8 kHz, one layer of 256, 500 steps. Numbers, time and hardware: docs/inr.md. The input scale is about a twelfth
of the number of samples.

Paper: (Implicit)^2 (NeurIPS 2021). Variants `[original/][DEQ-]FILTER-{L}L{D}D` (published: DEQ-siren_like-1L512D; original
with 1L256D, 1L512D and 4L256D) fit `data/inr/gt_bach.wav`, or gt_counting.wav, which come with the code of SIREN: 3000 steps
at 1e-3. Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = inr_camera.base()
    config.data.kind = "audio"
    config.data.name = "melody"
    config.data.step = 1
    config.model.n_hidden = 256
    config.model.input_scale = 1300.0
    config.deq.f_max_iter = 40
    config.steps = 500
    config.render.output = "render.wav"
    if variant:
        config.data.name = "bach"
        inr_camera.preset(config, variant, "configs/inr_audio.py")
        if variant.startswith("original/"):
            inr_camera.original(config, spectral=False)
        config.model.input_scale = 25000.0
        config.steps = 3000
        config.eval_every = 500
    return config
