"""Golden kinds of the multiscale models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.core.solve import solve
from deqjax.core.solvers.torchdeq import torchdeq_solver
from deqjax.data.cityscapes import CLASS_WEIGHTS
from deqjax.interop.mdeq import backbone_entries, canonical, export_mdeq, head_entries, load_mdeq
from deqjax.models.mdeq import MDEQ, MDEQConfig, resize_bilinear, run_blocks, transform
from deqjax.models.mdeq.cell import repeat_pixels
from deqjax.nn.config import DEQConfig
from deqjax.optim.optimizer import build_optimizer, clip_by_global_norm
from deqjax.optim.schedules import learning_rate
from experiments.image_losses import cross_entropy, ohem_cross_entropy
from experiments.image_metrics import confusion_matrix, segmentation_scores, top_k
from tests.golden import Case, close, trace_close

# Plain iteration contracts in all cases, and compiles fastest.
TIGHT = {"f_solver": "picard", "f_max_iter": 1000, "f_tol": 1e-14, "f_stop_mode": "rel"}
TIGHT |= {"b_solver": "picard", "b_max_iter": 1000, "b_tol": 1e-14, "b_stop_mode": "rel"}


# Models of the references --------------------------------------------------------------------------------------------


def architecture(case: Case) -> MDEQConfig:
    """Sizes from the configs of TorchDEQ's CIFAR or ImageNet code, or of the authors' second version."""
    c = case.meta["config"]
    if "num_channels" in c:
        return MDEQConfig(
            head="classification",
            n_classes=c["num_classes"],
            channels=c["num_channels"],
            head_channels=c["head_channels"],
            final_channels=c["final_chansize"],
            n_blocks=c["num_blocks"],
            n_groups=c["num_groups"],
            expansion=c["deq_expand"],
            downsample=c["downsample_times"],
            normalized="branches",
            init="uniform",
        )
    m = c["MODEL"]
    stage = m["EXTRA"]["FULL_STAGE"]
    segmentation = any(key.endswith("last_layer.3.weight") for key in case.group("param"))
    sizes = {
        "head": "segmentation" if segmentation else "classification",
        "n_classes": m["NUM_CLASSES"],
        "channels": stage["NUM_CHANNELS"],
        "head_channels": () if segmentation else stage["HEAD_CHANNELS"],
        "final_channels": stage["FINAL_CHANSIZE"],
        "n_blocks": stage["NUM_BLOCKS"],
        "n_groups": m["NUM_GROUPS"],
        "expansion": m["EXPANSION_FACTOR"],
        "downsample": m["DOWNSAMPLE_TIMES"],
    }
    if "WNORM" in m:
        sizes |= {
            name: m[name.upper().replace("AFFINE", "GN_AFFINE")] for name in ("block_affine", "fuse_affine", "post_affine")
        }
        sizes |= {"final_kernel": m["EXTRA"]["FINAL_CONV_KERNEL"], "big_kernels": stage["BIG_KERNELS"]}
        sizes |= {"normalized": "branches_and_post", "dropout": m["DROPOUT"]}
    return MDEQConfig(**sizes)


def settings(case: Case, **changes) -> dict:
    """The equilibrium layer's settings."""
    if "deq_args" in case.meta:
        return case.meta["deq_args"] | {"preset": "torchdeq"} | changes
    return {"norm_type": "weight_norm" if case.meta["config"]["MODEL"].get("WNORM", True) else "none"} | changes


def build(case: Case, deq: dict) -> MDEQ:
    """A float64 model with the case's parameters, which survive a round trip through it."""
    config, params = architecture(case), case.group("param")
    graph, state = nnx.split(nnx.eval_shape(lambda: MDEQ(config, DEQConfig.from_config(deq), nnx.Rngs(0))))
    zeros = lambda x: jnp.zeros(x.shape, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    model = nnx.merge(graph, jax.tree.map(zeros, state))
    load_mdeq(model, params)
    dialect = "vision" if any(".fullstage." in f".{key}" for key in params) else "zoo"
    exported = canonical(export_mdeq(model, dialect))
    expected = canonical(params)
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=f"{key} after the round trip")
    return model


