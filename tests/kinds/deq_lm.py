"""Golden kinds of the DEQ transformer."""

import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.data.text import OrderedBatches, TextCorpus
from deqjax.interop.transformer import entries, export_transformer, load_transformer
from deqjax.models.transformer import DEQTransformer, Masks, Memory, TransformerConfig
from deqjax.models.transformer.adaptive import twice_held_projections
from deqjax.models.transformer.attention import relative_shift, sinusoids
from deqjax.models.transformer.cell import BlockMasks
from deqjax.nn.config import DEQConfig
from deqjax.optim.optimizer import build_optimizer
from deqjax.optim.schedules import learning_rate
from tests.golden import Case, close
from tests.kinds.deq_lm_data import check_data

# The fixed point of these cases is reached by plain iteration, as the references reached it.
DEQ_SETTINGS = [field.name for field in dataclasses.fields(DEQConfig)]
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
        tie_weights=not c.get("not_tied", False),
        **model,
    )
    norm = {"norm_type": c.get("norm", "weight_norm"), **{k: c[k] for k in DEQ_SETTINGS if k.startswith("norm_") and k in c}}
    settings = DEQConfig.from_config({"preset": "torchdeq", **norm, **deq})
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
        if isinstance(ours.variable, nnx.Param):
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
    deq = {"f_stop_mode": "rel", "f_tol": 1e-14} | {k: c[k] for k in DEQ_SETTINGS if k in c}
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


# Training and evaluation loops ---------------------------------------------------------------------------------------


def sizes(options: dict, n_tokens: int) -> dict:
    """The script's command line in the terms of the other cases."""
    return {
        "V": n_tokens,
        "D": options["d_model"],
        "H": options["n_head"],
        "dh": options["d_head"],
        "F": options["d_inner"],
        "n_layer": options["n_layer"],
        "d_embed": options.get("d_embed"),
        "cutoffs": options.get("cutoffs", ()),
        "div_val": options.get("div_val", 1),
        "mem_len": options["mem_len"],
        "local_size": options.get("local_size", 0),
        "norm": options["norm_type"],
        "not_tied": options.get("not_tied", False),
        **{key: options[key] for key in DEQ_SETTINGS if key.startswith("norm_") and key in options},
    }


def solver_settings(options: dict) -> dict:
    return {key: options[key] for key in DEQ_SETTINGS if key in options and not key.startswith("norm_")}


def optimizer_settings(options: dict) -> dict:
    return {
        "name": "adam",
        "learning_rate": options["lr"],
        "schedule": "cosine",
        "warmup_steps": options["warmup_step"],
        "max_steps": options["max_step"],
        "lr_min": options.get("lr_min", 0.0),
        "weight_decay": options.get("weight_decay", 0.0),
        "clip": options["clip"],
        "first_update_full_lr": True,
    }


def residual_means(lm, out):
    """What the scripts monitor: f applied once more to the last state, absolute and relative, averaged over the batch."""
    z = jax.lax.stop_gradient(out.states[-1])
    f_z = lm.cell(z, out.injection)
    absolute = jnp.sqrt(jnp.sum((f_z - z) ** 2, axis=(1, 2)))
    return jnp.mean(absolute), jnp.mean(absolute / (jnp.sqrt(jnp.sum(f_z**2, axis=(1, 2))) + 1e-8))


