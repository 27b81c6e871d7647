"""Checkpoints of the DEQ transformer: the `deq-lm` and `deq-seq` state dicts (and those of the 2021 code, named alike)."""

from collections.abc import Mapping

import numpy as np

from deqjax.interop.state_dict import COLUMN, LINEAR, POINTWISE, POINTWISE_COLUMN, SAME, Entry, export_entries, load_entries
from deqjax.models.transformer import DEQTransformer
from deqjax.nn.layers import NormalizedLinear

_FREQUENCIES = "pos_emb.inv_freq"  # a constant buffer


def entries(model: DEQTransformer) -> list[Entry]:
    """The table from state-dict keys to the model's variables."""
    seq = model.config.recipe == "deq-seq"
    table = [Entry(f"word_emb.emb_layers.{i}.weight", t) for i, t in enumerate(model.embedding.tables)]
    table += [Entry(f"word_emb.emb_projs.{i}.weight", p) for i, p in enumerate(model.embedding.projections)]
    inject = "inject_conv" if seq else "injection"
    table += [
        Entry(f"{inject}.weight", model.injection.kernel, POINTWISE if seq else LINEAR),
        Entry(f"{inject}.bias", model.injection.bias),
    ]
    for index, block in enumerate(model.cell.blocks):
        attention, suffix = block.attention, "" if seq else f".{index}"
        prefix = f"func.dec_attn{suffix}"
        table += [
            Entry(f"{prefix}.r_w_bias", attention.content_bias),
            Entry(f"{prefix}.r_r_bias", attention.position_bias),
            *_linear(f"{prefix}.qkv_net", attention.qkv, conv=seq),
            *_linear(f"{prefix}.r_net", attention.position, conv=seq),
            *_linear(f"{prefix}.o_net", attention.output, conv=seq),
            *_norm(f"{prefix}.ln1", attention.norm_in),
            *_norm(f"{prefix}.ln2", attention.norm_out),
        ]
        prefix = f"func.pos_ff{suffix}"
        table += [
            *_linear(f"{prefix}.ff1_net", block.inner),
            *_linear(f"{prefix}.ff2_net", block.outer),
            *_norm(f"{prefix}.ln", block.norm),
        ]
    softmax = model.softmax
    if softmax.cluster_weight is not None:
        table += [Entry("crit.cluster_weight", softmax.cluster_weight), Entry("crit.cluster_bias", softmax.cluster_bias)]
    for i, (weights, bias) in enumerate(zip(softmax.tables, softmax.biases, strict=True)):
        table += [Entry(f"crit.out_layers.{i}.weight", weights), Entry(f"crit.out_layers.{i}.bias", bias)]
    table += [Entry(f"crit.out_projs.{i}.weight", p) for i, p in enumerate(softmax.projections)]
    return table


def load_transformer(model: DEQTransformer, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters from a reference state dict. Raises `StateDictError` naming every key that does not fit."""
    load_entries(entries(model), state_dict, ignore=[_FREQUENCIES])


def export_transformer(model: DEQTransformer) -> dict[str, np.ndarray]:
    """The model's parameters as a reference state dict."""
    D = model.config.d_model
    frequencies = (1 / 10000 ** (np.arange(0, D, 2) / D)).astype(model.injection.bias[...].dtype)
    return {**export_entries(entries(model)), _FREQUENCIES: frequencies}


def _linear(prefix, layer: NormalizedLinear, conv: bool = False) -> list[Entry]:
    weight, scale = (POINTWISE, POINTWISE_COLUMN) if conv else (LINEAR, COLUMN)
    name = {"weight_norm": "weight_v", "spectral_norm": "weight_orig", "none": "weight"}[layer.config.norm_type]
    table = [Entry(f"{prefix}.{name}", layer.kernel, weight)]
    if layer.scale is not None:
        table.append(Entry(f"{prefix}.weight_g", layer.scale, scale))
    if layer.bias is not None:
        table.append(Entry(f"{prefix}.bias", layer.bias))
    if layer.config.norm_type == "spectral_norm":
        table += [Entry(f"{prefix}.weight_u", layer.u, SAME), Entry(f"{prefix}.weight_v", layer.v, SAME)]
    return table


def _norm(prefix, norm) -> list[Entry]:
    if norm is None or norm.scale is None:
        return []
    return [Entry(f"{prefix}.weight", norm.scale), Entry(f"{prefix}.bias", norm.bias)]
