"""Golden kinds of the DEQ transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.interop.transformer import entries, export_transformer, load_transformer
from deqjax.models.transformer import DEQTransformer, Masks, Memory, TransformerConfig
from deqjax.models.transformer.attention import relative_shift, sinusoids
from deqjax.models.transformer.cell import BlockMasks
from deqjax.nn.config import DEQConfig
from tests.golden import Case, close
from tests.kinds.deq_lm_data import check_data

# The fixed point of these cases is reached by plain iteration, as the references reached it.
TIGHT = {"ift": True, "f_tol": 1e-15, "b_tol": 1e-15, "f_stop_mode": "rel", "b_stop_mode": "rel"}


def build(case: Case, c: dict, recipe: str, deq: dict, params=None, **model):
    """A float64 model with the case's parameters."""
    params = case.group("param") if params is None else params
    config = TransformerConfig(
        recipe=recipe,
        norm="post" if recipe == "deq-seq" and not c.get("pre_lnorm") else "pre",
        n_tokens=c["V"],
        d_model=c["D"],
        n_head=c["H"],
        d_head=c.get("dh", c["D"] // c["H"]),
        d_inner=c["F"],
        n_layer=c.get("n_layer", 1),
        d_embed=c["d_embed"],
        cutoffs=tuple(c["cutoffs"]),
        div_val=c["div_val"],
        local_size=c.get("local_size", 0),
        mem_len=c["mem_len"],
        **model,
    )
    settings = DEQConfig.from_config({"preset": "torchdeq", "norm_type": c.get("norm", "weight_norm"), **deq})
    lm = DEQTransformer(config, settings, nnx.Rngs(0))
    graph, state = nnx.split(lm)
    lm = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64) if x.ndim else x, state))
    load_transformer(lm, params)
    exported = export_transformer(lm)
    for key, value in params.items():
        np.testing.assert_allclose(exported[key], value, rtol=1e-12, err_msg=f"{key} after the round trip")
    return lm


def memory_of(case: Case, c: dict, batch: int, seq: bool) -> Memory:
    """The case's memory; channel-first in deq-seq."""
    if "in/mem_z" not in case:
        return Memory.empty(batch, 0, c["D"], jnp.float64)
    z, u = (jnp.asarray(case[f"in/mem_{n}"]) for n in "zu")
    if seq:
        z, u = jnp.swapaxes(z, 1, 2), jnp.swapaxes(u, 1, 2)
    return Memory(z, u, jnp.asarray(z.shape[1], jnp.int32))


def check_gradients(lm, gradients, expected: dict, what: str):
    """Our gradients against the reference's, which lists tied weights once or once per name."""
    by_variable = {}
    graph, _ = nnx.split(lm)
    with_gradients = nnx.merge(graph, gradients)
    for ours in entries(with_gradients):
        by_variable.setdefault(id(ours.variable), []).append(ours)
    for group in by_variable.values():
        keys = [e.key for e in group if e.key in expected]
        assert keys, f"{what}: the reference has no gradient for {[e.key for e in group]}"
        want = sum(e.layout.load(expected[e.key]) for e in group if e.key in expected)
        close(group[0].variable[...], want, what=f"{what} of {' + '.join(keys)}")


def differentiate(lm, loss):
    """Value, auxiliary output and gradient with respect to all variables of a function of the model."""
    graph, state = nnx.split(lm)

    def of_state(state):
        return loss(nnx.merge(graph, state, copy=True))

    return jax.jit(jax.value_and_grad(of_state, has_aux=True))(state)


def check_lm_model(case: Case, sub=None):
    c = case.meta["config"]
    tight = {**TIGHT, "f_max_iter": c.get("ift_iter", 400), "b_max_iter": c.get("ift_iter", 400)}
    check_model(case, c, "deq-lm", tight, eval_deq={"eval_f_max_iter": c["eval_iter"], "f_stop_mode": "rel"})