def images(case: Case, name="in/x"):
    return jnp.asarray(case[name].transpose(0, 2, 3, 1))


def feature_maps(case: Case, pattern: str) -> tuple:
    """The arrays `pattern` of every map, channels last."""
    maps = []
    while pattern.format(len(maps)) in case:
        maps.append(jnp.asarray(case[pattern.format(len(maps))].transpose(0, 2, 3, 1)))
    return tuple(maps)


def close_maps(got, case: Case, pattern: str, rtol):
    want = feature_maps(case, pattern)
    assert len(got) == len(want) > 0, pattern
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        close(x, y, rtol=rtol, what=pattern.format(i))


def gradients(model: MDEQ, loss):
    """Value, auxiliary output, and the model with gradients in the places of its parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params):
        return loss(nnx.merge(graph, params, rest, copy=True))

    (value, aux), gradient = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)
    return value, aux, nnx.merge(graph, gradient, rest)


def close_gradients(with_gradients: MDEQ, expected: dict, rtol=1e-6):
    expected = canonical(expected)
    compared = set()
    for entry in backbone_entries(with_gradients) + head_entries(with_gradients):
        if isinstance(entry.variable, nnx.Param):
            want = entry.layout.load(expected[entry.key])
            # A bias before batch normalisation has a gradient of nothing but roundoff.
            tolerance = max(rtol * np.max(np.abs(want), initial=0), 1e-12)
            close(entry.variable[...], want, atol=tolerance, what=f"gradient of {entry.key}")
            compared.add(entry.key)
    assert compared == set(expected)


def check_one_application(case: Case, model: MDEQ, masks=None):
    """The injection, the residual blocks, the fusion, and f."""
    rtol, n = 1e-10, len(model.config.channels)
    graph, state = nnx.split(model)

    @jax.jit
    def apply(state, x, z):
        model = nnx.merge(graph, state)
        injection = model.encode(x)
        injection = injection if masks is None else injection._replace(masks=masks)
        blocks = run_blocks(z, injection)
        fused = {(i, j): transform(blocks[j], injection.weights.fuse[i][j], j - i) for i in range(n) for j in range(n) if n > 1}
        return injection.u, blocks, fused, model.cell(z, injection)

    u, blocks, fused, f_z = apply(state, images(case), feature_maps(case, "in/z_probe_{}"))
    # The injections of the other maps are zero.
    close_maps([u], case, "out/inj_{}", rtol)
    close_maps(blocks, case, "out/f_once_block_{}", rtol)
    for (i, j), got in fused.items():
        if (name := f"out/f_once_fuse_to{i}_from{j}") in case:
            close(got, case[name].transpose(0, 2, 3, 1), rtol=rtol, what=name)
    close_maps(f_z, case, "out/f_once_{}", rtol)


def class_loss(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# Implicit and phantom gradients --------------------------------------------------------------------------------------


def check_implicit(case: Case, sub=None):
    model = build(case, settings(case, preset=None, ift=False, hook_ift=True, **TIGHT))
    x, y = images(case), jnp.asarray(case["in/y"])
    check_one_application(case, model)

    def loss(model):
        out = model.solve(model.encode(x), train=True)
        logits = model.decode(out.states[-1])
        return class_loss(logits, y), (out, logits)

    value, (out, logits), gradient = gradients(model, loss)
    close_maps(out.states[-1], case, "out/z_star_{}", 1e-9)
    close(logits, case["out/logits"], rtol=1e-9, what="logits")
    close(value, case["loss"], rtol=1e-9, what="loss")
    close_gradients(gradient, case.group("grad"))


def forward_options(case: Case) -> dict:
    """The ImageNet code damps the solver as well as the phantom steps."""
    return {"f_options": {"tau": case.meta["deq_args"]["tau"]}} if "num_channels" in case.meta["config"] else {}


def check_phantom(case: Case, sub=None):
    model = build(case, settings(case, **forward_options(case)))
    x, y = images(case), jnp.asarray(case["in/y"])

    def loss(model):
        out = model.solve(model.encode(x), train=True)
        logits = [model.decode(z) for z in out.states]
        value = fixed_point_correction(lambda logits: class_loss(logits, y), logits, gamma=model.deq.config.gamma)
        return value, (out.states, logits, model(x))

    value, (states, logits, evaluated), gradient = gradients(model, loss)
    assert len(states) == case.meta.get("n_states", len(states))
    for s, (z, of_state) in enumerate(zip(states, logits, strict=True)):
        close_maps(z, case, f"out/z_state{s}_{{}}", 1e-9)
        close(of_state, case[f"out/logits_state{s}"], rtol=1e-9, what=f"logits of state {s}")
    close(evaluated, case["out/logits_eval"], rtol=1e-9, what="logits in evaluation")
    close(value, case["loss"], rtol=1e-9, what="loss")
    close_gradients(gradient, case.group("grad"))


# Training ------------------------------------------------------------------------------------------------------------


def check_train(case: Case, sub=None):
    """Steps of the optimiser with batch normalisation by the batch."""
    model = build(case, settings(case, **forward_options(case)))
    o = dict(case.meta["optimizer"])
    names = {
        "lr": "learning_rate",
        "kind": "name",
        "momentum": "momentum",
        "nesterov": "nesterov",
        "weight_decay": "weight_decay",
    }
    recipe = {names[key]: value for key, value in o.items() if key in names and value is not None}
    if o.get("clip_global_norm"):
        recipe["clip"] = o["clip_global_norm"]
    if "betas" in o:
        recipe |= {"b1": o["betas"][0], "b2": o["betas"][1]}
    if "eps" in o:
        recipe["eps"] = o["eps"]
    optimizer = build_optimizer(recipe)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, rest, opt_state, x, y):
        def of_params(params):
            model = nnx.merge(graph, params, rest, copy=True)
            out = model.solve(model.encode(x, train=True), train=True)
            logits = [model.decode(z, train=True) for z in out.states]
            value = fixed_point_correction(lambda logits: class_loss(logits, y), logits, gamma=model.deq.config.gamma)
            return value, (nnx.split(model, nnx.Param, ...)[2], logits)

        (value, (rest, logits)), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, value, logits, gradient

    t = 0
    while f"in/x{t}" in case:
        x, y = images(case, f"in/x{t}"), jnp.asarray(case[f"in/y{t}"])
        params, rest, opt_state, value, logits, gradient = step(params, rest, opt_state, x, y)
        close(value, case[f"out/loss{t}"], rtol=1e-9, what=f"loss of step {t}")
        for s, of_state in enumerate(logits):
            close(of_state, case[f"out/logits{t}_state{s}"], rtol=1e-8, what=f"logits of step {t}, state {s}")
        close(optax.tree.norm(gradient), case[f"out/grad_norm{t}"], rtol=1e-7, what=f"norm of the gradient of step {t}")
        if t == 0:
            clip = clip_by_global_norm(recipe["clip"]) if "clip" in recipe else optax.identity()
            gradient, _ = clip.update(gradient, clip.init(gradient))
            close_gradients(nnx.merge(graph, gradient, rest), case.group("grad"))
        t += 1
    assert t > 0
    trained = nnx.merge(graph, params, rest)
    exported, expected = canonical(export_mdeq(trained)), canonical(case.group("after"))
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        close(exported[key], value, rtol=1e-7, what=f"{key} after {t} steps")
    if "out/logits_eval_after" in case:
        evaluate = jax.jit(lambda state, x: nnx.merge(nnx.graphdef(trained), state)(x))
        logits = evaluate(nnx.state(trained), images(case, "in/x0"))
        close(logits, case["out/logits_eval_after"], rtol=1e-7, what="logits after training")


def check_solver_traces(case: Case, sub=None):
    """Residuals and results of the original's solvers on f."""
    model = build(case, {"norm_type": "weight_norm"})
    injection = model.encode(images(case))
    for name, run in case.meta["runs"].items():
        options = dict(run["kwargs"])
        tau = options.pop("tau", 1.0) if run["solver"] == "fixed_point_iter" else 1.0
        solver = torchdeq_solver(run["solver"], run["max_iter"], run["tol"], run["stop_mode"], **options)

        def f(z, tau=tau):
            return jax.tree.map(lambda x, y: x + tau * (y - x), z, model.cell(z, injection))

        solved = jax.jit(lambda z, f=f, solver=solver: solve(f, z, solver))(model.initial_state(injection))
        close_maps(solved.value, case, f"out/{name}_z_{{}}", 1e-7)
        want = case[f"out/{name}_abs_trace"]
        skipped = solved.stats.abs_trace.shape[1] + 1 - want.shape[1]
        trace = np.asarray(solved.stats.abs_trace)[:, skipped:]
        trace_close(trace, want[:, 1:], f"residuals of {name}")
        offset = 1 if run["solver"] == "broyden" else 0
        np.testing.assert_array_equal(np.asarray(solved.stats.best_step) - offset, case[f"out/{name}_nstep"])


