"""Properties of the flow networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.interop.flow import canonical, describe, export_flow, load_flow
from deqjax.interop.state_dict import StateDictError
from deqjax.models.flow import (
    SIZES,
    Cell,
    DEQFlow,
    FlowConfig,
    Injection,
    State,
    correlate,
    forward_interpolate,
    lookup,
    next_start,
    pad,
    padding_of,
    unpad,
)
from deqjax.models.flow.cell import SeparableGRU
from deqjax.models.flow.layers import Conv
from deqjax.nn.config import DEQConfig

# Much is compiled here, and little computed.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PLAIN = DEQConfig(f_solver="simple_fixed_point_iter", f_max_iter=2)


def abstract(deq=PLAIN, **settings):
    return nnx.eval_shape(lambda: DEQFlow(FlowConfig(**settings), deq, nnx.Rngs(0)))


def n_params(model):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"size": "tiny"}, 2_490_976),
        ({"size": "base"}, 5_242_816),
        ({"size": "large"}, 8_673_664),
        ({"size": "huge"}, 13_394_752),
        ({"size": "gigantic"}, 23_248_960),
        ({"size": "large", "old_version": True}, 8_449_920),
        ({"size": "huge", "old_version": True}, 12_799_808),
        ({"size": "gigantic", "old_version": True}, 21_914_176),
        ({"size": "tiny", "gma": True}, 2_524_801),
        ({"size": "base", "gma": True}, 5_783_617),
        ({"size": "huge", "gma": True}, 15_557_697),
    ],
)
def test_every_published_size_has_its_number_of_parameters(settings, expected):
    assert n_params(abstract(**settings)) == expected


# Correlation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 11), (1, 3)])
def test_both_forms_of_the_lookup_agree_in_values_and_gradients(size):
    fmaps = [normal(k, 2, *size, 6) for k in range(2)]
    coords = 4 * normal(2, 2, *size, 2) + 3
    weight = normal(3, 2, *size, 324)

    @compiled
    def both(fmap1, fmap2, coords):
        value = lambda form: lambda *x: (lookup(correlate(*x[:2], form), x[2]) * weight).sum()
        out = [lookup(correlate(fmap1, fmap2, form), coords) for form in ("volume", "on_demand")]
        return out, [jax.grad(value(form), (0, 1, 2))(fmap1, fmap2, coords) for form in ("volume", "on_demand")]

    out, gradients = both(*fmaps, coords)
    np.testing.assert_allclose(*out, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.max(jnp.abs(theirs))) + 1e-6)


def test_the_lookup_is_zero_far_outside_and_at_no_place_at_all():
    correlation = correlate(normal(0, 1, 8, 8, 4), normal(1, 1, 8, 8, 4), "on_demand")
    places = jnp.array([1e6, -1e6, jnp.nan], jnp.float32)
    out = compiled(jax.vmap(lambda place: lookup(correlation, jnp.full((1, 8, 8, 2), place))))(places)
    assert not np.any(np.nan_to_num(out))


def test_memory_of_the_lookup_on_demand_is_linear_in_the_pixels():
    def temporary(form, h, w):
        fmap, coords = (jax.ShapeDtypeStruct((1, h, w, n), jnp.float32) for n in (16, 2))
        value = lambda fmap1, fmap2, coords: lookup(correlate(fmap1, fmap2, form), coords).sum()
        compiled = jax.jit(jax.grad(value, (0, 1))).lower(fmap, fmap, coords).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four times the pixels.
    assert temporary("on_demand", 64, 64) < 5 * temporary("on_demand", 32, 32)
    assert temporary("volume", 64, 64) > 12 * temporary("volume", 32, 32)


# The cell ------------------------------------------------------------------------------------------------------------


def test_what_the_context_contributes_may_be_computed_once():
    C, graph, state = 32, *nnx.split(SeparableGRU(32, 64, lambda n_in, n_out, window: Conv(n_in, n_out, window, nnx.Rngs(0))))
    h, context, x = (normal(k, 1, 5, 6, C) for k in range(3))

    @compiled
    def both(state, h):
        gru = nnx.merge(graph, state)
        got = h
        for one, contribution in zip(*gru.effective(context, train=False), strict=True):
            got = one(got, x, contribution)
        for z, r, q in ((gru.convz1, gru.convr1, gru.convq1), (gru.convz2, gru.convr2, gru.convq2)):
            gate, reset = (jax.nn.sigmoid(layer(jnp.concatenate([h, context, x], axis=-1))) for layer in (z, r))
            h = (1 - gate) * h + gate * jnp.tanh(q(jnp.concatenate([reset * h, context, x], axis=-1)))
        return got, h

    np.testing.assert_allclose(*both(state, h), atol=1e-5)


@pytest.mark.parametrize("all_grad", [False, True])
def test_the_flow_carries_gradients_only_if_asked_to(all_grad):
    config = FlowConfig(size="tiny", all_grad=all_grad)
    cell = Cell(config, DEQConfig(), nnx.Rngs(0))
    context = normal(0, 1, 4, 4, 32)
    weights, contributions = cell.effective(context, train=False)
    injection = Injection(correlate(normal(1, 1, 4, 4, 8), normal(2, 1, 4, 4, 8), "volume"), contributions, None, weights)
    of_flow = compiled(jax.grad(lambda flow: cell(State(context, flow), injection).flow.sum()))(0.3 + normal(3, 1, 4, 4, 2))
    assert np.any(np.asarray(of_flow)) == all_grad


# The model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """With all that a network can have; compiled at once, for one by one the initial draws take long."""
    config = FlowConfig(size="tiny", gma=True, all_grad=True, dropout=0.1)
    new = lambda: DEQFlow(config, PLAIN, nnx.Rngs(0))
    model = nnx.merge(nnx.split(nnx.eval_shape(new))[0], compiled(lambda: nnx.state(new()))())
    model.cell.gma.gamma[...] = jnp.ones((1,))
    return model


@pytest.fixture(scope="module")
def other():
    """Another one of the same shape, all zeros."""
    graph, state = nnx.split(abstract(size="tiny", gma=True, all_grad=True, dropout=0.1))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))


def test_frames_of_any_size_have_flow_of_that_size(tiny):
    graph, state = nnx.split(tiny)
    run = compiled(lambda state, a, b: nnx.merge(graph, state)(a, b).flow)
    # Below 64 the original fails, below 128 it computes NaN.
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 9, 21, 3)), jnp.uint8)
    flow = run(state, image, image)
    assert flow.shape == (1, 9, 21, 2) and np.all(np.isfinite(flow))


def test_every_parameter_gets_a_gradient(tiny):
    graph, params, rest = nnx.split(tiny, nnx.Param, ...)
    images = [255 * jax.random.uniform(jax.random.key(k), (2, 32, 40, 3), jnp.float32) for k in range(2)]

    @compiled
    def gradient(params):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            out = model.solve(model.encode(*images, train=True, key=jax.random.key(2)), train=True)
            return jnp.sum(jnp.square(model.decode(out.states[-1]) - 1))

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf), path


def test_frames_of_different_sizes_and_odd_ones_are_refused(tiny):
    frame = jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match="same size"):
        tiny.encode(frame, jnp.zeros((1, 16, 24, 3)))
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny.encode(frame[:, :15], frame[:, :15])
    with pytest.raises(ValueError, match="no pixels"):
        tiny(frame[:, :0], frame[:, :0])
    with pytest.raises(ValueError, match="did you mean 'huge'"):
        FlowConfig(size="hug")


def test_padding_is_undone(tiny):
    x = normal(0, 1, 13, 9, 2)
    for mode in ("sintel", "kitti"):
        padding = padding_of(13, 9, mode)
        padded = pad(x, padding)
        assert all(n % 8 == 0 for n in padded.shape[1:3])
        np.testing.assert_array_equal(unpad(padded, padding), x)
    with pytest.raises(ValueError, match="sintel"):
        padding_of(13, 9, "middle")


def test_a_uniform_flow_is_carried_along_unchanged_and_one_that_leaves_becomes_zero():
    flow = jnp.broadcast_to(jnp.array([1.25, -0.5]), (1, 6, 7, 2))
    np.testing.assert_array_equal(forward_interpolate(flow), flow)
    assert not np.any(forward_interpolate(100 * flow))
    z = State(jnp.ones((1, 6, 7, 3)), flow)
    assert next_start(z) is None
    assert not np.any(next_start(z, warm_start=True).h) and np.all(next_start(z, fixed_point_reuse=True).h == 1)
    np.testing.assert_array_equal(next_start(z, warm_start=True, fixed_point_reuse=True).flow, 2 * flow)


def test_a_target_on_the_frames_edge_is_left_out():
    """Without horizontal motion the first column's targets lie on it; its pixels take the second column's vectors."""
    flow = jnp.stack([jnp.zeros((3, 4)), jnp.linspace(0.01, 0.1, 12).reshape(3, 4)], axis=-1)[None]
    carried = forward_interpolate(flow)
    np.testing.assert_array_equal(carried[:, :, 1:], flow[:, :, 1:])
    np.testing.assert_array_equal(carried[:, :, 0], flow[:, :, 1])


def test_frozen_batch_normalisation_is_that_of_evaluation(tiny):
    images = [255 * jax.random.uniform(jax.random.key(k), (1, 16, 24, 3)) for k in (0, 1)]

    @functools.partial(compiled, static_argnames=("train", "freeze"))
    def encode(state, train, freeze):
        model = nnx.merge(graph, state)
        injection = model.encode(*images, train=train, freeze=freeze)
        return injection, nnx.state(model, nnx.BatchStat)

    graph, state = nnx.split(tiny)
    expected, before = encode(state, train=False, freeze=False)
    frozen, after = encode(state, train=True, freeze=True)
    pairs = lambda a, b: zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for a, b in pairs(frozen, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in pairs(after, before))
    assert not all(np.array_equal(a, b) for a, b in pairs(encode(state, train=True, freeze=False)[1], before))


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_checkpoints_of_both_versions_load_and_the_wrong_ones_are_named(tiny, other):
    state_dict = {f"module.{key}": value for key, value in export_flow(tiny).items()}
    assert describe(state_dict) == {"size": "tiny", "gma": True, "old_version": False}
    first_version = {key.replace("module.mask.", "module.update_block.mask."): value for key, value in state_dict.items()}
    load_flow(other, first_version)
    for key, value in canonical(export_flow(other)).items():
        np.testing.assert_array_equal(value, state_dict[f"module.{key}"])

    with pytest.raises(StateDictError, match="gma=True"):
        load_flow(abstract(size="tiny"), state_dict)
    broken = {key: value for key, value in state_dict.items() if "mask.0.bias" not in key}
    with pytest.raises(StateDictError, match=r"missing: mask\.0\.bias"):
        load_flow(other, broken)
    with pytest.raises(StateDictError, match="no flow network"):
        load_flow(other, {"weight": np.zeros(3)})
    differing = state_dict | {"module.cnet.layer2.0.downsample.1.bias": 1 + state_dict["module.cnet.layer2.0.norm3.bias"]}
    with pytest.raises(StateDictError, match="tied weights differ"):
        load_flow(other, differing)


def test_a_size_is_recognised_by_its_shapes():
    for size in SIZES:
        widths = SIZES[size]
        arrays = {
            "update_block.gru.convz1.weight_v": np.zeros((widths.hidden, 1, 1, 5)),
            "update_block.flow_head.conv1.weight_v": np.zeros((2 * widths.motion, 1, 3, 3)),
        }
        assert describe(arrays) == {"size": size, "gma": False, "old_version": False}


def test_a_coarser_dtype_leaves_the_state_in_float32_and_each_pair_has_its_spectral_radius():
    deq = dataclasses.replace(PLAIN, sradius_mode=True)
    graph, state = nnx.split(abstract(deq, size="tiny", dtype="bfloat16"))
    image = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    out = jax.eval_shape(lambda state, a, b: nnx.merge(graph, state)(a, b), state, image, image)
    assert out.flow.dtype == out.z.h.dtype == out.z.flow.dtype == jnp.float32
    assert out.spectral_radius.shape == (1,)
