"""Deep equilibrium optical flow."""

from deqjax.models.flow.attention import Aggregate, Attention
from deqjax.models.flow.cell import Cell, Injection, State
from deqjax.models.flow.config import SIZES, FlowConfig
from deqjax.models.flow.correlation import FeatureMaps, Volume, correlate, grid, lookup
from deqjax.models.flow.encoder import Encoder
from deqjax.models.flow.model import DEQFlow, Estimate, Output
from deqjax.models.flow.padding import pad, padding_of, unpad
from deqjax.models.flow.upsampling import MaskHead, convex_upsample
from deqjax.models.flow.video import forward_interpolate, next_start

__all__ = [
    "SIZES",
    "Aggregate",
    "Attention",
    "Cell",
    "DEQFlow",
    "Encoder",
    "Estimate",
    "FeatureMaps",
    "FlowConfig",
    "Injection",
    "MaskHead",
    "Output",
    "State",
    "Volume",
    "convex_upsample",
    "correlate",
    "forward_interpolate",
    "grid",
    "lookup",
    "next_start",
    "pad",
    "padding_of",
    "unpad",
]
