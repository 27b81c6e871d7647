"""Multiscale models: published sizes, initial distributions, settings, checkpoints of every dialect."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.interop.mdeq import canonical, describe, export_mdeq, load_mdeq, published_as
from deqjax.interop.state_dict import StateDictError
from deqjax.models.mdeq import MDEQ, SIZES, MDEQConfig, resize_bilinear
from deqjax.models.mdeq.layers import Conv
from deqjax.nn.config import DEQConfig
from deqjax.training.state import count_parameters

PARAMETERS = {
    "cifar10_small": 159_034,
    "cifar10_large": 11_099_998,
    "cifar10_tiny": 158_890,
    "cifar10_large_ift": 11_097_438,
    "cifar10_large_reg": 11_097_438,
    "imagenet_small": 16_808_456,
    "imagenet_small_ift": 16_808_936,
    "imagenet_small_reg": 18_613_496,
    "imagenet_large": 67_063_624,
    "imagenet_large_reg": 67_061_224,
    "imagenet_xl": 90_463_280,
    "cityscapes_small": 8_968_467,
    "cityscapes_large": 55_955_859,
    "cityscapes_xl": 79_551_755,
}
TINY = {"n_classes": 3, "channels": (4, 8), "n_groups": 2, "expansion": 2}
CLASSIFIER = TINY | {"head": "classification", "head_channels": (2, 3), "final_channels": 6}
SEGMENTER = TINY | {"head": "segmentation", "downsample": 1}


@functools.cache
def tiny(head="classification", norm_type="weight_norm", **changes):
    """A small model, its arrays drawn by NumPy: nothing is at its initial value, and nothing has to be compiled."""
    config = MDEQConfig(**(CLASSIFIER if head == "classification" else SEGMENTER) | changes)
    model = nnx.eval_shape(lambda: MDEQ(config, DEQConfig(norm_type=norm_type), nnx.Rngs(0)))
    return filled(model, lambda shape, draw=np.random.default_rng(1): draw.uniform(0.5, 1.5, shape))


def filled(model, values):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(values(x.shape), jnp.float64), state))


def fresh(model):
    return filled(model, np.zeros)


def equal(a, b):
    a, b = export_mdeq(a), export_mdeq(b)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-6, err_msg=key)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_their_numbers_of_parameters(size):
    model = nnx.eval_shape(lambda: MDEQ(MDEQConfig.published(size), DEQConfig(), nnx.Rngs(0)))
    assert count_parameters(nnx.state(model, nnx.Param)) == PARAMETERS[size]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (4, 6), "n_groups": 4}, "n_groups=4 must divide"),
        ({"head_channels": (2,)}, "head_channels=.* needs 2 numbers"),
        ({"head": "detection"}, "head='detection'"),
        ({"n_blocks": (1, 0)}, "n_blocks=.* 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MDEQConfig(**CLASSIFIER | changes)
    with pytest.raises(ValueError, match="did you mean 'cifar10_small'"):
        MDEQConfig.published("cifar10_smal")


def test_images_that_do_not_fit_are_refused():
    model = tiny("segmentation")
    assert jax.eval_shape(model, jnp.zeros((1, 20, 16, 3))).shape == (1, 10, 8, 3)
    with pytest.raises(ValueError, match="18 x 16: height and width must be multiples of 4"):
        model(jnp.zeros((1, 18, 16, 3)))
    with pytest.raises(ValueError, match="1 channels for a model of in_channels=3"):
        model(jnp.zeros((1, 16, 16, 1)))


# Initial values ------------------------------------------------------------------------------------------------------


def test_initial_distributions_are_the_published_ones():
    def conv(norm_type="none", use_bias=False, **changes):
        deq = DEQConfig(norm_type=norm_type)
        return Conv(64, 64, 3, MDEQConfig(**CLASSIFIER | changes), nnx.Rngs(0), deq=deq, use_bias=use_bias)

    def is_uniform(x):
        return abs(np.abs(x).max() * fan**0.5 - 1) < 0.02 and abs(np.std(x) * (3 * fan) ** 0.5 - 1) < 0.02

    def is_normal(x):
        return abs(np.std(x) / 0.01 - 1) < 0.02 and np.abs(x).max() > 0.03

    fan = 9 * 64
    # Weight-normalised kernels are missed by the originals' initialisation, others are reached, and so are biases.
    missed = conv("weight_norm")
    assert is_uniform(missed.kernel[...])
    np.testing.assert_allclose(missed.scale[...], jnp.sqrt(jnp.sum(missed.kernel[...] ** 2, axis=(0, 1, 2))), rtol=1e-12)
    assert is_normal(conv("weight_norm", init_normalized=True).kernel[...])
    assert is_normal(conv("spectral_norm").kernel[...]) and is_uniform(conv(init="uniform").kernel[...])
    reached = conv(use_bias=True)
    assert is_normal(reached.kernel[...]) and 0.007 < np.std(reached.bias[...]) < 0.013
    assert 0.8 < np.abs(conv(init="uniform", use_bias=True).bias[...]).max() * fan**0.5 <= 1


def test_what_is_normalised_follows_the_variant():
    def of(normalized):
        cell = tiny(normalized=normalized).cell
        convs = cell.blocks[0][0].conv1, cell.fuse[0][1][0].conv, cell.fuse[1][0][0].conv, cell.post[1].conv
        return [conv.scale is not None for conv in convs]

    assert of("all") == [True] * 4
    assert of("branches") == [True, False, False, False]
    assert of("branches_and_post") == [True, False, False, True]


# The map -------------------------------------------------------------------------------------------------------------


def once(model, x):
    """One application of f, at a state that depends on nothing else."""
    graph, state = nnx.split(model)

    def apply(state, x):
        model = nnx.merge(graph, state)
        injection = model.encode(x)
        z = tuple(jnp.sin(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape) for z in model.initial_state(injection))
        return model.cell(z, injection), injection.weights.blocks[0][0].conv1.kernel

    return jax.jit(apply, compiler_options={"xla_backend_optimization_level": 0})(state, x)


def test_coarser_convolutions_keep_the_state_and_the_norms_fine():
    """bfloat16 changes f by its rounding, and no dtype but the kernels'."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    fine, coarse = (once(tiny(dtype=dtype), x) for dtype in (None, "bfloat16"))
    assert coarse[1].dtype == jnp.bfloat16 != fine[1].dtype
    for a, b in zip(fine[0], coarse[0], strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert 1e-5 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.05


def test_one_mask_per_sample_and_channel():
    cell = tiny(dropout=0.5).cell
    masks = cell.sample_masks(jax.random.key(1), 64)
    assert [m.shape for (m,) in masks] == [(64, 1, 1, 4), (64, 1, 1, 8)]
    assert set(np.unique(masks[0][0])) == {0.0, 2.0} and not np.array_equal(masks[0][0], masks[1][0][..., :4])
    assert cell.sample_masks(None, 64) == ((None,), (None,))
    # Each block of each map draws for itself, and only in training.
    model, images = tiny(dropout=0.5, channels=(4, 4), n_blocks=2), jnp.ones((1, 8, 8, 3))
    drawn = jax.tree.leaves(model.cell.sample_masks(jax.random.key(1), 64))
    assert all(np.any(a != b) for a, b in itertools.combinations(drawn, 2)) and len(drawn) == 4
    assert not jax.tree.leaves(jax.eval_shape(lambda x: model.encode(x, key=jax.random.key(1)).masks, images))


def test_one_feature_map_needs_no_fusion():
    model = tiny(channels=(4,), head_channels=(2,))
    assert jax.eval_shape(model, jnp.ones((2, 6, 6, 3))).shape == (2, 3)
    loaded = fresh(model)
    load_mdeq(loaded, export_mdeq(model))
    equal(model, loaded)


def test_resizing_to_the_same_size_changes_nothing_and_constants_stay():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5, 2)))
    assert resize_bilinear(x, (3, 5), align_corners=True) is x
    for align in (True, False):
        np.testing.assert_allclose(resize_bilinear(0 * x + 2, (7, 1), align_corners=align), 2.0, rtol=1e-12)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def zoo(state_dict):
    """As TorchDEQ's ImageNet code saves it, from several devices."""
    return {f"module.{key}": value for key, value in state_dict.items()}


