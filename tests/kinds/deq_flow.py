"""Golden kinds of the flow networks."""

import ast
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.interop.flow import (
    aggregate_entries,
    canonical,
    cell_entries,
    encoder_entries,
    entries,
    export_flow,
    load_flow,
)
from deqjax.interop.state_dict import Entry, conv_entries, load_entries
from deqjax.models.flow import (
    Aggregate,
    Attention,
    Cell,
    DEQFlow,
    Encoder,
    FlowConfig,
    Injection,
    State,
    convex_upsample,
    correlate,
    grid,
    lookup,
    next_start,
)
from deqjax.models.mdeq import resize_bilinear
from deqjax.nn.config import DEQConfig
from deqjax.optim.optimizer import build_optimizer
from deqjax.optim.schedules import learning_rate
from experiments.flow_metrics import end_point_error, masked_l1, scores
from tests.golden import Case, close

# Much is compiled here, and little computed.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Some references were stored in float32.
HALF = {np.dtype("float64"): 1e-9, np.dtype("float32"): 1e-6}


def last(x):
    """Channels last, from the reference's layout."""
    return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def first(x):
    """... and back."""
    return np.moveaxis(np.asarray(x), -1, 1)


def same(got, want, what, rtol=None):
    close(got, want, rtol=HALF[np.asarray(want).dtype] if rtol is None else rtol, what=what)


# Parameters of the references ----------------------------------------------------------------------------------------


def parameters(case: Case) -> dict[str, np.ndarray]:
    """Regenerated from the case's rules, and compared with its check sums."""
    arrays = case.group("param")
    rules = case.meta.get("param_rules", ())
    for rule in sorted(rules, key=lambda rule: ("randn" not in rule["kind"], rule["kind"] == "alias")):
        arrays[rule["key"]] = _by_rule(rule, arrays)
        if "check" in rule:
            x = arrays[rule["key"]]
            np.testing.assert_allclose([x.sum(), np.abs(x).sum(), x.flat[0], x.flat[-1]], rule["check"], rtol=1e-9, atol=1e-9)
    return arrays


def _by_rule(rule, arrays):
    if rule["kind"] == "alias":
        return arrays[rule["src"]]
    x = np.random.RandomState(rule["seed"]).standard_normal(rule["shape"])
    x = np.abs(x) if rule["kind"] == "absrandn" else x
    x = rule["offset"] + rule["scale"] * x
    if rule["kind"] == "rownorm":
        source = arrays[rule["src"]]
        x = np.sqrt(np.sum(source**2, axis=tuple(range(1, source.ndim)))).reshape(rule["shape"]) * x
    x[rule.get("zero_rows", [])] = 0
    for index, value in rule.get("set", ()):
        x[tuple(index)] = value
    return x


def seeded(case: Case, name: str):
    seed, shape, scale = case.meta["seeded"][name]
    return last(scale * np.random.RandomState(seed).standard_normal(shape))


