"""Golden kinds of the library: solvers, equilibrium layers, losses, normalisations, dropout."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.core.correction import fixed_point_correction
from deqjax.core.gradients import PROBE_ENTRIES, damped
from deqjax.core.solve import solve
from deqjax.core.solvers.torchdeq import torchdeq_solver
from deqjax.nn import normalization
from deqjax.nn.deq import DEQ
from deqjax.nn.dropout import VariationalDropout, apply_mask
from tests.golden import ROUNDOFF, close, trace_close

PLACEHOLDER = 1e8  # the original's first trace column


def problem(name, arrays):
    """The maps that the cases iterate, over `arrays` (parameters and inputs by name)."""
    a = arrays

    def list2(state):
        x, y = state
        new_x = jnp.tanh(x @ a["Wa"].T + (y @ a["Wba"].T)[:, None, :] + a["xa"])
        return new_x, jnp.tanh(y @ a["Wb"].T + x.mean(axis=1) @ a["Wab"].T + a["xb"])

    return {
        "tanh": lambda z: jnp.tanh(z @ a["W"].T + a["x"]),
        "linear": lambda z: z @ a["A"].T + a["b"],
        "over": lambda z: z - 3 * jnp.tanh(2 * (z @ a["M"].T - a["b"])),
        "sqrt": lambda z: 0.5 * (z + a["c"] / z),
        "scale": lambda z: a["s"][:, None] * z + a["b"],
        "list2": list2,
    }[name]


def inputs(case):
    return {name: jnp.asarray(x) for group in ("param", "in") for name, x in case.group(group).items()}


def check_stats(stats, expected, burn_in, monitored=True, ties=False):
    """Compares statistics in the original's form: a placeholder column, and steps counted from its first iteration."""
    if not monitored:
        trace_close(stats.abs_trace, expected["abs_trace"], "abs_trace")
        trace_close(stats.rel_trace, expected["rel_trace"], "rel_trace")
        return
    for mode in ("abs", "rel"):
        trace = np.asarray(getattr(stats, f"{mode}_trace"))[:, burn_in:]
        want = expected[f"{mode}_trace"]
        assert np.all(want[:, 0] == PLACEHOLDER)
        if trace.shape[1] + 1 < want.shape[1] or trace.shape[1] == 0:
            assert np.all(want == PLACEHOLDER)
            continue
        trace_close(trace, want[:, 1:], f"{mode}_trace", expected["abs_trace"][:, 1:])
        lowest = np.stack([want[:, 1], expected[f"{mode}_lowest"]], axis=1)  # allowed to differ as the trace is
        trace_close(np.stack([want[:, 1], getattr(stats, f"{mode}_lowest")], axis=1), lowest, f"{mode}_lowest")
    if not ties:
        offset = 1 if burn_in == 1 else 0  # Broyden's first evaluation is iteration 0
        np.testing.assert_array_equal(np.asarray(stats.best_step) - offset, expected["nstep"])


BURN_IN = {"anderson": 2, "broyden": 1}


def check_solver(case, sub):
    spec = case.meta["subs"][sub]
    arrays, options = inputs(case), dict(spec["kwargs"])
    f, name = problem(spec["problem"], arrays), spec["solver"]
    indexing = tuple(options.pop("indexing", ()))
    if name in ("fixed_point_iter", "simple_fixed_point_iter") and "tau" in options:
        f = damped(f, options.pop("tau"))
    solver = torchdeq_solver(name, options.pop("max_iter"), **options)
    best, samples, stats, _ = jax.jit(lambda z: solve(f, z, solver, indexing))(arrays[spec["z0"]])

    expected = case.group(f"out/{sub}")
    close(best, expected["result"], what="result")
    for k, state in enumerate(samples):
        # The original leaves out the steps after the stop; here they repeat the result.
        reached = k < len(expected["indexed"]) if "indexed" in expected else False
        close(state, expected["indexed"][k] if reached else expected["result"], what=f"indexed {k}")
    ties = spec["problem"] in ("sqrt", "scale")
    check_stats(stats, expected, BURN_IN.get(name, 0), monitored=solver.monitor, ties=ties)


