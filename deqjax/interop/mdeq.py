"""Checkpoints of multiscale models: TorchDEQ's zoo, the authors' second version, and the first one's extra copies."""

from collections.abc import Mapping

import numpy as np

from deqjax.interop.state_dict import (
    LINEAR,
    Entry,
    StateDictError,
    conv_entries,
    export_entries,
    load_entries,
)
from deqjax.models.mdeq import MDEQ, SIZES, MDEQConfig

# What some dialects hold beside the model: copies of f, and buffers of the loss.
_COPIES = ("fullstage_copy.", "full_stage_copy.", "deq.func_copy.")
_ALIASES = ("deq.func.",)
_LOSS = ("loss.", "criterion.")
_HEADS = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.", "last_layer.")


def load_mdeq(model: MDEQ, state_dict: Mapping[str, np.ndarray], *, backbone_only: bool = False) -> None:
    """Sets the model's parameters and running statistics from a state dict of any dialect.

    A convolution whose weight is normalised here but not there, or the other way round, is converted.

    Args:
      state_dict: arrays by key.
      backbone_only: leave the head as it is, as when an ImageNet classifier begins a segmentation model.

    Raises:
      StateDictError: it is of another variant, which is named, or of no multiscale model at all.
    """
    state_dict = canonical(state_dict)
    _check_variant(model.config, model.deq.config.norm_type, state_dict, backbone_only)
    table = backbone_entries(model)
    if backbone_only:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(_HEADS)}
    else:
        table += head_entries(model)
    load_entries(table, _as_normalized(table, state_dict))


def export_mdeq(model: MDEQ, dialect: str | None = None) -> dict[str, np.ndarray]:
    """The model's parameters and running statistics as a state dict.

    Args:
      dialect: "zoo" (`full_stage.`) or "vision" (`fullstage.`, and a segmentation model inside `model.`, as the authors' test
        tool reads it); None takes the one that the variant comes from.
    """
    dialect = dialect or ("vision" if model.config.normalized == "branches_and_post" else "zoo")
    if dialect not in ("zoo", "vision"):
        raise ValueError(f"dialect={dialect!r}: must be 'zoo' or 'vision'.")
    arrays = export_entries(backbone_entries(model) + head_entries(model))
    counters = {key.removesuffix("running_var") + "num_batches_tracked" for key in arrays if key.endswith("running_var")}
    arrays |= {key: np.zeros((), np.int64) for key in sorted(counters)}
    if dialect == "zoo":
        return arrays
    outer = "model." if model.config.head == "segmentation" else ""
    return {outer + key.replace("full_stage.", "fullstage."): value for key, value in arrays.items()}


# The tables ----------------------------------------------------------------------------------------------------------


def backbone_entries(model: MDEQ) -> list[Entry]:
    """Stem and f, under the zoo's keys."""
    stem, cell, table = model.stem, model.cell, []
    places = [("downsample.0", "downsample.1"), ("downsample.3", "downsample.4")]
    places += [(f"downsample.DS{t}", f"downsample.DS{t}-BN") for t in range(3, model.config.downsample + 1)]
    places += [("stage0.0", "stage0.1")] if model.config.has_stage0 else []
    for (conv, norm), convolution, normalization in zip(places, stem.convs, stem.norms, strict=True):
        table += conv_entries(conv, convolution) + _batch_norm(norm, normalization)
    for i, blocks in enumerate(cell.blocks):
        for b, block in enumerate(blocks):
            prefix = f"full_stage.branches.{i}.blocks.{b}"
            table += conv_entries(f"{prefix}.conv1", block.conv1) + conv_entries(f"{prefix}.conv2", block.conv2)
            for k, norm in enumerate((block.norm1, block.norm2, block.norm3), start=1):
                table += _affine(f"{prefix}.gn{k}", norm)
    for to, row in enumerate(cell.fuse):
        for of, stages in enumerate(row):
            for k, stage in enumerate(stages):
                prefix = f"full_stage.fuse_layers.{to}.{of}.net" + (f".{k}" if of < to else "")
                table += conv_entries(f"{prefix}.conv", stage.conv) + _affine(f"{prefix}.gnorm", stage.norm)
    for i, post in enumerate(cell.post):
        prefix = f"full_stage.post_fuse_layers.{i}"
        table += conv_entries(f"{prefix}.conv", post.conv) + _affine(f"{prefix}.gnorm", post.norm)
    return table