def options(case: Case) -> dict:
    """The command line of the reference."""
    words, found = case.meta["config"].split(), {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = True if value.startswith("--") else value
    return found


def architecture(case: Case) -> FlowConfig:
    flags = options(case)
    size = next((size for size in ("tiny", "large", "huge", "gigantic") if size in flags), "base")
    return FlowConfig(size=size, **{name: name in flags for name in ("gma", "all_grad", "old_version")})


def equilibrium(case: Case) -> DEQConfig:
    numbers = {"f_max_iter": int, "n_states": int, "grad": int, "b_max_iter": int, "eval_f_max_iter": int}
    numbers |= dict.fromkeys(("f_tol", "b_tol", "eval_factor", "tau", "gamma"), float)
    settings = {name: numbers.get(name, lambda x: x)(value) for name, value in options(case).items()}
    known = DEQConfig.__dataclass_fields__
    return DEQConfig.from_config({name: value for name, value in settings.items() if name in known} | {"preset": "torchdeq"})


def in_float64(make):
    """What `make` makes, with zeros in float64."""
    graph, state = nnx.split(nnx.eval_shape(make))
    zeros = lambda x: jnp.zeros(x.shape, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    return nnx.merge(graph, jax.tree.map(zeros, state))


def build(case: Case) -> DEQFlow:
    """A float64 model with the case's parameters, which survive a round trip through it."""
    config, deq, arrays = architecture(case), equilibrium(case), parameters(case)
    model = in_float64(lambda: DEQFlow(config, deq, nnx.Rngs(0)))
    load_flow(model, {f"module.{key}": value for key, value in arrays.items()})
    exported = canonical(export_flow(model))
    assert exported.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=f"{key} after the round trip")
    return model


def gradients(module, loss):
    """Value, auxiliary output, and the module with gradients in the places of its parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    of_params = lambda params: loss(nnx.merge(graph, params, rest, copy=True))
    (value, aux), gradient = compiled(jax.value_and_grad(of_params, has_aux=True))(params)
    return value, aux, nnx.merge(graph, gradient, rest)


def close_statistics(table: list[Entry], stats: dict, stored: dict, rtol=1e-6, what="gradient"):
    """Norm, sum, projection and a sample of every array."""
    compared = set()
    for entry in table:
        if entry.key not in stats:
            continue
        want = stats[entry.key]
        g = np.asarray(entry.layout.export(np.asarray(entry.variable[...], np.float64))).reshape(-1)
        compared.add(entry.key)
        if want.get("none") or want.get("zero_up_to_rounding"):
            assert np.max(np.abs(g)) < 1e-9, f"{what} of {entry.key} should be zero"
            continue
        seed = (12345 + int(hashlib.md5(entry.key.encode()).hexdigest()[:6], 16)) % 2**31
        direction = np.random.RandomState(seed).standard_normal(g.size)
        got = [np.linalg.norm(g), g.sum(), g @ direction]
        scale = [want["l2"], np.sqrt(g.size) * want["l2"], np.sqrt(g.size) * want["l2"]]
        for name, value, size in zip(("l2", "sum", "proj"), got, scale, strict=True):
            assert abs(value - want[name]) <= rtol * size, f"{name} of the {what} of {entry.key}: {value}, not {want[name]}"
        if entry.key in stored:
            sample = np.asarray(stored[entry.key]).reshape(-1)
            scale = want["l2"] / np.sqrt(g.size)
            chosen = g if want.get("full") else g[:: want["stride"]]
            close(chosen[: sample.size], sample, atol=10 * rtol * max(scale, np.abs(sample).max()), what=entry.key)
    assert compared == set(stats)


# Components ----------------------------------------------------------------------------------------------------------


def check_corr_lookup(case: Case, sub=None):
    fmap1, fmap2, weight = (seeded(case, name) for name in ("fmap1", "fmap2", "weight"))
    coords, h = last(case["in/coords"]), fmap1.shape[1]
    mask = (np.arange(h) >= 4)[None, :, None, None]
    volume = correlate(fmap1, fmap2, "volume")
    for level, array in enumerate(volume.levels):
        stride = 29 if level == 0 else 7
        got = np.asarray(array).reshape(-1, 1, *array.shape[3:])[::stride]
        same(got, case[f"out/pyramid_level{level}_rows_every{stride}"], f"level {level}")
    for form in ("volume", "on_demand"):

        def loss(fmap1, fmap2, coords, form=form):
            out = lookup(correlate(fmap1, fmap2, form), coords)
            return jnp.sum(out * weight * mask), out

        (value, out), grads = compiled(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(fmap1, fmap2, coords)
        same(first(out), case["out/corr"], f"{form}: correlations")
        same(value, case["loss"], f"{form}: loss")
        for name, got in zip(("fmap1", "fmap2", "coords"), grads, strict=True):
            same(first(got), case[f"grad/{name}"], f"{form}: gradient of {name}")


def check_bilinear_sampler(case: Case, sub=None):
    """Looking up in a map that is the reference's picture: correlations of a one-hot feature with its channels."""
    image, coords, weight = case["in/img"], jnp.asarray(case["in/coords"]), last(case["in/weight"])
    n, channels = image.shape[0], image.shape[1]

    def sample(image, coords, form):
        # The picture's channels one after the other, each as features of one number.
        maps = jnp.moveaxis(image, 1, 0)[..., None]
        ones = jnp.ones((n, *coords.shape[1:3], 1))
        centre = lambda fmap: lookup(correlate(jnp.broadcast_to(ones, (n, *coords.shape[1:3], 1)), fmap, form), coords)[..., 40]
        return jnp.stack([centre(maps[c]) for c in range(channels)], axis=-1)

    for form in ("volume", "on_demand"):

        def loss(image, coords, form=form):
            out = sample(image, coords, form)
            return jnp.sum(out * weight), out

        (value, out), grads = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(jnp.asarray(image), coords)
        same(first(out), case["out/sampled"], f"{form}: samples")
        same(value, case["loss"], f"{form}: loss")
        same(grads[0], case["grad/img"], f"{form}: gradient of the picture")
        same(grads[1], case["grad/coords"], f"{form}: gradient of the coordinates")


def check_encoder(case: Case, sub=None):
    arrays = parameters(case)
    encoder = in_float64(lambda: Encoder(case.meta["output_dim"], case.meta["norm"], nnx.Rngs(0)))
    load_entries(encoder_entries(encoder), canonical(arrays))
    x, weight, batch = seeded(case, "x"), seeded(case, "weight"), case.meta["norm"] == "batch"
    same(first(compiled(lambda x: encoder(x))(x)), case["out/eval"], "evaluation")

    def loss(holder):
        out = holder.encoder(holder.x[...], train=batch)
        return jnp.sum(out * weight), (out, nnx.state(holder.encoder, nnx.BatchStat))

    holder = nnx.Module()
    holder.encoder, holder.x = encoder, nnx.Param(x)
    value, (out, statistics), gradient = gradients(holder, loss)
    if batch:
        same(first(out), case["out/train"], "training")
    same(value, case["loss"], "loss")
    same(first(gradient.x[...]), case["grad_input"], "gradient of the input")
    close_statistics(encoder_entries(gradient.encoder), case.meta["grad_stats"], case.group("grad"))
    nnx.update(encoder, statistics)
    close_buffers(encoder_entries(encoder), case)


def close_buffers(table, case: Case):
    """Running statistics after the forward pass."""
    expected = {key: value for key, value in case.group("out/bn_after").items() if "downsample" not in key}
    found = {entry.key: entry.variable for entry in table}
    for key, value in expected.items():
        same(found[key][...], value, f"{key} after training")


def check_update_block(case: Case, sub=None):
    config, deq = architecture(case), DEQConfig()
    cell = in_float64(lambda: Cell(config, deq, nnx.Rngs(0)))
    load_entries(cell_entries(cell), parameters(case))
    h, corr, flow = (seeded(case, name) for name in ("h", "corr", "flow"))
    context = jax.nn.relu(seeded(case, "inp_before_relu"))
    attention = None
    if config.gma:
        seed, shape, scale = case.meta["seeded"]["attn_logits"]
        attention = jax.nn.softmax(jnp.asarray(scale * np.random.RandomState(seed).standard_normal(shape)), axis=-1)

    def loss(holder):
        inputs = {name: getattr(holder, name)[...] for name in ("h", "inp", "corr", "flow")}
        weights, contributions = holder.cell.effective(inputs["inp"], train=False)
        injection = Injection(None, contributions, attention, weights)
        h, update = holder.cell.update(inputs["h"], inputs["flow"], inputs["corr"], injection)
        value = jnp.sum(h * seeded(case, "weight_h")) + jnp.sum(update * seeded(case, "weight_dflow"))
        return value, (weights.motion(inputs["flow"], inputs["corr"]), h, update)

    holder = nnx.Module()
    holder.cell = cell
    for name, array in {"h": h, "inp": context, "corr": corr, "flow": flow}.items():
        setattr(holder, name, nnx.Param(array))
    value, outputs, gradient = gradients(holder, loss)
    for name, got in zip(("motion", "h", "dflow"), outputs, strict=True):
        same(first(got), case[f"out/{name}"], name)
    same(value, case["loss"], "loss")
    for name in ("h", "inp", "flow"):
        same(first(getattr(gradient, name)[...]), case[f"grad_in/{name}"], f"gradient of {name}")
    same(first(gradient.corr[...])[:, ::12], case["grad_in/corr_every12"], "gradient of the correlations")
    close_statistics(cell_entries(gradient.cell), case.meta["grad_stats"], case.group("grad"))


def check_convex_upsample(case: Case, sub=None):
    flow, mask, weight = last(case["in/flow"]), last(case["in/mask"]), seeded(case, "weight")

    def loss(flow, mask):
        up = convex_upsample(flow, mask)
        return jnp.sum(up * weight), up

    (value, up), (of_flow, of_mask) = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(flow, mask)
    same(first(up), case["out/up"], "upsampled flow")
    same(value, case["loss"], "loss")
    same(first(of_flow), case["grad/flow"], "gradient of the flow")
    same(first(of_mask)[:, ::16], case["grad/mask_every16"], "gradient of the mask")
    size = tuple(8 * n for n in flow.shape[1:3])
    same(first(8 * resize_bilinear(flow, size, align_corners=True)), case["out/upflow8_bilinear"], "bilinear")


def check_gma(case: Case, sub=None):
    dim, heads, width = (case.meta[name] for name in ("dim", "heads", "dim_head"))
    holder = nnx.Module()
    holder.attn = in_float64(lambda: Attention(dim, heads, width, nnx.Rngs(0)))
    holder.aggregate = in_float64(lambda: Aggregate(dim, heads, width, nnx.Rngs(0)))

    def table(holder):
        of_aggregate = aggregate_entries(holder.aggregate)
        renamed = [Entry(f"aggregate.{entry.key}", entry.variable, entry.layout) for entry in of_aggregate]
        return conv_entries("attn.to_qk", holder.attn.to_qk) + renamed

    load_entries(table(holder), case.group("param"))
    weight = last(case["in/weight"])
    holder.context, holder.motion = nnx.Param(last(case["in/context"])), nnx.Param(last(case["in/motion"]))

    def loss(holder):
        attention = holder.attn(holder.context[...])
        out = holder.aggregate.effective()(holder.motion[...], attention)
        return jnp.sum(out * weight), (attention, out)

    value, (attention, out), gradient = gradients(holder, loss)
    same(attention, case["out/attn"], "attention")
    same(first(out), case["out/aggregated"], "aggregated")
    same(value, case["loss"], "loss")
    for name in ("context", "motion"):
        same(first(getattr(gradient, name)[...]), case[f"grad_in/{name}"], f"gradient of {name}")
    for entry in table(gradient):
        same(entry.layout.export(np.asarray(entry.variable[...])), case[f"grad/{entry.key}"], f"gradient of {entry.key}")


# The whole model ------------------------------------------------------------------------------------------------------


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
    "corr_lookup": check_corr_lookup,
    "bilinear_sampler": check_bilinear_sampler,
    "encoder": check_encoder,
    "update_block": check_update_block,
    "convex_upsample": check_convex_upsample,
    "gma": check_gma,
}