def train(lm, batches, n_steps: int, settings: dict, tied=()):
    """Runs the recipe; returns the parameters after every step, and per-step loss, gradient norm, residuals, memory."""
    optimizer = build_optimizer(settings, tied)
    graph, params, rest = nnx.split(lm, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, memory, batch):
        def loss(params):
            lm = nnx.merge(graph, params, rest)
            out = lm(batch["tokens"], memory.reset_where(batch["reset"]), train=True)
            residuals = residual_means(lm, out)
            return jnp.mean(lm.nll(out.states, batch["targets"])), (out.memory, residuals)

        (value, (memory, residuals)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        norm = optax.global_norm(gradient)
        return optax.apply_updates(params, updates), opt_state, memory, (value, norm, *residuals)

    B = batches(0)["tokens"].shape[0]
    memory, history, trajectory = Memory.empty(B, lm.config.mem_len, lm.config.d_model, jnp.float64), [], []
    for k in range(n_steps):
        params, opt_state, memory, report = step(params, opt_state, memory, batches(k))
        history.append([float(x) for x in report])
        trajectory.append(params)
    return [nnx.merge(graph, p, rest) for p in trajectory], np.asarray(history).T, memory


def evaluate(lm, ids, batch: int, length: int, mem_len: int):
    """Token-weighted nll over a split with the memory carried along; mean residuals; positions and segments."""
    batches = OrderedBatches(ids, batch, length)
    memory, nll, residuals = Memory.empty(batch, mem_len, lm.config.d_model, jnp.float64), 0.0, []
    graph, state = nnx.split(lm)

    @jax.jit
    def segment(memory, tokens, targets):
        lm = nnx.merge(graph, state)
        out = lm(tokens, memory)
        memory = memory.append(out.states[-1], out.injection.u, mem_len)
        return jnp.mean(lm.nll(out.states, targets)), *residual_means(lm, out), memory

    for k in range(batches.n_segments):
        part = batches.batch(k)
        value, absolute, relative, memory = segment(memory, part["tokens"], part["targets"])
        nll += float(value) * part["targets"].shape[1]
        residuals.append((float(absolute), float(relative)))
    n = batches.n_predicted
    return nll / n, *np.mean(residuals, axis=0), n, batches.n_segments


def check_parameters(lm, expected: dict, what: str, atol: float):
    exported = export_transformer(lm)
    for key, value in expected.items():
        close(exported[key], value, atol=atol, what=f"{key} {what}")


def check_train_script(case: Case, sub=None):
    c = case.meta["config"]
    options = c["argv"]
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid", "test"):
            pathlib.Path(folder, f"{split}.txt").write_bytes(case[f"in/{split}_utf8"].tobytes())
        corpus = TextCorpus.load(folder)
    assert len(corpus.vocab) == int(case["out/n_token"])
    lm = build(case, sizes(options, len(corpus.vocab)), "deq-lm", solver_settings(options))
    settings = optimizer_settings(options)
    rate = learning_rate(settings)
    close([rate(k) for k in range(options["max_step"])], case["out/lr_used"], what="learning rates")

    batches = OrderedBatches(corpus.train, options["global_batch_size"], options["tgt_len"])
    models, (losses, norms, absolute, relative), _ = train(lm, batches.batch, options["max_step"], settings)
    close(losses, case["out/train_loss"], what="training losses")
    close(norms, case["out/grad_norm_preclip"], rtol=1e-7, what="gradient norms")
    close(absolute, case["out/fwd_abs"], rtol=1e-7, what="absolute residuals")
    close(relative, case["out/fwd_rel"], rtol=1e-7, what="relative residuals")
    check_parameters(models[-1], case.group("final"), "at the end", atol=1e-7)

    def nll(lm, ids):
        return evaluate(lm, ids, options["global_eval_batch_size"], options["eval_tgt_len"], options["mem_len"])[0]

    at = [int(k) for k in case["out/valid_steps"]]
    valid = [nll(models[k - 1], corpus.valid) for k in at]
    close(valid, case["out/valid_loss"], what="validation losses")
    best = models[at[int(np.argmin(valid))] - 1]
    check_parameters(best, case.group("best"), "at the best validation", atol=1e-7)
    close(nll(best, corpus.test), case["out/test_loss_best"], what="test loss of the best model")


def check_train_tied(case: Case, sub=None):
    c = case.meta["config"]
    stream, L = case["in/stream"], c["L"]
    settings = optimizer_settings({**c, "max_step": c["max_step"]})

    def batch(k):
        part = stream[:, k * L : (k + 1) * L + 1]
        return {"tokens": part[:, :-1], "targets": part[:, 1:], "reset": np.asarray(False)}

    for tying, ours in (("natural", "shared"), ("upstream", "upstream")):
        lm = build(case, c, "deq-lm", {"f_max_iter": 0, "grad": c["unroll"]}, tie_projections=ours)
        models, (losses, norms, _, _), memory = train(lm, batch, c["steps"], settings, twice_held_projections(lm.config))
        close(losses, case[f"{tying}/loss"], what=f"{tying} losses")
        close(norms, case[f"{tying}/grad_norm_preclip"], rtol=1e-7, what=f"{tying} gradient norms")
        close(memory_rows(memory)[0], case[f"{tying}/mem_z"], rtol=1e-7, what=f"{tying} memory z")
        close(memory_rows(memory)[1], case[f"{tying}/mem_u"], rtol=1e-7, what=f"{tying} memory u")
        check_parameters(models[-1], case.group(f"{tying}/final"), f"({tying})", atol=1e-7)


def check_eval(case: Case, sub=None):
    options, ids = case.meta["config"]["model"], case["in/test_ids"]
    params = case.group("final") or case.group("param")
    n_tokens = params["word_emb.emb_layers.0.weight"].shape[0]
    for row in case["out/table"]:
        steps, mem_len, length, batch, local_size = (int(x) for x in row[:5])
        settings = {**solver_settings(options), "eval_f_max_iter": steps, "f_tol": float(row[5])}
        lm = build(case, sizes({**options, "mem_len": mem_len, "local_size": local_size}, n_tokens), "deq-lm", settings, params)
        nll, absolute, relative, n, segments = evaluate(lm, ids, batch, length, mem_len)
        close([nll, np.exp(nll), absolute, relative], row[6:10], rtol=1e-8, what=f"row {row[:6]}")
        assert (n, segments) == (int(row[10]), int(row[11]))


KINDS = {
    "data": check_data,
    "lm_model": check_lm_model,
    "seq": check_seq,
    "lm_dropout_states": check_dropout_states,
    "lm_train_script": check_train_script,
    "lm_train_tied": check_train_tied,
    "lm_eval": check_eval,
}