def head_entries(model: MDEQ) -> list[Entry]:
    """The head, under the keys that all dialects share."""
    head, table = model.head, []
    if model.config.head == "segmentation":
        table += conv_entries("last_layer.0", head.mix.conv) + _batch_norm("last_layer.1", head.mix.norm)
        return table + conv_entries("last_layer.3", head.final)
    for i, increase in enumerate(head.increase):
        prefix = f"incre_modules.{i}.0"
        for k, layer in enumerate(increase.layers, start=1):
            table += conv_entries(f"{prefix}.conv{k}", layer.conv) + _batch_norm(f"{prefix}.bn{k}", layer.norm)
        if increase.shortcut is not None:
            table += conv_entries(f"{prefix}.downsample.0", increase.shortcut.conv)
            table += _batch_norm(f"{prefix}.downsample.1", increase.shortcut.norm)
    layers = [(f"downsamp_modules.{i}", down) for i, down in enumerate(head.down)] + [("final_layer", head.final)]
    for prefix, layer in layers:
        table += conv_entries(f"{prefix}.0", layer.conv) + _batch_norm(f"{prefix}.1", layer.norm)
    return [*table, Entry("classifier.weight", head.kernel, LINEAR), Entry("classifier.bias", head.bias)]


def _affine(prefix: str, norm) -> list[Entry]:
    if norm.scale is None:
        return []
    return [Entry(f"{prefix}.weight", norm.scale), Entry(f"{prefix}.bias", norm.bias)]


def _batch_norm(prefix: str, norm) -> list[Entry]:
    statistics = [Entry(f"{prefix}.running_mean", norm.mean), Entry(f"{prefix}.running_var", norm.var)]
    return _affine(prefix, norm) + statistics


# Dialects ------------------------------------------------------------------------------------------------------------


