"""Golden kinds of whole flow networks, their losses, metrics and schedules."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.interop.flow import canonical, entries, export_flow, load_flow
from deqjax.interop.state_dict import load_entries
from deqjax.models.flow import DEQFlow, State, grid, lookup, next_start
from deqjax.nn.config import DEQConfig
from deqjax.optim.optimizer import build_optimizer
from deqjax.optim.schedules import learning_rate
from experiments.flow_metrics import end_point_error, masked_l1, scores
from tests.golden import Case, close
from tests.kinds.deq_flow_reference import (
    architecture,
    build,
    close_buffers,
    close_statistics,
    compiled,
    first,
    gradients,
    in_float64,
    last,
    parameters,
    same,
)


def picture(case: Case, name: str):
    return last(case[name].astype(np.float64))


def pair(case: Case, suffix=""):
    return picture(case, f"in/image1{suffix}"), picture(case, f"in/image2{suffix}")


def truth(case: Case, suffix=""):
    """Flow and validity."""
    name = f"in/flow_gt{suffix}"
    flow = case[f"{name}_f16"] if f"{name}_f16" in case else case[name]
    return last(flow.astype(np.float64)), jnp.asarray(case[f"in/valid{suffix}"], jnp.float64)


def check_probe(case: Case, model: DEQFlow, solve: bool = False):
    """Features, context and one application of f for the first sample; then, if asked for, the whole batch in evaluation."""
    graph, state = nnx.split(model)

    @compiled
    def apply(state, image1, image2, h, flow):
        model = nnx.merge(graph, state)
        fmaps = model.fnet(jnp.concatenate([2 * image1 / 255 - 1, 2 * image2 / 255 - 1]))
        fmap1, fmap2 = jnp.split(fmaps, 2)
        context = jax.nn.relu(model.cnet(2 * image1 / 255 - 1))
        injection = model.inject(fmap1[:1], fmap2[:1], context[:1])
        corr = lookup(injection.correlation, grid(*flow.shape[:3], flow.dtype) + flow)
        z = model.cell(State(h, flow), injection)
        motion = injection.weights.motion(flow, corr)
        one = (fmap1, fmap2, context, corr, motion, z, model.decode(z), injection.attention)
        if not solve:
            return one, None
        z = model.solve(model.inject(fmap1, fmap2, context)).states[-1]
        return one, (z, model.decode(z))

    flow, h = last(case["in/probe_flow"]), last(case["in/probe_h"].astype(np.float64))
    one, solved = apply(state, *pair(case), h, flow)
    fmap1, fmap2, context, corr, motion, z, up, attention = one
    same(first(fmap1)[:1, ::8], case["out/fmap1_every8"], "features of the first frame")
    same(first(fmap2)[:1, ::8], case["out/fmap2_every8"], "features of the second frame")
    same(first(context)[:1, ::4], case["out/inp_every4"], "context")
    same(first(corr)[:, ::12], case["out/f_once_corr_every12"], "correlations")
    same(first(motion)[:, 2::4], case["out/f_once_motion_every4_from2"], "motion features")
    same(first(z.h), case["out/f_once_h"], "hidden state")
    same(first(z.flow - flow), case["out/f_once_dflow"], "update")
    same(first(up)[..., 1::4, 2::4], case["out/f_once_flow_up_every4"], "upsampled flow")
    if "out/attn_rows_every16" in case:
        same(np.asarray(attention)[:, :, ::16], case["out/attn_rows_every16"], "attention")
    return solved


def check_model_implicit(case: Case, sub=None):
    """The fixed point and its implicit gradients, found by other solvers than the reference's."""
    arrays, tight = parameters(case), {"f_solver": "picard", "f_max_iter": 1000, "f_tol": 1e-11, "no_stat": False}
    tight |= {"b_solver": "picard", "b_max_iter": 1000, "b_tol": 1e-12}
    config = architecture(case)
    model = in_float64(lambda: DEQFlow(config, DEQConfig.from_config(tight | {"hook_ift": True}), nnx.Rngs(0)))
    load_flow(model, arrays)
    check_probe(case, model)
    image1, image2 = pair(case)
    flow, valid = truth(case)

    def loss(model):
        out = model.solve(model.encode(image1, image2, train=True, freeze=True), train=True)
        up = model.decode(out.states[-1])
        return masked_l1(up, flow, valid), (out.states[-1], up)

    value, (z, up), gradient = gradients(model, loss)
    same(first(z.h), case["out/z_star_h"], "hidden state", 1e-8)
    same(first(z.flow), case["out/z_star_flow"], "flow", 1e-8)
    same(first(up), case["out/flow_up"], "upsampled flow")
    same(value, case["loss"], "loss", 1e-8)
    close_statistics(entries(gradient), case.meta["grad_stats"], case.group("grad"))


