"""Checkpoints of DDPM U-Nets: the DDIM code base's (and pesser/pytorch_diffusion's, which it downloads) and diffusers'."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deqjax.interop.state_dict import LINEAR, Entry, Layout, StateDictError, export_entries, load_entries
from deqjax.models.ddim.unet import Attention, Conv, Dense, ResBlock, UNet

CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # (out, in, 3, 3) to (3, 3, in, out)
PIXELWISE = Layout(lambda x: x[..., 0, 0].T, lambda x: x.T[..., None, None])  # (out, in, 1, 1) to (in, out)

# MD5 of the files that the DDIM code base downloads, converted from the TensorFlow weights of Ho et al. (2020). The averaged
# weights (ema) make far better images.
PUBLISHED = {
    "82ed3067fd1002f5cf4c339fb80c4669": "cifar10",
    "1fa350b952534ae442b1d5235cce5cd3": "ema_cifar10",
    "f70280ac0e08b8e696f42cb8e948ff1c": "lsun_bedroom",
    "1921fa46b66a3665e450e42f36c2720f": "ema_lsun_bedroom",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "lsun_church",
    "fdc68a23938c2397caba4a260bc2445f": "ema_lsun_church",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "lsun_cat",
    "646f23f4821f2459b8bafc57fd824558": "ema_lsun_cat",
}


def published_name(path) -> str | None:
    """Which published checkpoint a file is, by its MD5; None if it is none of them."""
    with open(Path(path), "rb") as file:
        return PUBLISHED.get(hashlib.file_digest(file, "md5").hexdigest())


def load_ddim(model: UNet, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters from a state dict under either library's names.

    Raises:
      StateDictError: keys that do not fit, all of them named; first of all the resolution that the weights are for, if it is
        another.
    """
    prefix = "module." if state_dict and all(key.startswith("module.") for key in state_dict) else ""
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    diffusers = any(key.startswith("down_blocks.") for key in state_dict)
    if not diffusers:
        _check_levels(model, state_dict)
    older = any(key.endswith(".proj_attn.weight") for key in state_dict)
    load_entries(_diffusers(model, older) if diffusers else entries(model), state_dict, ignore=["logvar"])


def export_ddim(model: UNet, *, diffusers: bool = False) -> dict[str, np.ndarray]:
    """The model's parameters as a state dict of the DDIM code base, or of diffusers' `UNet2DModel`."""
    return export_entries(_diffusers(model) if diffusers else entries(model))


def entries(model: UNet) -> list[Entry]:
    """The table from the DDIM code base's keys to the model's variables."""
    table = []
    for n, layer in enumerate(model.temb):
        table += _layer(f"temb.dense.{n}", layer, LINEAR)
    table += _layer("conv_in", model.conv_in)
    for way, levels in (("down", model.down), ("up", model.up)):
        for n, level in enumerate(levels):
            for b, block in enumerate(level.block):
                table += _block(f"{way}.{n}.block.{b}", block)
            for b, attention in enumerate(level.attn):
                table += _attention(f"{way}.{n}.attn.{b}", attention)
            for name in ("downsample", "upsample"):
                table += _resample(f"{way}.{n}.{name}.conv", getattr(level, name))
    table += [*_block("mid.block_1", model.mid.block_1), *_attention("mid.attn_1", model.mid.attn_1)]
    table += _block("mid.block_2", model.mid.block_2)
    return [*table, *_layer("norm_out", model.norm_out), *_layer("conv_out", model.conv_out)]


def _diffusers(model: UNet, older: bool = False) -> list[Entry]:
    """The same with the keys of `UNet2DModel`, whose up blocks are numbered in the order in which they run."""
    L = len(model.up)
    inner = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut", "norm": "group_norm"}
    inner |= dict(zip("qkv", ("query", "key", "value") if older else ("to_q", "to_k", "to_v"), strict=True))
    inner["proj_out"] = "proj_attn" if older else "to_out.0"
    tops = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2", "norm_out": "conv_norm_out"}
    tops |= {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1", "mid.attn_1": "mid_block.attentions.0"}

    def renamed(entry: Entry) -> Entry:
        module, _, kind = entry.key.rpartition(".")
        if found := re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", module):
            way, level, group, number, name = found.groups()
            level = L - 1 - int(level) if way == "up" else level
            group = {"block": "resnets", "attn": "attentions"}[group]
            module = f"{way}_blocks.{level}.{group}.{number}.{inner.get(name, name)}"
        elif found := re.fullmatch(r"(down|up)\.(\d+)\.(\w+)sample\.conv", module):
            way, level, _ = found.groups()
            level = L - 1 - int(level) if way == "up" else level
            module = f"{way}_blocks.{level}.{way}samplers.0.conv"
        elif module not in tops and module.startswith("mid."):
            parent, _, name = module.rpartition(".")
            module = f"{tops[parent]}.{inner.get(name, name)}"
        else:
            module = tops.get(module, module)
        # Their attention is linear maps, of two axes.
        flat = entry.layout is PIXELWISE and "attentions" in module
        return Entry(f"{module}.{kind}", entry.variable, LINEAR if flat else entry.layout)

    return [renamed(entry) for entry in entries(model)]


def _block(prefix: str, block: ResBlock) -> list[Entry]:
    table = []
    for name in ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"):
        layer = getattr(block, name)
        if layer is not None:
            table += _layer(f"{prefix}.{name}", layer, LINEAR if name == "temb_proj" else PIXELWISE)
    return table


def _attention(prefix: str, attention: Attention) -> list[Entry]:
    names = ("norm", "q", "k", "v", "proj_out")
    return [entry for name in names for entry in _layer(f"{prefix}.{name}", getattr(attention, name))]


def _resample(prefix: str, module) -> list[Entry]:
    return [] if module is None or module.conv is None else _layer(prefix, module.conv)


def _layer(prefix: str, layer, dense: Layout = PIXELWISE) -> list[Entry]:
    if isinstance(layer, (Conv, Dense)):
        layout = CONV if isinstance(layer, Conv) else dense
        return [Entry(f"{prefix}.weight", layer.kernel, layout), Entry(f"{prefix}.bias", layer.bias)]
    return [Entry(f"{prefix}.weight", layer.scale), Entry(f"{prefix}.bias", layer.bias)]


def _check_levels(model: UNet, state_dict: Mapping) -> None:
    """Weights of another resolution differ in the number of levels, or in which of them have attention."""

    def structure(keys):
        found = [re.match(r"down\.(\d+)\.(block|attn)\.", key) for key in keys]
        levels = {kind: {int(m[1]) for m in found if m and m[2] == kind} for kind in ("block", "attn")}
        return len(levels["block"]), sorted(levels["attn"])

    given, ours = structure(state_dict), structure(entry.key for entry in entries(model))
    if given == ours or not given[0]:
        return
    config = model.config
    hint = ""
    if given[1] and config.attention:
        size = max(config.attention) << given[1][0]
        hint = f" If their attention is at {max(config.attention)}x{max(config.attention)}, they are for {size}x{size} images."
    raise StateDictError(
        f"the weights are of a U-Net of {given[0]} levels with attention on {given[1] or 'none'}, but this model, for "
        f"{config.image_size}x{config.image_size} images, has {ours[0]} levels with attention on {ours[1] or 'none'}.{hint} "
        "Set model.image_size, model.multipliers and model.attention to those of the checkpoint."
    )