def check_deq(case, sub):
    if sub.endswith("_QUIRK"):
        pytest.skip("documents a defect of the original")
    spec = case.meta["subs"][sub]
    arrays, args, train = inputs(case), spec["args"], spec.get("train", True)
    names = spec["z0"] if isinstance(spec["z0"], list) else [spec["z0"]]
    z_init = tuple(arrays[n] for n in names) if len(names) > 1 else arrays[names[0]]
    cotangents = [arrays["c"]] if len(names) == 1 else [arrays[f"c{j}"] for j in range(len(names))]
    scale = spec.get("scale", 1.0)
    config = deqjax.DEQConfig.from_config({"preset": "torchdeq", **args, "sradius_mode": "sradius" in spec})

    def loss(wrt, probe):
        deq = DEQ(config)
        deq.probe[...] = probe
        f = problem(spec["problem"], {**arrays, **wrt})
        start = arrays[spec["sradius"]] if "sradius" in spec else None
        out = deq(f, z_init, train=train, solver_options=spec.get("solver_kwargs"), radius_start=start)
        leaves = [jax.tree.leaves(state) for state in out.states]
        total = sum(
            (i + 1) * scale * sum(jnp.sum(z * c) for z, c in zip(s, cotangents, strict=True)) for i, s in enumerate(leaves)
        )
        return total, (leaves, out.stats, out.spectral_radius)

    wrt = {name: arrays[name] for name in spec["grad_wrt"]}
    probe = jnp.zeros((len(PROBE_ENTRIES),), jnp.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, (states, stats, radius)), (gradients, measured) = run(wrt, probe)

    expected = case.group(f"out/{sub}")
    assert len(states) == int(expected["n_out"])
    for i, leaves in enumerate(states):
        for j, leaf in enumerate(leaves):
            close(leaf, expected[f"z/{i}"] if len(leaves) == 1 else expected[f"z/{i}/{j}"], what=f"state {i}")
    close(total, case[f"loss/{sub}"], what="loss")
    solver = args.get("f_solver", "fixed_point_iter")
    if args.get("f_max_iter") != 0:
        check_stats(stats, expected, BURN_IN.get(solver, 0), monitored=solver != "simple_fixed_point_iter", ties="tight" in sub)
    if "sradius" in expected:
        close(radius, expected["sradius"], what="sradius")
    for name, value in case.group(f"grad/{sub}").items():
        close(gradients[name], value, what=f"gradient of {name}")
    if "backward0/rel_lowest" in expected:
        sums = dict(zip(PROBE_ENTRIES, np.asarray(measured), strict=True))
        B = len(expected["backward0/rel_lowest"])
        assert sums["samples"] == B
        residual = expected["backward0/rel_lowest"].mean()
        close(sums["rel"] / B, residual, atol=1e-6 * residual + ROUNDOFF, what="backward residual")


def check_loss(case, sub):
    if sub.endswith("_QUIRK"):
        pytest.skip("documents a defect of the original")
    spec, arrays, expected = case.meta["subs"][sub], inputs(case), case.group(f"out/{sub}")
    if spec["kind"] == "fp_correction":
        options = {k: v for k, v in spec.items() if k not in ("kind", "args", "weight_func")}

        def criterion(*args):
            if len(args) == 1:
                return jnp.mean(args[0] ** 2)
            return sum(jnp.mean(jnp.abs(u - v)) for u, v in itertools.pairwise(args))

        def total(arrays):
            args = [[arrays[n] for n in a] if isinstance(a, list) else arrays[a] for a in spec["args"]]
            return fixed_point_correction(criterion, *args, weighting=spec["weight_func"], return_values=True, **options)

        (loss, values), gradients = jax.value_and_grad(total, has_aux=True)(arrays)
        close(loss, expected["loss"], what="loss")
        close(values, expected["values"], what="values")
    elif spec["kind"] == "jac_reg":

        def total(arrays):
            return deqjax.jacobian_loss(problem(spec["problem"], arrays), arrays[spec["z"]], probes=arrays[spec["v"]])

        loss, gradients = jax.value_and_grad(total)(arrays)
        close(loss, expected["loss"], what="loss")
    elif spec["kind"] == "power":
        f, z, start = problem(spec["problem"], arrays), arrays[spec["z"]], arrays[spec["v"]]
        radius = deqjax.spectral_radius(f, z, steps=spec["n_iters"], start=start)
        close(radius, np.abs(expected["evalue"]).reshape(-1), what="spectral radius")
        gradients = {}
    else:
        raise AssertionError(f"unknown loss {spec['kind']!r}")
    for name, value in case.group(f"grad/{sub}").items():
        close(gradients[name], value, what=f"gradient of {name}")


