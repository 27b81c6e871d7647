"""Implicit graph neural networks."""

from deqjax.models.ignn.config import IGNNConfig
from deqjax.models.ignn.explicit import GCN
from deqjax.models.ignn.graphs import Bucket, GraphsTuple, alone, choose_bucket, fit_buckets, node_mask, pad_rows, single, stack
from deqjax.models.ignn.layer import ImplicitGraphLayer, Injection
from deqjax.models.ignn.network import IGNN, Output
from deqjax.models.ignn.projection import project_columns, project_rows

__all__ = [
    "GCN",
    "IGNN",
    "Bucket",
    "GraphsTuple",
    "IGNNConfig",
    "ImplicitGraphLayer",
    "Injection",
    "Output",
    "alone",
    "choose_bucket",
    "fit_buckets",
    "node_mask",
    "pad_rows",
    "project_columns",
    "project_rows",
    "single",
    "stack",
]