def first_version(state_dict):
    """With its copies of f."""
    stage = {key.partition(".")[2]: value for key, value in state_dict.items() if key.startswith("full_stage.")}
    renamed = {key.replace("full_stage.", "fullstage."): value for key, value in state_dict.items()}
    copies = {
        f"{name}.{key}": value for name in ("fullstage_copy", "deq.func", "deq.func_copy") for key, value in stage.items()
    }
    return renamed | copies


def cityscapes(state_dict):
    """Inside the module that computes the loss."""
    renamed = {f"model.{key.replace('full_stage.', 'fullstage.')}": value for key, value in state_dict.items()}
    return renamed | {"loss.criterion.weight": np.ones(19)}


def aliases_only(state_dict):
    return {key.replace("full_stage.", "deq.func."): value for key, value in state_dict.items()}


@pytest.mark.parametrize("dialect", [dict, zoo, first_version, cityscapes, aliases_only])
@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm", "none"])
def test_every_dialect_is_read(dialect, norm_type):
    model = tiny(norm_type=norm_type)
    loaded = fresh(model)
    load_mdeq(loaded, dialect(export_mdeq(model)))
    equal(model, loaded)


def test_export_speaks_either_dialect_with_every_counter():
    model = tiny()
    exported = export_mdeq(model, "vision")
    assert any(key.startswith("fullstage.") for key in exported) and not any("full_stage" in key for key in exported)
    assert exported["downsample.1.num_batches_tracked"].dtype == np.int64
    assert canonical(exported).keys() == canonical(export_mdeq(model, "zoo")).keys()
    # The authors' test tool takes the first six letters off every key of a segmentation model.
    segmenter = export_mdeq(tiny("segmentation", normalized="branches_and_post"))
    assert all(key.startswith("model.") for key in segmenter) and "model.last_layer.3.bias" in segmenter
    with pytest.raises(ValueError, match="dialect='torch'"):
        export_mdeq(model, "torch")


