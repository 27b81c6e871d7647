"""Golden kinds of the implicit neural representations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.interop.inr import entries, export_inr, from_original, load_inr
from deqjax.models.inr import INRConfig, representation
from deqjax.nn.config import DEQConfig
from tests.golden import Case, close, trace_close

NAMES = {"filter_type": "filter", "in_channels": "n_in", "interm_channels": "n_hidden", "n_layers": "n_layers"}
NAMES |= {"output_channels": "n_out", "out_channels": "n_out", "input_scale": "input_scale", "scale": "input_scale"}
NAMES |= {"omega": "omega", "embedding_size": "n_features", "output_linear": "linear_output"}


def build(case: Case, deq: dict | None = None, params=None, **model):
    """A float64 model with the case's parameters, which survive the way out again."""
    c = case.meta["config"]
    params = case.group("param") if params is None else params
    settings = {NAMES[name]: value for name, value in c.items() if name in NAMES} | model
    deq = c.get("deq_args", {"norm_type": c.get("norm_type", "none")}) if deq is None else deq
    net = representation(INRConfig(**settings), DEQConfig.from_config(deq), nnx.Rngs(0))
    graph, state = nnx.split(net)
    net = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
    load_inr(net, params)
    exported, expected = export_inr(net), from_original(params)
    # The only key that the original's has no name for in common is the constant.
    assert exported.keys() - {"f.z_init"} == expected.keys() - {"f.z_init"}
    for key, value in expected.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=f"{key} after the round trip")
    return net


