"""The DEQ transformer."""

from deqjax.models.transformer.config import TransformerConfig
from deqjax.models.transformer.memory import Memory
from deqjax.models.transformer.model import DEQTransformer, Masks, Output

__all__ = ["DEQTransformer", "Masks", "Memory", "Output", "TransformerConfig"]