def canonical(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict under the zoo's keys, without copies of f, buffers of the loss and counters of batches."""
    arrays, aliases = {}, {}
    for key, value in state_dict.items():
        for prefix in ("module.", "model."):
            key = key.removeprefix(prefix)
        if key.startswith((*_COPIES, *_LOSS)) or key.endswith("num_batches_tracked"):
            continue
        if key.startswith(_ALIASES):
            aliases[f"full_stage.{key.removeprefix('deq.func.')}"] = value
        elif key.startswith("fullstage."):
            arrays[f"full_stage.{key.removeprefix('fullstage.')}"] = value
        else:
            arrays[key] = value
    if not any(key.startswith("full_stage.") for key in arrays):
        arrays |= aliases
    return arrays


def _as_normalized(table: list[Entry], state_dict: dict) -> dict:
    """The state dict with the convolutions' weights in the form, plain or weight-normalised, that the table asks for."""
    arrays, wanted = dict(state_dict), {entry.key for entry in table}
    for key in wanted:
        prefix, _, name = key.rpartition(".")
        plain, v, g = (f"{prefix}.{name}" for name in ("weight", "weight_v", "weight_g"))
        # Without scales of its own a normalised convolution cannot have a plain one's norms.
        if name == "weight_v" and g in wanted and v not in arrays and plain in arrays and f"{prefix}.weight_orig" not in wanted:
            arrays[v] = np.asarray(arrays.pop(plain))
            arrays[g] = _norms(arrays[v])
        elif name == "weight" and plain not in arrays and v in arrays and np.ndim(arrays[v]) == 4:
            kernel, scale = np.asarray(arrays.pop(v)), arrays.pop(g, 1.0)
            arrays[plain] = kernel * (np.asarray(scale) / _norms(kernel))
    return arrays


def _norms(kernel):
    return np.sqrt(np.sum(np.square(kernel), axis=(1, 2, 3), keepdims=True))


# Variants ------------------------------------------------------------------------------------------------------------


def describe(state_dict: Mapping[str, np.ndarray]) -> dict:
    """What a state dict tells of its model, in terms of `MDEQConfig`; strides, groups and rates leave no trace in it.

    Raises:
      StateDictError: it is of no multiscale model.
    """
    arrays = canonical(state_dict)
    kernels = {}
    for key, value in arrays.items():
        prefix, _, name = key.rpartition(".")
        if name in ("weight", "weight_v", "weight_orig") and np.ndim(value) == 4:
            kernels[prefix] = np.shape(value)
    block = lambda i, b, k: kernels.get(f"full_stage.branches.{i}.blocks.{b}.conv{k}")  # noqa: E731
    if block(0, 0, 1) is None or "downsample.0" not in kernels:
        some = ", ".join(list(state_dict)[:4])
        raise StateDictError(
            f"the state dict is of no multiscale model: it lacks f's first block or the stem; it has {some} ..."
        )
    n = next(i for i in range(len(kernels)) if block(i, 0, 1) is None)
    blocks = tuple(next(b for b in range(len(kernels)) if block(i, b, 1) is None) for i in range(n))
    found = {
        "channels": tuple(block(i, 0, 1)[1] for i in range(n)),
        "inner_channels": tuple(block(i, 0, 1)[0] for i in range(n)),
        "n_blocks": blocks,
        "big_kernels": tuple(sum(kernel[2] == 5 for k in (1, 2) if (kernel := block(i, 0, k))) for i in range(n)),
        "in_channels": kernels["downsample.0"][1],
        "block_affine": "full_stage.branches.0.blocks.0.gn1.weight" in arrays,
        "norm_type": _norm_type(arrays),
    }
    if n > 1:
        found["fuse_affine"] = "full_stage.fuse_layers.0.1.net.gnorm.weight" in arrays
        found["post_affine"] = "full_stage.post_fuse_layers.0.gnorm.weight" in arrays
    if "classifier.weight" in arrays:
        heads = tuple(kernels[f"incre_modules.{i}.0.conv1"][0] for i in range(n) if f"incre_modules.{i}.0.conv1" in kernels)
        n_classes, final = np.shape(arrays["classifier.weight"])
        found |= {"head": "classification", "head_channels": heads, "final_channels": final, "n_classes": n_classes}
    elif "last_layer.3" in kernels:
        n_classes, _, kernel, _ = kernels["last_layer.3"]
        found |= {"head": "segmentation", "final_kernel": kernel, "n_classes": n_classes}
    return found


def _norm_type(arrays) -> str:
    prefix = "full_stage.branches.0.blocks.0.conv1"
    if f"{prefix}.weight_orig" in arrays:
        return "spectral_norm"
    return "weight_norm" if f"{prefix}.weight_v" in arrays else "none"


def published_as(found: Mapping) -> list[str]:
    """The published networks that a description fits."""
    return [size for size in SIZES if not _differences(found, _expected(MDEQConfig.published(size)))]


def _expected(config: MDEQConfig) -> dict:
    described = {name: getattr(config, name) for name in MDEQConfig.__dataclass_fields__}
    return described | {"inner_channels": tuple(int(config.expansion * C) for C in config.channels)}


def _differences(found: Mapping, expected: Mapping) -> list[str]:
    return [
        f"{name} is {value!r} there, {expected[name]!r} here"
        for name, value in found.items()
        if name in expected and value != expected[name]
    ]


def _check_variant(config: MDEQConfig, norm_type: str, state_dict: Mapping, backbone_only: bool) -> None:
    found = describe(state_dict)
    if backbone_only:
        found = {
            k: v for k, v in found.items() if k not in ("head", "head_channels", "final_channels", "final_kernel", "n_classes")
        }
    problems = _differences(found, _expected(config))
    if "spectral_norm" in (found["norm_type"], norm_type) and found["norm_type"] != norm_type:
        problems.append(f"norm_type is {found['norm_type']!r} there, {norm_type!r} here")
    if problems:
        names = published_as(found)
        whose = f" It fits the published {', '.join(names)}." if names else ""
        raise StateDictError(f"the state dict is of another variant: {'; '.join(problems)}.{whose}")