def check_norm(case, sub):
    spec = case.meta["subs"][sub]
    layer, args, expected = spec["layer"], spec["args"], case.group(f"out/{sub}")
    arrays = inputs(case)
    axis = 1 if layer["type"].startswith("ConvTranspose") else 0
    clip = args.get("norm_clip_value", 1.0) if args.get("norm_clip") else None
    target, learned = args.get("norm_target_norm", 1.0), not args.get("norm_no_scale", False)
    spectral = args["norm_type"] == "spectral_norm"
    weight = arrays[layer["w"]]
    g = jnp.asarray(expected["g"]).reshape(-1) if learned else None
    iterations = args.get("sn_n_power_iters", 1)

    def effective(weight, g, u, v, n):
        if not spectral:
            return normalization.weight_norm(weight, g, axis=axis, target_norm=target, clip_value=clip), u, v
        return normalization.spectral_norm(weight, u, v, g, axis=axis, n_power_iters=n, target_norm=target, clip_value=clip)

    u, v = (arrays[layer["u"]], arrays[layer["v"]]) if spectral else (None, None)
    before = (u, v)
    for r in range(spec["resets"]):
        before = (u, v)
        result, u, v = effective(weight, g, u, v, iterations)
        close(result, expected[f"weight{r}"], what=f"weight after reset {r}")
        if spectral:
            close(u, expected[f"u{r}"], what="u")
            close(v, expected[f"v{r}"], what="v")

    def loss(weight, g, bias, x):
        y = torch_layer(layer, effective(weight, g, *before, iterations)[0], bias, x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    bias, x = arrays[layer["bias"]], arrays[layer["in"]]
    argnums = (0, 1, 2, 3) if learned else (0, 2, 3)
    (value, y), gradients = jax.value_and_grad(loss, argnums, has_aux=True)(weight, g, bias, x)
    names = ["weight_orig" if spectral else "weight_v", *(["weight_g"] if learned else []), "bias", "input"]
    close(y, expected["y"], what="y")
    close(value, case[f"loss/{sub}"], what="loss")
    for name, gradient in zip(names, gradients, strict=True):
        want = case[f"grad/{sub}/{name}"]
        close(gradient.reshape(want.shape), want, what=f"gradient of {name}")
    close(effective(weight, g, u, v, 0)[0], expected["weight_eval"], what="weight in evaluation")


def torch_layer(layer, weight, bias, x):
    """The PyTorch layer, on PyTorch layouts."""
    kind, options = layer["type"], {}
    if layer["args"] and isinstance(layer["args"][-1], dict):
        options = layer["args"][-1]
    if kind == "Linear":
        return x @ weight.T + bias
    n = x.ndim - 2
    stride, padding = (options.get("stride", 1),) * n, options.get("padding", 0)
    channels = bias.reshape((1, -1) + (1,) * n)
    spatial = "DHW"[-n:]
    if kind.startswith("ConvTranspose"):
        kernel = jnp.flip(jnp.swapaxes(weight, 0, 1), axis=tuple(range(2, 2 + n)))
        pads = [(k - 1 - padding, k - 1 - padding) for k in weight.shape[2:]]
        options = {"window_strides": (1,) * n, "lhs_dilation": stride}
    else:
        kernel, pads, options = weight, [(padding, padding)] * n, {"window_strides": stride}
    layout = ("NC" + spatial, "OI" + spatial, "NC" + spatial)
    return jax.lax.conv_general_dilated(x, kernel, padding=pads, dimension_numbers=layout, **options) + channels


def check_dropout(case, sub):
    spec, expected = case.meta["subs"][sub], case.group(f"out/{sub}")
    x = jnp.asarray(case[f"in/{spec['x']}"])
    name, n, first = spec["cls"], x.ndim - 2, spec["kwargs"].get("token_first", True)
    rate = spec["kwargs"]["dropout"]
    if name == "VariationalDropout":
        dropout = VariationalDropout(rate)
    elif first:
        named = {f"VariationalDropout{n}d": VariationalDropout.channels, f"VariationalDropToken{n}d": VariationalDropout.tokens}
        dropout = named[name](rate, n)
    else:
        shared = {f"VariationalDropout{n}d": tuple(range(2, 2 + n)), f"VariationalDropToken{n}d": (1,)}
        dropout = VariationalDropout(rate, shared[name])
    mask = dropout.mask(jax.random.key(spec["seed"]), x.shape, x.dtype)
    assert mask.shape == expected["mask"].shape
    assert set(np.unique(np.asarray(mask)).round(12)) <= {0.0, round(1 / (1 - dropout.rate), 12)}
    given = jnp.asarray(expected["mask"])
    close(apply_mask(x, given), expected["y"], what="y")
    close(apply_mask(2 * x, given), expected["y_of_2x"], what="y of 2x")
    close(apply_mask(x, dropout.mask(None, x.shape)), expected["y_eval"], what="y in evaluation")


KINDS = {"solver": check_solver, "deq": check_deq, "loss": check_loss, "norm": check_norm, "dropout": check_dropout}