def differentiate(net, loss):
    """Value, auxiliary output, gradient as a network, and the network after the forward pass."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def of_params(params):
        net = nnx.merge(graph, params, rest, copy=True)
        value, aux = loss(net)
        return value, (aux, nnx.split(net, nnx.Param, ...)[2])

    (value, (aux, rest)), gradient = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)
    return value, aux, nnx.merge(graph, gradient, rest), nnx.merge(graph, params, rest)


def check_gradients(gradient, expected: dict, rtol=1e-7):
    compared = set()
    for entry in entries(gradient):
        if isinstance(entry.variable, nnx.Param):
            close(entry.variable[...], entry.layout.load(expected[entry.key]), rtol=rtol, what=f"gradient of {entry.key}")
            compared.add(entry.key)
    assert compared == set(expected)


def mse(values, target):
    return jnp.mean(jnp.square(values.reshape(target.shape) - target))


def check_encoding(case: Case, net):
    """The filters, the effective weights of a training pass, and one application of f."""
    weights = net.weights(train=True)
    for i, layer in enumerate(weights):
        close(layer.kernel.T, case[f"out/W_{i}"], rtol=1e-11, what=f"W_{i}")
    if "out/u_0" in case:
        for i, u in enumerate(net.filters(jnp.asarray(case["in/coords"]))):
            close(u, case[f"out/u_{i}"], rtol=1e-11, what=f"u_{i}")
        injection = net.encode(jnp.asarray(case["in/coords"]), weights)
        once = net.cell(jnp.asarray(case["in/z_probe"]), injection)
        close(once, case["out/f_once"], rtol=1e-11, what="f")


def check_implicit(case: Case, sub=None):
    check_encoding(case, build(case))
    x, target = jnp.asarray(case["in/coords"]), jnp.asarray(case["in/target"])

    def loss(net):
        out = net(x, train=True)
        return mse(out.values[-1], target), out

    value, out, gradient, after = differentiate(build(case), loss)
    close(out.states[-1], case["out/z_star"], rtol=1e-10, what="fixed point")
    close(out.values[-1], case["out/output"], rtol=1e-10, what="output")
    close(value, case["loss"], rtol=1e-10, what="loss")
    check_gradients(gradient, case.group("grad"))
    state = export_inr(after)
    for key, expected in case.group("out/after").items():
        close(state[key], expected, rtol=1e-12, what=f"{key} after the forward pass")
    if "out/eval_output" in case:
        close(after(x).values[-1], case["out/eval_output"], rtol=1e-10, what="output in evaluation")


def check_explicit(case: Case, sub=None):
    c = case.meta["config"]
    net = build(case, network=c.get("model", "one_pass").lower())
    x, target = jnp.asarray(case["in/coords"]), jnp.asarray(case["in/target"])

    def loss(net):
        (values,) = net(x, train=True).values
        return mse(values, target), values

    value, values, gradient, _ = differentiate(net, loss)
    close(values, case["out/output"], rtol=1e-10, what="output")
    close(value, case["loss"], rtol=1e-10, what="loss")
    check_gradients(gradient, case.group("grad"))


def check_states(case: Case, sub=None):
    check_encoding(case, build(case))
    x, target = jnp.asarray(case["in/coords"]), jnp.asarray(case["in/target"])

    def loss(net, last_only=False):
        out = net(x, train=True)
        values = list(out.values[-1:] if last_only else out.values)
        total, each = fixed_point_correction(mse, values, target, gamma=case.meta["config"]["gamma"], return_values=True)
        return total, (out, each)

    value, (out, each), gradient, _ = differentiate(build(case), loss)
    for i, (z, y) in enumerate(zip(out.states, out.values, strict=True)):
        close(z, case[f"out/z_{i}"], rtol=1e-11, what=f"state {i}")
        close(y, case[f"out/output_{i}"], rtol=1e-11, what=f"output {i}")
    # The reference's traces begin with a sentinel.
    trace_close(out.stats.abs_trace, case["out/abs_trace"][:, 1:], "absolute residuals")
    trace_close(out.stats.rel_trace, case["out/rel_trace"][:, 1:], "relative residuals", case["out/abs_trace"][:, 1:])
    np.testing.assert_array_equal(out.stats.best_step, case["out/nstep"])
    close(each, case["out/loss_values"], what="losses of the states")
    close(value, case["loss"], rtol=1e-10, what="loss")
    check_gradients(gradient, case.group("grad"))
    value, _, gradient, _ = differentiate(build(case), lambda net: loss(net, last_only=True))
    close(value, case["out/loss_lastonly"], rtol=1e-10, what="loss of the last state")
    check_gradients(gradient, case.group("grad_lastonly"))


def check_phantom_training(case: Case, sub=None):
    """The zoo's training loop with states carried from step to step; the solver runs at the first step only, or at all."""
    c = case.meta["config"]
    # The original's solver goes on with every coordinate until all have converged.
    net = build(case, {**c["deq_args"], "preset": "torchdeq"})
    x, target = jnp.asarray(case["in/coords"]), jnp.asarray(case["in/target"])
    rate = lambda t: c["lr"] * (1 - (1 - c["lr_decay"]) * t / c["steps"])
    clip = optax.clip(c["grad_clip_value"]) if c["grad_clip_value"] else optax.identity()
    optimizer = optax.adam(rate, **c["adam"])
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    opt = optimizer.init(params)

    @jax.jit
    def step(params, opt, z, known, x, target):
        def of_params(params):
            net = nnx.merge(graph, params, rest, copy=True)
            injection = net.encode(x, net.weights(train=True))
            start, sums = net.start(injection, z, known)
            out = net.solve(injection, start, train=True, solver_options={"f_max_iter": 0})
            values = net.decode(out.states[-1])
            return mse(values, target), (out.states[-1], values, sums)

        (value, aux), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        gradient, _ = clip.update(gradient, clip.init(gradient))
        updates, new_opt = optimizer.update(gradient, opt, params)
        return optax.apply_updates(params, updates), new_opt, value, gradient, aux

    cache, losses = jnp.zeros((x.shape[0], c["interm_channels"])), []
    for k in range(c["steps"]):
        known = k > 0 and c["skip_solver_after_first_step"]
        rows = case["in/batches"][k] if "in/batches" in case else np.arange(x.shape[0])
        if k < 2:
            close(cache[rows], case[f"out/step{k}_z_in"], atol=1e-12, what=f"states before step {k}")
        params, opt, value, gradient, (z, values, sums) = step(params, opt, cache[rows], known, x[rows], target[rows])
        cache = cache.at[rows].set(z)
        if k < 2:
            close(z, case[f"out/step{k}_z_out"], rtol=1e-10, what=f"states after step {k}")
            close(values, case[f"out/step{k}_output"], rtol=1e-10, what=f"output of step {k}")
            check_gradients(nnx.merge(graph, gradient, rest), case.group(f"grad_step{k}"))
        assert bool(sums["samples"] == 0) == known
        losses.append(float(value))
    close(losses, case["out/losses"], rtol=1e-9, what="losses")
    close(cache, case["out/z_cache_final"], rtol=1e-8, what="states at the end")
    net = nnx.merge(graph, params, rest)
    final = export_inr(net)
    for key, expected in case.group("out/final_param").items():
        close(final[key], expected, rtol=1e-8, what=f"{key} at the end")
    close(net(x).values[-1], case["out/eval_output"], rtol=1e-8, what="output in evaluation")


