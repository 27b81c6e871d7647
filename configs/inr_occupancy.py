"""Which points are inside a solid, as a network. Without a variant a torus, whose inside is known: nothing to download.

    python -m experiments.deq_inr --config configs/inr_occupancy.py
    python -m experiments.deq_inr --config configs/inr_occupancy.py --config.data.path=any.ply
    python -m experiments.deq_inr --config configs/inr_occupancy.py:DEQ-fourier-1L256D --config.data.name=bunny

4096 points a step, one layer of 64, 300 steps. Numbers, time and hardware: docs/inr.md.

Paper: (Implicit)^2 (NeurIPS 2021), the authors' first code. Variants `[DEQ-]FILTER-{L}L{D}D` with 1L256D, 1L512D and 4L256D:
50,000 points a step, 10000 steps at 5e-4, on dragon, bunny, buddha, armadillo or lucy as `data/inr/NAME.ply`, from the
Stanford 3D scanning repository. Meshes need `pip install "deqjax[mesh]"`. Not reproduced here yet.
"""

import ml_collections

from configs import inr_camera


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = inr_camera.base()
    config.data.kind = "occupancy"
    config.data.name = "torus"
    config.data.batch_size = 4096
    config.warm_start = False
    config.model.n_hidden = 64
    config.model.input_scale = 8.0
    config.optimizer.learning_rate = 2e-3
    config.best_metric = "iou"
    config.render.output = "render.ply"
    if variant:
        config.data.name = "dragon"
        config.data.batch_size = 50_000
        config.data.eval_points = 2**20
        config.data.grid = 256
        inr_camera.preset(config, variant, "configs/inr_occupancy.py")
        config.warm_start = False
        inr_camera.original(config, spectral=config.model.network == "deq")
        config.deq.eval_f_tol = 1e-4
        config.model.input_scale = 256.0
        config.optimizer.learning_rate = 5e-4
        config.steps = 10_000
        config.eval_every = 1000
    return config