def check_seq(case: Case, sub=None):
    c = case.meta["config"]
    tight = {**TIGHT, "f_max_iter": c.get("ift_iter", 400), "b_max_iter": c.get("ift_iter", 400)}
    broyden = {"f_solver": "broyden", "eval_f_max_iter": 35, "f_stop_mode": "rel"}
    check_model(case, c, "deq-seq", tight, eval_deq=broyden)


def check_model(case, c, recipe, tight, eval_deq):
    seq = recipe == "deq-seq"
    back = (lambda x: np.swapaxes(x, 1, 2)) if seq else (lambda x: x)  # reference states to ours
    tokens, targets = jnp.asarray(case["in/data"]), jnp.asarray(case["in/target"])
    B, L = tokens.shape
    memory = memory_of(case, c, B, seq)
    lm = build(case, c, recipe, eval_deq)

    # One application of f.
    injection = lm.encode(tokens, memory)
    close(lm.embedding(tokens), case["out/word_emb"], what="embedding")
    close(injection.u, back(case["out/u_now"]), what="injection")
    positions = sinusoids(memory.z.shape[1] + L, c["D"], jnp.float64)
    close(positions, (case["out/pos_emb"][0]).T if seq else case["out/pos_emb"][0], what="positions")
    z = jnp.asarray(back(case["in/z_probe"]))
    block, context = lm.cell.blocks[0], injection.blocks[0]
    attended = block.attend(z, injection, context)
    _, probabilities = block.attention.attend(z, injection.u, injection.seen, context.attention)
    mark = "" if seq else "0"
    close(attended, back(case[f"out/f_once_attn{mark}"]), what="attention sub-layer")
    close(probabilities, case[f"out/f_once_attnprob{mark}"], what="attention probabilities")
    if not seq:
        close(block.feed_forward(attended, context), case["out/f_once_ffn0"], what="feed-forward sub-layer")
        shifted, expected = relative_shift(jnp.asarray(case["in/rel_shift_in"])), case["out/rel_shift"]
        distance = expected.shape[3] - L + np.arange(L)[:, None] - np.arange(expected.shape[3])
        close(np.where(distance >= 0, shifted, 0), np.where(distance >= 0, expected, 0), what="relative shift")
    f = jax.jit(lambda z: lm.cell(z, injection))
    close(f(z), back(case["out/f_once"]), what="f")

    # Iterates, evaluation.
    state = jnp.zeros_like(z)
    for k, expected in enumerate(case["out/unroll_states"]):
        state = f(state)
        close(state, back(expected), what=f"iterate {k + 1}")
    if "out/eval_nll" in case:
        out = lm(tokens, memory)
        close(lm.nll(out.states, targets), case["out/eval_nll"], what="nll in evaluation")
        new = memory_rows(out.memory)
        close(new[0], back(case["out/eval_new_mem_z"]), what="memory z")
        close(new[1], back(case["out/eval_new_mem_u"]), what="memory u")
        residual = jnp.sqrt(jnp.sum((f(out.states[-1]) - out.states[-1]) ** 2, axis=(1, 2)))
        if not seq:
            close(residual, case["out/eval_abs_lowest"], rtol=1e-6, what="residual in evaluation")
        else:
            np.testing.assert_array_equal(np.asarray(out.stats.best_step) - 1, case["out/eval_nstep"])

    # Unrolled gradient.
    mode = {"f_max_iter": 0, "grad": c["unroll"]}
    lm = build(case, c, recipe, mode)
    unrolled = lambda lm: mean_nll(lm, tokens, targets, memory)
    (loss, nll), gradients = differentiate(lm, unrolled)
    close(nll, case["out/unroll_nll"], what="unrolled nll")
    close(loss, case["out/unroll_loss"], what="unrolled loss")
    check_gradients(lm, gradients, case.group("grad" if c["mode"] == "unroll" else "grad_unroll"), "unrolled gradient")
    if "out/logprob_unroll" in case:
        Lt = targets.shape[1]
        close(lm.log_prob(state[:, L - Lt :]), case["out/logprob_unroll"], what="log-probabilities")
    if c["mode"] == "unroll":
        close(loss, case["loss"], what="loss")
        return

    # Fixed point and implicit gradient.
    lm = build(case, c, recipe, tight)
    (loss, nll), gradients = differentiate(lm, unrolled)
    close(nll, case["out/nll_star"], what="nll at the fixed point")
    close(loss, case["loss"], what="loss")
    out = lm(tokens, memory, train=True)
    close(out.states[-1], back(case["out/z_star"]), what="fixed point")
    close(lm.log_prob(out.states[-1]), case["out/logprob_star"], what="log-probabilities")
    # Eight digits of a gradient through some hundred nearly singular solves is what the references agree to.
    check_gradients(lm, gradients, case.group("grad"), "implicit gradient")

    if "in/jac_v" in case:
        probes = jnp.asarray(back(case["in/jac_v"]))[None]

        def regularised(lm):
            out = lm(tokens, memory, train=True)
            jacobian = lm.jacobian_loss(out, probes=probes)
            return jnp.mean(lm.nll(out.states, targets)) + c["jac_w"] * jacobian, jacobian

        (_, jacobian), gradients = differentiate(lm, regularised)
        close(jacobian, case["out/jac_loss"], what="Jacobian loss")
        check_gradients(lm, gradients, case.group("grad_jac"), "regularised gradient")