def check_coordinate_gradient(case: Case, sub=None):
    """First and second derivatives of the equilibrium in its coordinates, and a loss of the first ones differentiated."""
    from experiments.inr_shapes import sdf_loss

    tight = {"hook_ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel", "f_max_iter": 500, "b_max_iter": 500}
    net = build(case, {**tight, "f_tol": 1e-15, "b_tol": 1e-15, "norm_type": "weight_norm"})
    x, normals, sdf = (jnp.asarray(case[f"in/{name}"]) for name in ("coords", "normals", "sdf"))
    close(net.weights()[0].kernel.T, case["out/W_0"], rtol=1e-11, what="W_0")

    def loss(net):
        terms, values, slopes, _ = sdf_loss(net, x, normals, sdf[:, 0] == 0)
        return sum(terms.values()), (jnp.stack(list(terms.values())), values, slopes)

    value, (terms, values, slopes), gradient, _ = differentiate(net, loss)
    close(values, case["out/output"], rtol=1e-10, what="output")
    close(slopes, case["out/coord_grad"], rtol=1e-9, what="gradient in the coordinates")
    close(terms, case["out/loss_terms"], rtol=1e-9, what="terms of the loss")
    close(value, case["loss"], rtol=1e-9, what="loss")
    check_gradients(gradient, case.group("grad"))
    if "out/laplacian" in case:
        graph, state = nnx.split(net)
        slope = jax.grad(lambda x: nnx.merge(graph, state)(x[None], train=True).values[-1][0, 0])
        laplacian = jax.jit(jax.vmap(lambda x: jnp.trace(jax.jacrev(slope)(x))))(x)
        close(laplacian, np.squeeze(case["out/laplacian"]), rtol=1e-8, what="Laplacian")


def check_impsq(case: Case, sub=None):
    """The original code: clipped spectral norm, and the first two terms of the Neumann series for a gradient."""
    x, target = jnp.asarray(case["in/coords"]), jnp.asarray(case["in/target"])
    deq = {"norm_type": "spectral_norm", "norm_no_scale": True, "norm_target_norm": 0.97, "norm_clip": True}
    deq |= {"norm_clip_value": 1.0, "sn_n_power_iters": 0, "f_stop_mode": "rel"}
    # I + J^T: two terms.
    deq |= {"hook_ift": True, "b_max_iter": 2, "b_options": {"monitor": False}, "f_max_iter": 3000, "f_tol": 1e-14}
    net = build(case, deq, recipe="original")

    def loss(net, cached):
        options = {"f_max_iter": 0} if cached else {}
        out = net(x, z_init=jnp.asarray(case["in/z_cache"]) if cached else None, train=True, solver_options=options)
        return mse(out.values[-1], target), out

    for cached, suffix in ((True, ""), (False, "_solved")):
        value, out, gradient, _ = differentiate(net, lambda net, cached=cached: loss(net, cached))
        close(out.states[-1], case["out/z_next" if cached else "out/z_star"], rtol=1e-10, what=f"state{suffix}")
        close(out.values[-1], case[f"out/output{suffix}"], rtol=1e-10, what=f"output{suffix}")
        close(value, case["loss" if cached else "out/loss_solved"], rtol=1e-10, what=f"loss{suffix}")
        check_gradients(gradient, from_original(case.group(f"grad{suffix}")))


KINDS = {
    "implicit": check_implicit,
    "explicit": check_explicit,
    "states": check_states,
    "phantom_training": check_phantom_training,
    "coordinate_gradient": check_coordinate_gradient,
    "impsq_onestep": check_impsq,
}