# The authors' second version -----------------------------------------------------------------------------------------


def masks_of(case: Case, model: MDEQ):
    """The stored dropout masks in the layout of an injection, or none."""
    masks = case.group("in/dropmask")
    if not masks:
        return tuple((None,) * n for n in model.config.n_blocks)
    name = "fullstage.branches.{}.blocks.{}.drop"
    return tuple(
        tuple(jnp.asarray(masks[name.format(i, b)].transpose(0, 2, 3, 1)) for b in range(n))
        for i, n in enumerate(model.config.n_blocks)
    )


def probes_of(case: Case, z):
    """The stored Hutchinson vectors as states with a leading axis of probes."""
    vectors = []
    while (name := f"in/jac_v_{len(vectors)}") in case:
        flat, start, maps = case[name][..., 0], 0, []
        for x in z:
            B, H, W, C = x.shape
            maps.append(flat[:, start : start + C * H * W].reshape(B, C, H, W).transpose(0, 2, 3, 1))
            start += C * H * W
        vectors.append(maps)
    return tuple(jnp.asarray(np.stack(maps)) for maps in zip(*vectors, strict=True)) if vectors else None


def check_vision(case: Case, sub=None):
    unrolled = case.meta.get("train_step", -1) >= 0 and case.meta["train_step"] < case.meta["config"]["PRETRAIN_STEPS"]
    model = build(case, settings(case, hook_ift=True, **TIGHT))
    x, y, weight = images(case), jnp.asarray(case["in/y"]), case.meta.get("jac_weight", 0.0)
    layers, segmentation = case.meta["config"]["MODEL"]["NUM_LAYERS"], model.config.head == "segmentation"

    def injection_of(model):
        return model.encode(x)._replace(masks=masks_of(case, model))

    check_one_application(case, model, masks_of(case, model))

    def loss(model):
        injection = injection_of(model)
        out = model.solve(injection, train=True, unroll=layers if unrolled else None)
        logits = model.decode(out.states[-1])
        main = segmentation_loss(logits, y) if segmentation else class_loss(logits, y)
        jacobian, probes = 0.0, probes_of(case, out.states[-1])
        if probes is not None:
            jacobian = model.jacobian_loss(out.states[-1], injection, probes=probes)
        return main + weight * jacobian, (out.states[-1], logits, main, jacobian, injection)

    value, (z, logits, main, jacobian, injection), gradient = gradients(model, loss)
    if "out/z_star_0" in case and not unrolled:
        close_maps(z, case, "out/z_star_{}", 1e-9)
    if "out/z_unrolled_0" in case:
        once = z if unrolled else model.solve(injection, unroll=layers).states[-1]
        close_maps(once, case, "out/z_unrolled_{}", 1e-9)
    close(logits if logits.ndim == 2 else logits.transpose(0, 3, 1, 2), case["out/logits"], rtol=1e-9, what="logits")
    for name, got in (("main_loss", main), ("jac_loss", jacobian)):
        if f"out/{name}" in case and (name != "jac_loss" or probes_of(case, z) is not None):
            close(got, case[f"out/{name}"], rtol=1e-9, what=name)
    close(value, case["loss"], rtol=1e-9, what="loss")
    close_gradients(gradient, case.group("grad"))