def test_plain_and_normalised_weights_are_converted_without_a_change_of_f():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    everything, some, nothing = tiny(), tiny(normalized="branches_and_post"), tiny(norm_type="none")
    for source, target in ((everything, some), (some, everything), (everything, nothing), (nothing, everything)):
        loaded = fresh(target)
        load_mdeq(loaded, export_mdeq(source))
        for a, b in zip(once(source, x)[0], once(loaded, x)[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    unscaled = nnx.eval_shape(lambda: MDEQ(everything.config, DEQConfig(norm_no_scale=True), nnx.Rngs(0)))
    with pytest.raises(StateDictError, match=r"missing: full_stage\.branches\.0\.blocks\.0\.conv1\.weight_v"):
        load_mdeq(fresh(unscaled), export_mdeq(nothing))


def test_singular_vectors_are_read_in_the_originals_order():
    model = tiny(norm_type="spectral_norm")
    exported, layer = export_mdeq(model), model.cell.blocks[0][0].conv1
    matrix = exported["full_stage.branches.0.blocks.0.conv1.weight_orig"].reshape(layer.u[...].size, -1)
    u, v = (exported[f"full_stage.branches.0.blocks.0.conv1.weight_{name}"] for name in "uv")
    ours = layer.kernel[...].reshape(-1, layer.u[...].size)
    np.testing.assert_allclose(u @ matrix @ v, layer.v[...] @ ours @ layer.u[...], rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"post_affine": False}, "post_affine is False there, True here"),
        ({"channels": (4, 4)}, r"channels is \(4, 4\) there, \(4, 8\) here"),
        ({"n_classes": 5}, "n_classes is 5 there, 3 here"),
        ({"head": "segmentation"}, "head is 'segmentation' there, 'classification' here"),
        ({"norm_type": "spectral_norm"}, "norm_type is 'spectral_norm' there, 'weight_norm' here"),
        ({"n_blocks": (1, 2)}, r"n_blocks is \(1, 2\) there, \(1, 1\) here"),
        ({"big_kernels": (1, 2)}, r"big_kernels is \(1, 2\) there, \(0, 0\) here"),
    ],
)
def test_a_state_dict_of_another_variant_is_named_as_such(source, message):
    with pytest.raises(StateDictError, match=message):
        load_mdeq(fresh(tiny()), export_mdeq(tiny(**source)))


def test_published_variants_are_recognised():
    shapes = nnx.eval_shape(lambda: MDEQ(MDEQConfig.published("cifar10_tiny"), DEQConfig(), nnx.Rngs(0)))
    graph, state = nnx.split(shapes)
    found = describe(export_mdeq(nnx.merge(graph, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), state))))
    assert published_as(found) == ["cifar10_tiny"]
    # What is missing is named, wherever it is.
    part = {key: value for key, value in export_mdeq(tiny()).items() if "branches.1.blocks.0.conv2" not in key}
    with pytest.raises(StateDictError, match=r"missing: full_stage\.branches\.1\.blocks\.0\.conv2"):
        load_mdeq(fresh(tiny()), part)
    with pytest.raises(StateDictError, match="of no multiscale model"):
        describe({"word_emb.weight": np.zeros((2, 2))})


def test_a_classifier_begins_a_segmentation_model():
    source = tiny(downsample=1)
    model = fresh(tiny("segmentation"))
    load_mdeq(model, export_mdeq(source), backbone_only=True)
    ours, theirs = export_mdeq(model), export_mdeq(source)
    for key in ours:
        np.testing.assert_allclose(ours[key], 0 if key.startswith("last_layer") else theirs[key], rtol=1e-6)