def check_model_states(case: Case, sub=None):
    """Supervised states, their losses, gradients, evaluation, and metrics as they were meant."""
    model = build(case)
    z, up = check_probe(case, model, solve=True)
    image1, image2 = pair(case)
    flow, valid = truth(case)
    freeze = "FROZEN" in case.meta["mode"].upper()

    def loss(model):
        out = model.solve(model.encode(image1, image2, train=True, freeze=freeze), train=True)
        predictions = [model.decode(z) for z in out.states]
        value, values = fixed_point_correction(
            lambda up: masked_l1(up, flow, valid), predictions, return_values=True, gamma=case.meta["gamma"]
        )
        return value, (predictions, values, out.stats, nnx.state(model, nnx.BatchStat))

    value, (predictions, values, stats, statistics), gradient = gradients(model, loss)
    assert len(predictions) == case.meta["n_preds"]
    for k, prediction in enumerate(predictions):
        same(first(prediction)[..., 1::4, 2::4], case[f"out/pred{k}_every4"], f"prediction {k}")
    same(values, case["out/state_losses"], "losses of the states")
    same(value, case["loss"], "loss")
    same(stats.abs_lowest, case.meta["metrics_reference"]["abs"], "absolute residual", 1e-8)
    end_points, _ = end_point_error(predictions[-1], flow, valid)
    same(jnp.mean(end_points, axis=(1, 2)), case["out/epe_per_sample"], "EPE")
    close_statistics(entries(gradient), case.meta["grad_stats"], case.group("grad"))

    same(first(z.flow), case["out/eval_flow_low"], "flow in evaluation")
    same(first(z.h)[:, ::8], case["out/eval_h_every8"], "hidden state in evaluation")
    if "out/eval_flow_up" in case:
        same(first(up), case["out/eval_flow_up"], "upsampled flow in evaluation")
    else:
        same(first(up)[..., ::2, 1::2], case["out/eval_flow_up_every2"], "upsampled flow in evaluation")
    nnx.update(model, statistics)
    close_buffers(entries(model), case)


