"""Implicit representations small enough for tests."""

import pathlib

from deqjax.cli import load_config

ROOT = pathlib.Path(__file__).parents[2]
# 8 x 8 pixels, one layer of 8.
SMALL = {"data.step": 64, "model.n_hidden": 8, "model.input_scale": 4.0, "steps": 4, "eval_every": 2, "checkpoint_every": 2}
SMALL |= {"log_every": 1}


def configured(name="inr_camera.py", **settings):
    config = load_config(str(ROOT / "configs" / name))
    config.update_from_flattened_dict({**SMALL, **{k.replace("__", "."): v for k, v in settings.items()}})
    return config
