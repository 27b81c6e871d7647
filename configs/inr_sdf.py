"""The signed distance to a surface as a network, from points and normals. Without a variant a torus: nothing to download.

    python -m experiments.deq_inr --config configs/inr_sdf.py
    python -m experiments.deq_inr --config configs/inr_sdf.py --config.data.path=any.xyz
    python -m experiments.deq_inr --config configs/inr_sdf.py:thai_statue

The loss holds the slopes of the equilibrium in its coordinates (the eikonal equation, the normals), so its gradient takes
second derivatives through the equilibrium; they are exact. 1024 points a step, one layer of 64, 1000 steps, clipped spectral
norms. Numbers, time and hardware: docs/inr.md.

Paper: (Implicit)^2 (NeurIPS 2021), the authors' first code. `:thai_statue` and `:room` are its settings (fourier, 1L256D,
50,000 points on the surface and as many off it, 10000 steps at 1e-4) but for the gradient: the first code lost the second
derivatives. They need `data/inr/NAME.xyz`, which comes with the code of SIREN. Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "thai_statue", "room"):
        raise ValueError(f"configs/inr_sdf.py has no variant {variant!r}; there are: thai_statue, room.")
    config = inr_camera.base()
    config.data.kind = "sdf"
    config.data.name = "torus"
    config.data.batch_size = 1024
    config.data.eval_points = 5000
    config.warm_start = False
    config.model.n_hidden = 64
    config.model.input_scale = 4.0
    inr_camera.clipped(config)
    config.deq.f_stop_mode = config.deq.b_stop_mode = "rel"
    config.deq.f_tol = config.deq.b_tol = 1e-4
    config.deq.hook_ift = True
    config.optimizer.learning_rate = 5e-3
    config.steps = 1000
    config.eval_every = 250
    config.best_metric = "normal_angle"
    config.best_mode = "min"
    config.render.output = "render.ply"
    if variant:
        config.data.name = variant
        config.data.batch_size = 100_000
        config.data.eval_points = 50_000
        config.data.grid = 256
        config.model.filter = "fourier"
        config.model.recipe = "original"
        config.model.gabor_alpha = 6.0
        config.model.n_hidden = 256
        config.model.input_scale = 256.0
        config.deq.f_tol = 1e-3
        config.optimizer.learning_rate = 1e-4
        config.steps = 10_000
        config.eval_every = 1000
    return config