def check_train(case: Case, sub=None):
    """Steps of the optimiser with batch normalisation by the batch."""
    model, recipe = build(case), case.meta["optimizer"]
    optimizer = build_optimizer(
        {
            "name": recipe["name"].lower(),
            "learning_rate": recipe["lr"],
            "weight_decay": recipe["weight_decay"],
            "clip": recipe["clip_global_norm"],
            "schedule": "onecycle",
            "max_steps": 300,
        }
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @compiled
    def step(params, rest, opt_state, image1, image2, flow, valid):
        def of_params(params):
            model = nnx.merge(graph, params, rest, copy=True)
            out = model.solve(model.encode(image1, image2, train=True), train=True)
            predictions = [model.decode(z) for z in out.states]
            value = fixed_point_correction(lambda up: masked_l1(up, flow, valid), predictions, gamma=case.meta["gamma"])
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, value, optax.tree.norm(gradient)

    for t, line in enumerate(case.meta["log"]):
        params, rest, opt_state, value, norm = step(params, rest, opt_state, *pair(case, f"_{t}"), *truth(case, f"_{t}"))
        close(value, line["loss"], rtol=1e-9 if t == 0 else 1e-6, what=f"loss of step {t}")
        close(norm, line["grad_norm_before_clip"], rtol=1e-9 if t == 0 else 1e-5, what=f"norm of the gradient of step {t}")
    trained = nnx.merge(graph, params, rest)
    # Where the gradient is nothing but rounding, Adam follows its sign.
    noise = {key for key in case.meta["after_stats"] if key.endswith(".bias") and _before_a_norm(key)}
    stats = {key: value for key, value in case.meta["after_stats"].items() if key not in noise}
    close_statistics(entries(trained), stats, case.group("out/after"), rtol=1e-5, what="value")


def _before_a_norm(key: str) -> bool:
    part, _, name = key.partition(".")
    return part in ("fnet", "cnet") and "norm" not in name and not name.startswith("conv2") and "downsample.1" not in name


def check_cell_once(case: Case, sub=None):
    """One application of f of a large network, whose encoders are not needed."""
    config, arrays = architecture(case), parameters(case)
    model = in_float64(lambda: DEQFlow(config, DEQConfig(), nnx.Rngs(0)))
    shapes = {key: list(value.shape) for key, value in canonical(export_flow(model)).items()}
    assert shapes == {k: v for k, v in case.meta["all_param_shapes"].items() if not k.endswith("num_batches_tracked")}
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == case.meta["n_params"]
    load_entries([entry for entry in entries(model) if not entry.key.startswith(("fnet.", "cnet."))], arrays)
    drawn = lambda seed, channels: last(np.random.RandomState(seed).standard_normal((1, channels, 16, 17)))
    D, C = config.widths.features, config.widths.hidden
    fmap1, fmap2, context = drawn(61, D), drawn(62, D), jnp.maximum(drawn(63, C), 0)
    h, flow = 0.5 * drawn(64, C), 2 * drawn(65, 2)
    graph, state = nnx.split(model)

    @compiled
    def apply(state):
        model = nnx.merge(graph, state)
        z = model.cell(State(h, flow), model.inject(fmap1, fmap2, context))
        return z, model.decode(z)

    z, up = apply(state)
    same(first(z.h), case["out/h"], "hidden state")
    same(first(z.flow - flow), case["out/dflow"], "update")
    same(first(up), case["out/flow_up"], "upsampled flow")


def check_video(case: Case, sub=None):
    """Four frames, each pair begun from nothing or from what is known of the last one."""
    model = build(case)
    frames = picture(case, "in/frames")
    graph, state = nnx.split(model)

    @compiled
    def estimate(state, image1, image2, start):
        return nnx.merge(graph, state)(image1, image2, start=start).z

    for name, flags in {
        "cold": {},
        "warm_start": {"warm_start": True},
        "fixed_point_reuse": {"fixed_point_reuse": True},
        "both": {"warm_start": True, "fixed_point_reuse": True},
    }.items():
        start = State(*(jnp.zeros((1, *(n // 8 for n in frames.shape[1:3]), c)) for c in (model.config.widths.hidden, 2)))
        for t in range(len(frames) - 1):
            z = estimate(state, frames[t : t + 1], frames[t + 1 : t + 2], start)
            same(first(z.flow), case[f"out/{name}_flow_low_{t}"], f"{name}, pair {t}")
            following = next_start(z, **flags)
            start = start if following is None else following


# Losses, metrics and schedules ----------------------------------------------------------------------------------------


def check_loss_metrics(case: Case, sub=None):
    flow, valid = truth(case)
    predictions = [last(case[f"in/pred{k}"]) for k in range(case.meta["n"])]

    def loss(predictions, **options):
        return fixed_point_correction(lambda up: masked_l1(up, flow, valid), predictions, **options)

    value, grads = compiled(jax.value_and_grad(functools.partial(loss, gamma=case.meta["gamma"])))(predictions)
    same(value, case["loss"], "loss")
    for k, got in enumerate(grads):
        if f"grad/pred{k}" in case:
            same(first(got), case[f"grad/pred{k}"], f"gradient of prediction {k}")
    error, mask = end_point_error(predictions[-1], flow, valid)
    same(error, case["out/epe_map"], "EPE")
    intended = case.meta["metrics_intended"]
    same(jnp.mean(error, axis=(1, 2)), intended["epe"], "mean EPE", 1e-9)
    for pixels in (1, 3, 5):
        # There a pixel that does not count is right.
        same(np.mean(np.asarray(error) < pixels, axis=(1, 2)), intended[f"{pixels}px"], f"{pixels}px", 1e-9)
    counted = scores(predictions[-1], flow, valid)
    right = jnp.sum((error < 1) * mask)
    same(counted["1px"][0] / counted["1px"][1], right / jnp.sum(mask), "1px of the pixels that count", 1e-12)
    plain = lambda **options: fixed_point_correction(lambda up: jnp.mean(jnp.abs(up - flow)), predictions, **options)
    for name, want in case.meta["other_weightings_plain_l1"].items():
        weighting, _, rest = name.partition(" ")
        same(plain(weighting=weighting, **ast.literal_eval(rest)), want, name, 1e-9)


def check_lr_schedules(case: Case, sub=None):
    for recipe in case.meta["schedules"]:
        onecycle = recipe["schedule"] == "onecycle"
        total = recipe["num_steps"] + (100 if onecycle else 0)
        config = {"learning_rate": recipe["lr"], "schedule": recipe["schedule"], "max_steps": total, "lr_min": 1e-6}
        steps, rates = np.array(recipe["step_lr"]).T
        same(learning_rate(config)(steps), rates, recipe["schedule"], 1e-9)


KINDS = {
    "loss_metrics": check_loss_metrics,
    "lr_schedules": check_lr_schedules,
    "model_implicit": check_model_implicit,
    "model_states": check_model_states,
    "train": check_train,
    "cell_once": check_cell_once,
    "video": check_video,
}
