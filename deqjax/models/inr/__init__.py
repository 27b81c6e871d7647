"""Implicit neural representations of signals: coordinates in, values out."""

from flax import nnx

from deqjax.models.inr.config import FILTERS, NETWORKS, INRConfig
from deqjax.models.inr.explicit import FourierFeatures, Siren
from deqjax.models.inr.filters import Filters
from deqjax.models.inr.network import INR, Injection, Output
from deqjax.models.inr.signals import Signals, WarmStart, evaluation_bytes, has_equilibrium, training_bytes
from deqjax.nn.config import DEQConfig


def representation(config: INRConfig, deq: DEQConfig, rngs: nnx.Rngs) -> INR | Siren | FourierFeatures:
    """The network that the config names."""
    if config.network == "siren":
        return Siren(config, rngs)
    if config.network == "ffn":
        return FourierFeatures(config, rngs)
    return INR(config, deq, rngs)


__all__ = [
    "FILTERS",
    "INR",
    "NETWORKS",
    "Filters",
    "FourierFeatures",
    "INRConfig",
    "Injection",
    "Output",
    "Signals",
    "Siren",
    "WarmStart",
    "evaluation_bytes",
    "has_equilibrium",
    "representation",
    "training_bytes",
]
