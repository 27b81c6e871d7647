"""Multiscale deep equilibrium models."""

from deqjax.models.mdeq.cell import Cell, Injection, State, repeat_pixels, run_blocks, transform
from deqjax.models.mdeq.config import SIZES, MDEQConfig
from deqjax.models.mdeq.model import MDEQ, Output
from deqjax.models.mdeq.resize import resize_bilinear

__all__ = [
    "MDEQ",
    "SIZES",
    "Cell",
    "Injection",
    "MDEQConfig",
    "Output",
    "State",
    "repeat_pixels",
    "resize_bilinear",
    "run_blocks",
    "transform",
]
