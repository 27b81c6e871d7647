"""Properties of the DEQ transformer."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import wt103
from deqjax.models.transformer import DEQTransformer, Memory, TransformerConfig
from deqjax.nn.config import DEQConfig

SMALL = dict(n_tokens=30, d_model=8, n_head=2, d_head=4, d_inner=12, mem_len=4, cutoffs=(10, 20), div_val=2, init_std=1.0)
EQUILIBRIUM = dict(f_solver="anderson", f_tol=1e-8, f_stop_mode="rel", f_max_iter=200, b_tol=1e-8, b_stop_mode="rel", ift=True)


def build(deq=EQUILIBRIUM, **settings):
    config = TransformerConfig(**{**SMALL, "recipe": "deq-seq", "norm": "post", **settings})
    return DEQTransformer(config, DEQConfig(**deq), nnx.Rngs(1))


def tokens_of(batch=2, length=6):
    return jax.random.randint(jax.random.key(0), (batch, length), 0, 30)


@pytest.mark.parametrize("settings", [{}, {"recipe": "deq-lm", "norm": "pre_bounded", "n_layer": 2}], ids=["seq", "lm"])
def test_a_token_does_not_see_its_future(settings):
    lm, tokens = build(**settings), tokens_of()
    injected = lambda t: lm.encode(t, Memory.empty(2, 4, 8))
    z = jax.random.normal(jax.random.key(2), (2, 6, 8))
    before, after = (lm.cell(z, injected(t)) for t in (tokens, tokens.at[:, 4].set((tokens[:, 4] + 1) % 30)))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.any(before[:, 4:] != after[:, 4:])


def test_empty_memory_rows_and_those_beyond_the_window_have_no_influence():
    lm, tokens = build(local_size=3), tokens_of()
    memory = Memory(jnp.ones((2, 4, 8)), jnp.ones((2, 4, 24)), jnp.asarray(4))
    z = jax.random.normal(jax.random.key(2), (2, 6, 8))
    run = lambda m: lm.cell(z, lm.encode(tokens, m))
    far = memory._replace(z=memory.z.at[:, :2].set(7.0))
    np.testing.assert_array_equal(run(memory), run(far))
    lm = build()
    empty = memory._replace(length=jnp.asarray(0))
    np.testing.assert_allclose(run(empty), run(Memory.empty(2, 0, 8)), atol=1e-6)


def test_segments_with_memory_equal_one_long_segment_at_equilibrium():
    lm, tokens = build(mem_len=8), tokens_of(length=8)
    whole = lm(tokens, Memory.empty(2, 8, 8))
    first = lm(tokens[:, :4], Memory.empty(2, 8, 8))
    second = lm(tokens[:, 4:], first.memory)
    np.testing.assert_allclose(second.states[-1], whole.states[-1][:, 4:], atol=1e-5)


def test_nll_is_the_log_probability_in_token_order():
    for settings in ({}, {"div_val": 1, "d_embed": 6}, {"cutoffs": (), "div_val": 1}):
        lm, targets = build(**settings), tokens_of()
        z = jax.random.normal(jax.random.key(5), (2, 6, 8))
        logp = lm.log_prob(z)
        np.testing.assert_allclose(jnp.sum(jnp.exp(logp), axis=-1), 1, rtol=1e-5)
        expected = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(lm.softmax.nll(z, targets), expected, rtol=1e-5)


def test_tails_taken_in_chunks_give_the_same_nll_and_gradient(monkeypatch):
    lm, targets = build(), jnp.asarray(np.arange(48).reshape(2, 24) % 30)
    z = jax.random.normal(jax.random.key(5), (2, 24, 8))
    loss = lambda z: jnp.sum(lm.softmax.nll(z, targets) * jnp.arange(24)[None])
    whole = jax.value_and_grad(loss)(z)
    monkeypatch.setattr("deqjax.models.transformer.adaptive._TAIL_BUDGET", 1)
    jaxpr = str(jax.make_jaxpr(loss)(z))
    assert "scan" in jaxpr
    for a, b in zip(whole, jax.value_and_grad(loss)(z), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_one_mask_per_solve():
    """With dropout f stays one map: it draws nothing itself, and applying it again to a solution moves nothing."""
    lm, tokens = build(dropout=0.4, dropatt=0.3), tokens_of()
    memory = Memory.empty(2, 4, 8)
    masks = [lm.sample_masks(jax.random.key(k), 2, 6, 4) for k in (1, 2)]
    outs = [lm(tokens, memory, train=True, masks=m) for m in masks]
    for out in outs:
        assert "random" not in str(jax.make_jaxpr(lm.cell)(out.states[-1], out.injection))
        moved = lm.cell(out.states[-1], out.injection) - out.states[-1]
        # Narrow random blocks with dropout need not contract for every sample.
        assert np.any(out.stats.converged)
        np.testing.assert_allclose(moved[out.stats.converged], 0, atol=1e-5)
    assert np.max(np.abs(outs[0].states[-1] - outs[1].states[-1])) > 1e-2


def test_every_mask_is_a_draw_of_its_own():
    settings = dict(recipe="deq-lm", norm="pre_bounded", n_layer=2, position_dropout="positions")
    lm = nnx.eval_shape(lambda: build(dict(n_states=2), dropout=0.5, dropatt=0.5, **settings))
    masks = lm.sample_masks(jax.random.key(0), 8, 6, 4)
    drawn = jax.tree.leaves(masks)
    assert len(drawn) == 12  # of embedding and positions, four of each block, one of each state
    assert all(a.shape != b.shape or np.any(a != b) for a, b in itertools.combinations(drawn, 2))
    assert masks.position.shape == (10, 1)


def test_a_memory_that_is_reset_is_an_empty_one():
    tokens, lm = tokens_of(), build()
    full = Memory(*(jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 4, 8), (2, 4, 24)])), jnp.asarray(4))
    from_empty, from_reset, from_full = (
        lm(tokens, memory) for memory in (Memory.empty(2, 4, 8), full.reset_where(True), full.reset_where(False))
    )
    np.testing.assert_array_equal(from_reset.states[-1], from_empty.states[-1])
    assert np.any(from_full.states[-1] != from_empty.states[-1])
    assert int(from_reset.memory.length) == int(from_empty.memory.length)


def test_a_memory_passes_no_gradient_on():
    kept = lambda z: Memory.empty(1, 2, 2).append(z, jnp.ones((1, 3, 6)), 2).z
    assert np.all(kept(jnp.ones((1, 3, 2))) == 1) and not np.any(jax.grad(lambda z: jnp.sum(kept(z)))(jnp.ones((1, 3, 2))))


def test_every_parameter_gets_a_gradient():
    lm, tokens = build(), tokens_of(length=24)
    memory = Memory(*(jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 4, 8), (2, 4, 24)])), jnp.asarray(4))
    for deq in (EQUILIBRIUM, dict(f_max_iter=0, grad=4), dict(grad=2, f_solver="broyden")):
        lm = build(deq)
        graph, params, rest = nnx.split(lm, nnx.Param, ...)

        def loss(params, graph=graph, rest=rest):
            lm = nnx.merge(graph, params, rest)
            return jnp.mean(lm.nll(lm(tokens, memory, train=True).states, tokens))

        for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
            assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)


def test_the_memory_enters_once_per_segment_not_once_per_step():
    """In the solver's loop no product involves the memory's rows by the key and value weights."""
    lm, tokens = build(mem_len=5), tokens_of(length=3)
    memory = Memory.empty(2, 5, 8)
    step = jax.make_jaxpr(lambda z, injection: lm.cell(z, injection))
    text = str(step(jnp.zeros((2, 3, 8)), lm.encode(tokens, memory)))
    assert "[2,5,24]" not in text and "[2,8,24]" not in text and "[2,3,24]" in text


def test_warm_start_saves_steps():
    lm, tokens = build(), tokens_of()
    memory = Memory.empty(2, 4, 8)
    cold = lm(tokens, memory)
    warm = lm(tokens, memory, z_init=cold.states[-1])
    assert np.max(warm.stats.steps) < np.min(cold.stats.steps)
    np.testing.assert_allclose(warm.states[-1], cold.states[-1], atol=1e-5)


@pytest.mark.parametrize("deq", [dict(ift=True), dict(f_solver="anderson"), dict(f_solver="broyden")])
def test_a_cell_without_fixed_point_warns(deq):
    with pytest.warns(UserWarning, match="no fixed point"):
        build(deq, recipe="deq-lm", norm="pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(deq, recipe="deq-lm", norm="pre_bounded")
        build(dict(f_max_iter=0, grad=12, b_solver="anderson"), recipe="deq-lm", norm="pre")  # which then solves nothing


def test_the_bounded_pre_norm_cell_has_a_fixed_point_and_the_plain_one_has_none():
    tokens, memory = tokens_of(), Memory.empty(2, 4, 8)
    deq = dict(f_max_iter=200, f_tol=1e-5, f_stop_mode="rel")
    for recipe in ("deq-lm", "deq-seq"):
        settings = dict(recipe=recipe, init_std=0.1)
        assert np.all(build(deq, norm="pre_bounded", **settings)(tokens, memory).stats.converged)
        assert not np.any(build(deq, norm="pre", **settings)(tokens, memory).stats.converged)


def test_the_recipe_has_every_option_of_model_and_equilibrium():
    config = wt103.get_config()
    names = lambda settings: {field.name for field in dataclasses.fields(settings)}
    assert {*config.model, "n_tokens"} == names(TransformerConfig) and {*config.deq} == names(DEQConfig)


def test_the_published_recipe_has_the_published_size():
    # The originals count the 159,600 numbers of the tied projections twice: 97,730,888 and 97,851,488.
    for variant, whole, cell in (("lm", 97_571_288, None), ("seq_ift", 97_691_888, 69_753_000)):
        config = wt103.get_config(variant)
        architecture = TransformerConfig(n_tokens=267_735, **config.model)
        lm = nnx.eval_shape(lambda a=architecture, d=config.deq: DEQTransformer(a, DEQConfig.from_config(d), nnx.Rngs(0)))
        count = lambda module: sum(x.size for x in jax.tree.leaves(nnx.split(module, nnx.Param, ...)[1]))
        assert count(lm) == whole
        assert cell is None or count(lm.cell) == cell


def test_a_solve_in_bfloat16_is_close_to_one_in_float32():
    def value_and_grad(dtype):
        graph, params, rest = nnx.split(build(dict(f_max_iter=2, grad=6), dtype=dtype, init_std=0.3), nnx.Param, ...)

        def loss(params):
            lm, tokens = nnx.merge(graph, params, rest), tokens_of()
            out = lm(tokens, Memory.empty(2, 4, 8), train=True)
            return jnp.mean(lm.nll(out.states, tokens)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    with jax.enable_x64(False):
        ((low, out), gradient), ((high, _), expected) = map(value_and_grad, ("bfloat16", "float32"))
    assert out.states[-1].dtype == jnp.bfloat16 and out.injection.blocks[0].inner.kernel.dtype == jnp.bfloat16
    assert out.stats.rel_lowest.dtype == out.memory.z.dtype == low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=0.02)
    difference = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b), gradient, expected)
    assert max(map(float, jax.tree.leaves(difference))) < 0.1


def test_initial_weights_are_drawn_as_in_the_originals():
    """With `init="uniform"` all but the projections; deq-seq keeps PyTorch's default where normalisation hides the weights."""
    spread = lambda variable: float(np.std(variable[...]))
    drawn = dict(init_range=0.3 * 3**0.5, proj_init_std=0.02, init_std=0.05, d_model=64, n_head=2, d_head=32, d_inner=64)
    lm = build(**drawn, init="uniform", recipe="deq-lm", norm="pre_bounded")
    for variable in (lm.injection.kernel, lm.cell.blocks[0].attention.qkv.kernel, lm.embedding.tables[0]):
        assert spread(variable) == pytest.approx(0.3, rel=0.05)
    for projection in (lm.embedding.projections[1], lm.softmax.projections[0]):
        assert spread(projection) == pytest.approx(0.02, rel=0.05)
    for norm_type, expected in (("weight_norm", 64**-0.5 / 3**0.5), ("none", 0.05)):
        lm = build(EQUILIBRIUM | {"norm_type": norm_type}, **drawn)
        assert spread(lm.cell.blocks[0].inner.kernel) == pytest.approx(expected, rel=0.05)


def test_wrong_sizes_are_explained():
    with pytest.raises(ValueError, match="must equal d_model"):
        build(n_head=3)
    with pytest.raises(ValueError, match="cutoffs"):
        build(cutoffs=(40,))
    with pytest.raises(ValueError, match="recipe"):
        build(recipe="deq")