def mean_nll(lm, tokens, targets, memory):
    nll = lm.nll(lm(tokens, memory, train=True).states, targets)
    return jnp.mean(nll), nll


def memory_rows(memory: Memory):
    """The valid rows."""
    n = int(memory.length)
    return memory.z[:, memory.z.shape[1] - n :], memory.u[:, memory.u.shape[1] - n :]


def check_dropout_states(case: Case, sub=None):
    c = case.meta["config"]
    deq = {k: c[k] for k in ("core", "f_max_iter", "grad", "sup_gap", "gamma", "tau")}
    deq |= {"f_stop_mode": "rel", "f_tol": 1e-14, "grad": tuple(c["grad"])}
    lm = build(case, c, "deq-lm", deq, dropout=c["dropout"], dropatt=c["dropatt"])
    mask = {name: jnp.asarray(x) for name, x in case.group("in/mask").items()}
    blocks = tuple(
        BlockMasks(
            attention=mask[f"func.dec_attn.{i}.drop"],
            probability=mask[f"func.dec_attn.{i}.dropatt"],
            inner=mask[f"func.pos_ff.{i}.drop1"],
            outer=mask[f"func.pos_ff.{i}.drop2"],
        )
        for i in range(c["n_layer"])
    )
    io = {name: jnp.asarray(x) for name, x in case.group("in/mask_iodrop").items()}
    outputs = tuple(io[f"out_{k}"] for k in range(len(io) - 1))
    masks = Masks(io["embedding"], mask["pos_drop"][0], blocks, outputs)
    tokens, targets = jnp.asarray(case["in/data"]), jnp.asarray(case["in/target"])
    memory = memory_of(case, c, tokens.shape[0], seq=False)

    def loss(lm):
        out = lm(tokens, memory, train=True, masks=masks)
        assert len(out.states) == len(outputs)
        nll = lm.nll(out.states, targets, masks)
        return jnp.mean(nll), (nll, out.memory)

    (value, (nll, new)), gradients = differentiate(lm, loss)
    close(nll, case["out/weighted_nll"], what="weighted nll")
    close(value, case["loss"], what="loss")
    rows = memory_rows(new)
    close(rows[0], case["out/new_mem_z"], what="memory z")
    close(rows[1], case["out/new_mem_u"], what="memory u")
    check_gradients(lm, gradients, case.group("grad"), "gradient")


KINDS = {"data": check_data, "lm_model": check_lm_model, "seq": check_seq, "lm_dropout_states": check_dropout_states}