def segmentation_loss(logits, labels):
    logits = resize_bilinear(logits, labels.shape[1:3], align_corners=True)
    return cross_entropy(logits, labels, weights=jnp.asarray(CLASS_WEIGHTS))


# Metrics, losses, schedules and resizing -----------------------------------------------------------------------------


def check_aux(case: Case, sub=None):
    for warm in (0, 1):
        rate = learning_rate(
            {
                "learning_rate": 0.05,
                "schedule": "cosine_after_warmup",
                "warmup_steps": 10 * warm,
                "max_steps": 60,
                "lr_min": 1e-6,
            }
        )
        close(rate(np.arange(60)), case[f"out/imagenet_lr_warm{warm}"], rtol=1e-9, what=f"ImageNet's rate, warm-up {warm}")
    rate = learning_rate({"learning_rate": 0.1, "schedule": "cosine", "max_steps": 60, "lr_min": 1e-6})
    close(rate(np.arange(60)), case["out/cifar_lr_used"], rtol=1e-9, what="CIFAR's rate")
    rate = learning_rate({"learning_rate": 0.01, "schedule": "poly", "max_steps": 60})
    close(rate(np.arange(60)), case["out/poly_lr"], rtol=1e-9, what="polynomial rate")

    logits, labels = jnp.asarray(case["in/acc_logits"]), jnp.asarray(case["in/acc_y"])
    percent = [100 * np.mean(np.asarray(top_k(logits, labels, k))) for k in (1, 5)]
    close(percent, case["out/top1_top5"], rtol=1e-7, what="accuracy")  # the reference is in float32

    predictions = jnp.argmax(jnp.asarray(case["in/cm_pred"]), axis=1)
    counts = confusion_matrix(predictions, jnp.asarray(case["in/cm_label"]), len(case["out/confusion"]))
    close(counts, case["out/confusion"], rtol=0, what="confusion matrix")
    scores = segmentation_scores(counts)
    close(scores["iou"], case["out/iou"], rtol=1e-12, what="IoU")
    for ours, theirs in (("miou", "miou"), ("pixel_accuracy", "pixel_acc"), ("mean_accuracy", "mean_acc")):
        close(scores[ours], case[f"out/{theirs}"], rtol=1e-12, what=ours)

    target, weights = jnp.asarray(case["in/seg_target"]), jnp.asarray(case["in/class_weights"])
    score = jnp.asarray(case["in/seg_score"].transpose(0, 2, 3, 1))
    score = resize_bilinear(score, target.shape[1:], align_corners=True)
    close(cross_entropy(score, target, weights=weights), case["out/seg_ce"], rtol=1e-10, what="cross entropy")
    for name, threshold, keep in (("a", 0.05, 20), ("b", 0.9, 100_000), ("c", 0.02, 3)):
        got = ohem_cross_entropy(score, target, weights=weights, threshold=threshold, min_kept=keep)
        close(got, case[f"out/seg_ohem_{name}"], rtol=1e-10, what=f"OHEM {name}")

    x = jnp.asarray(case["in/resize"].transpose(0, 2, 3, 1))
    for name, align in (("align", True), ("noalign", False)):
        got = resize_bilinear(x, (8, 15), align_corners=align)
        close(got.transpose(0, 3, 1, 2), case[f"out/bilinear_{name}_8x15"], rtol=1e-12, what=f"bilinear, {name}")
    close(repeat_pixels(x, 4).transpose(0, 3, 1, 2), case["out/nearest_x4"], rtol=0, what="nearest")


KINDS = {
    "implicit": check_implicit,
    "phantom": check_phantom,
    "train": check_train,
    "solver_traces": check_solver_traces,
    "segmentation": check_vision,
    "vision": check_vision,
    "aux": check_aux,
}
