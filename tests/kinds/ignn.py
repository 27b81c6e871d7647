"""Golden kinds of the implicit graph networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.interop.ignn import entries, export_ignn, load_ignn
from deqjax.models.ignn import (
    IGNN,
    Bucket,
    IGNNConfig,
    ImplicitGraphLayer,
    alone,
    node_mask,
    pad_rows,
    project_columns,
    project_rows,
    single,
    stack,
)
from deqjax.models.ignn.aggregation import adjacency
from deqjax.nn.config import DEQConfig
from tests.golden import Case, close
from tests.kinds import ignn_data

# Residuals of one graph; the references stopped on the largest of a row's.
TIGHT = {"ift": True, "f_max_iter": 3000, "b_max_iter": 3000, "f_tol": 1e-14, "b_tol": 1e-14, "f_stop_mode": "rel"}
TIGHT |= {"b_stop_mode": "rel"}
METHODS = ("csr", "segment_sum", "dense")


def graphs_of(case: Case, radius, prefix="in", bucket: Bucket | None = None):
    """The case's graphs, one or several, as a padded batch, and their sizes."""
    row, col, val = (case[f"{prefix}/adj_{name}"] for name in ("row", "col", "val"))
    features = case[f"{prefix}/features"].T if f"{prefix}/features" in case else None
    n = case[f"{prefix}/adj_dense"].shape[0]
    sizes = case.arrays.get(f"{prefix}/n_node", [n])
    starts, graphs = np.concatenate([[0], np.cumsum(sizes)]), []
    for start, stop in itertools.pairwise(starts):
        inside = (row >= start) & (row < stop)
        nodes = None if features is None else features[start:stop]
        graphs.append(single(nodes, row[inside] - start, col[inside] - start, val[inside], int(stop - start), radius))
    if features is None:
        # The rows of the table are the nodes, with no place for padding.
        return alone(graphs[0]), sizes
    bucket = bucket or Bucket(int(max(sizes)) + 3, max(len(g.senders) for g in graphs) + 5)
    return stack(graphs, bucket), sizes


def flat(x, sizes):
    """`[G, N, m]` to the reference's `[m, n]`, without padding."""
    return jnp.concatenate([x[g, :size] for g, size in enumerate(sizes)]).T


def build(case: Case, network: str, deq: dict, params=None, **model):
    """A float64 network with the case's parameters."""
    params = case.group("param") if params is None else params
    config = IGNNConfig(network=network, dropout=0.0, **model)
    net = IGNN(config, DEQConfig.from_config(deq), nnx.Rngs(0))
    graph, state = nnx.split(net)
    net = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
    load_ignn(net, params)
    exported = export_ignn(net, params["X_0"].shape[1] if "X_0" in params else None)
    assert exported.keys() == params.keys()
    for key, value in params.items():
        assert exported[key].shape == value.shape, key
        if not key.endswith("bias") and not (".Omega_2" in key and not config.has_omega_2):
            np.testing.assert_allclose(exported[key], value, rtol=1e-12, err_msg=f"{key} after the round trip")
    return net


def differentiate(net, loss):
    """Value, auxiliary output and gradient with respect to the parameters of a function of the network."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def of_params(params):
        return loss(nnx.merge(graph, params, rest, copy=True))

    (value, aux), gradient = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)
    return value, aux, nnx.merge(graph, gradient, rest)


def check_gradients(with_gradients, expected: dict, rtol=1e-7):
    compared = set()
    for entry in entries(with_gradients):
        if isinstance(entry.variable, nnx.Param):
            close(entry.variable[...], entry.layout.load(expected[entry.key]), rtol=rtol, what=f"gradient of {entry.key}")
            compared.add(entry.key)
    assert compared == set(expected)


def class_loss(logits, labels):
    return jnp.mean(-jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def binary_loss(logits, labels):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def check_network(case: Case, network: str, radius, loss, output):
    """f, fixed points, output, loss and gradients; f with every way of aggregating."""
    c = case.meta["config"]
    sizes = {"n_features": c["nfeat"], "n_hidden": c["nhid"], "n_classes": c["nclass"], "kappa": c["kappa"]}
    norm = {"norm_type": c["norm_type"], **c["norm_options"]}
    graphs, n_node = graphs_of(case, radius)
    names = [f"ignn.{i}" for i in range(5)] if network == "ppi" else [f"ig{i}" for i in (1, 2, 3)]
    shared = 1.0 if network == "graphs" else radius
    net = build(case, network, {**TIGHT, **norm}, **sizes, aggregation="csr", spectral_radius=shared)
    A, mask, x = net.encode(graphs)
    edges = [jnp.asarray(e) for e in (graphs.senders, graphs.receivers, graphs.edges)]
    rho = net.radius(graphs)
    for number, layer in enumerate(net.layers):
        name = names[number]
        injection = layer.encode(x, A, mask, rho)
        close(jnp.swapaxes(injection.kernel, -1, -2), case[f"out/W_used/{name}"], rtol=1e-10, what=f"W of {name}")
        for k, omega in ((1, layer.omega_1), (2, layer.omega_2)):
            if omega is not None:
                close(omega.effective().kernel.T, case[f"out/Omega_{k}_used/{name}"], rtol=1e-10, what=f"Omega_{k} of {name}")
        close(flat(injection.b, n_node), case[f"out/b_Omega/{name}"], rtol=1e-9, what=f"B of {name}")
        z, start = jnp.zeros_like(injection.b), 0
        for g, size in enumerate(n_node):
            z = z.at[g, :size].set(case[f"in/z_probe/{name}"][:, start : start + size].T)
            start += size
        for method in METHODS:
            with_method = injection._replace(adjacency=adjacency(*edges, z.shape[1], method))
            once = flat(layer.cell(z, with_method), n_node)
            close(once, case[f"out/f_once/{name}"], rtol=1e-10, what=f"f of {name} by {method}")
        solved = layer.solve(injection)
        assert bool(jnp.all(solved.stats.rel_lowest < 1e-12)), solved.stats.explain()
        z = solved.states[-1]
        close(flat(z, n_node), case[f"out/z_star/{name}"], rtol=1e-9, what=f"fixed point of {name}")
        x = net.after(number, z, x, mask)

    def of_net(net):
        logits = output(net(graphs, train=True).logits, n_node)
        return loss(logits), logits

    # The references differentiate in training, but advance no power iteration.
    net = build(case, network, {**TIGHT, **norm, "sn_n_power_iters": 0}, **sizes, spectral_radius=shared)
    value, logits, gradient = differentiate(net, of_net)
    close(logits, case["out/output"], rtol=1e-9, what="output")
    close(value, case["loss"], rtol=1e-9, what="loss")
    check_gradients(gradient, case.group("grad"))


def check_node_model(case: Case, sub=None):
    labels, index = jnp.asarray(case["in/labels"]), case["in/idx_train"]
    chains = "in/features" in case
    of_training = (lambda logits: class_loss(logits[index], labels[index])) if chains else None
    of_training = of_training or (lambda logits: binary_loss(logits[index], labels[index]))
    output = lambda logits, sizes: flat(logits, sizes).T
    check_network(case, "chains" if chains else "amazon", float(case["in/adj_rho"]), of_training, output)


def check_ppi_model(case: Case, sub=None):
    labels = jnp.asarray(case["in/labels"])
    output = lambda logits, sizes: flat(logits, sizes).T
    check_network(case, "ppi", float(case["in/adj_rho"]), lambda logits: binary_loss(logits, labels), output)


def check_graph_model(case: Case, sub=None):
    labels = jnp.asarray(case["in/labels"])
    check_network(case, "graphs", None, lambda out: class_loss(out, labels), lambda out, sizes: jax.nn.log_softmax(out))


# Trajectories --------------------------------------------------------------------------------------------------------


def clip_each(max_norm):
    """PyTorch's clip_grad_norm_ of every tensor on its own."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / (jnp.linalg.norm(g) + 1e-6)), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def check_trajectory(case: Case, network: str, batches, loss, optimizer, **sizes):
    """Trains as the reference did, in the code's own solver or with a tight one."""
    c = case.meta["config"]
    recipe = not c["ift"]
    settings = {k: v for k, v in c.items() if k != "grad"} | {"grad": tuple(c["grad"])}
    if recipe:
        settings["preset"] = "torchdeq"
    else:
        settings |= {k: v for k, v in TIGHT.items() if k != "ift"}
    net = build(case, network, settings, **sizes, samples="features" if recipe else "graphs")
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, rest, opt_state, batch):
        def of_params(params):
            net = nnx.merge(graph, params, rest, copy=True)
            out = net(batch["graphs"], train=True)
            return loss(out.logits, batch), (nnx.split(net, nnx.Param, ...)[2], [s.best_step for s in out.stats])

        (value, (rest, best)), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, decayed(params, rest))
        return optax.apply_updates(params, updates), rest, opt_state, value, best, gradient

    def decayed(params, rest):
        # Weight decay acts on the stored weights, projections included.
        net = nnx.merge(graph, params, rest, copy=True)
        for layer in net.layers:
            if layer.offset is not None:
                layer.weight.kernel[...] += layer.offset[...]
        return nnx.split(net, nnx.Param, ...)[1]

    losses, steps = [], []
    for k in range(case.meta["steps"]):
        params, rest, opt_state, value, best, gradient = step(params, rest, opt_state, batches[k % len(batches)])
        losses.append(float(value))
        steps.append([int(jnp.max(b)) for b in best])
        if k == 0:
            check_gradients(nnx.merge(graph, gradient, rest), case.group("grad"))
    close(losses, case["out/losses"], rtol=1e-10 if recipe else 1e-8, what="losses")
    if recipe:
        np.testing.assert_array_equal(steps, case["out/nstep_max"])
    exported = export_ignn(nnx.merge(graph, params, rest))
    for key, value in case.group("out/param_final").items():
        if key != "X_0" and (not key.endswith(".bias") or key.startswith("proj")):
            close(exported[key], value, rtol=1e-7, what=f"{key} at the end")


def check_trajectory_chains(case: Case, sub=None):
    graphs, sizes = graphs_of(case, float(case["in/adj_rho"]))
    index, labels = case["in/idx_train"], jnp.asarray(case["in/labels"])
    loss = lambda logits, batch: class_loss(flat(logits, sizes).T[index], labels[index])
    optimizer = optax.chain(clip_each(0.5), optax.add_decayed_weights(5e-4), optax.scale_by_adam(), optax.scale(-0.01))
    m, p = case["param/X_0"].shape[0], case["in/features"].shape[0]
    model = {"n_features": p, "n_hidden": m, "n_classes": len(case["param/V.weight"]), "kappa": case.meta["kappa"]}
    check_trajectory(case, "chains", [{"graphs": graphs}], loss, optimizer, **model)


def check_trajectory_ppi(case: Case, sub=None):
    names = sorted({name.split("/")[1] for name in case.arrays if name.startswith("in/g")})
    n_node = max(len(case[f"in/{g}/labels"]) for g in names) + 3
    bucket = Bucket(n_node, max(len(case[f"in/{g}/adj_row"]) for g in names) + 5)
    parts = [graphs_of(case, float(case[f"in/{g}/adj_rho"]), f"in/{g}", bucket) for g in names]
    labels = [pad_rows([case[f"in/{g}/labels"]], n_node) for g in names]
    batches = [{"graphs": graphs, "labels": y} for (graphs, _), y in zip(parts, labels, strict=True)]

    def loss(logits, batch):
        mask = node_mask(batch["graphs"], n_node)[..., None]
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["labels"])
        return jnp.sum(losses * mask) / (jnp.sum(mask) * logits.shape[-1])

    c, p = case.group("param"), case["in/g0/features"].shape[0]
    model = {"n_features": p, "n_hidden": c["proj.0.weight"].shape[0] // 4, "n_classes": labels[0].shape[-1]}
    model["kappa"] = case.meta["kappa"]
    check_trajectory(case, "ppi", batches, loss, optax.adam(0.005), **model)


# The layer alone -----------------------------------------------------------------------------------------------------


def layer_of(network: str, p: int, m: int, params: dict, deq: dict, **settings) -> ImplicitGraphLayer:
    config = IGNNConfig(network=network, n_features=p, n_hidden=m, n_classes=1, **settings)
    layer = ImplicitGraphLayer(p, m, config, DEQConfig(norm_type="none", **deq), nnx.Rngs(0))
    graph, state = nnx.split(layer)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
    layer.weight.kernel[...] = jnp.asarray(params["W"].T)
    layer.omega_1.kernel[...] = jnp.asarray(params["Omega_1"].T)
    return layer


def check_original_layer(case: Case, sub=None):
    for kind in sorted({name.split("/")[1] for name in case.arrays if name.startswith("in/")}):
        part = lambda name, kind=kind: case[f"in/{kind}/{name}"]
        params = case.group(f"in/{kind}/param")
        m, p = params["Omega_1"].shape
        layer = layer_of("chains", p, m, params, TIGHT, kappa=0.9, omega_2=False)
        edges = [jnp.asarray(part(f"adj_{name}"))[None] for name in ("row", "col", "val")]
        n = part("adj_dense").shape[0]
        x, cotangent = (jnp.asarray(part(name).T)[None] for name in ("features", "cotangent"))
        for method in METHODS:

            def objective(layer, method=method, edges=edges, n=n, x=x, cotangent=cotangent):
                A = adjacency(*edges, n, method)
                injection = layer.encode(x, A, jnp.ones((1, n, 1)), jnp.asarray(1.0))
                z = layer.solve(injection, train=True).states[-1]
                return jnp.sum(z * cotangent), (z, injection.kernel)

            _, (z, kernel), gradient = differentiate(layer, objective)
            # Recorded as it was before the projection, with which the fixed point was found all the same.
            close(case[f"out/{kind}/W_used"], params["W"], what="W as recorded")
            close(kernel, project_columns(jnp.asarray(params["W"].T), 0.9), rtol=1e-12, what="W")
            close(z[0].T, case[f"out/{kind}/z_star"], rtol=1e-9, what="fixed point")
            close(gradient.omega_1.kernel[...].T, case[f"grad/{kind}/Omega_1"], rtol=1e-7, what="gradient of Omega_1")
            # The reference's own dW is wrong for directed graphs; the golden has the right one beside it.
            close(gradient.weight.kernel[...].T, case[f"grad/{kind}/W_correct"], rtol=1e-7, what="gradient of W")


def check_quirk(case: Case, sub=None):
    """Every graph has one residual, so no row is left behind at a stale value."""
    W, B, A = (jnp.asarray(case[f"in/{name}"]) for name in ("W", "B", "A"))
    m = W.shape[0]
    layer = layer_of("chains", m, m, {"W": case["in/W"], "Omega_1": np.eye(m)}, TIGHT, kappa=0.999)
    rows, cols = np.nonzero(case["in/A"])
    edges = [jnp.asarray(x)[None] for x in (rows, cols, case["in/A"][rows, cols])]
    n, mask = A.shape[0], jnp.ones((1, A.shape[0], 1))
    injection = layer.encode(B.T[None], adjacency(*edges, n), mask, jnp.asarray(1.0))
    injection = injection._replace(kernel=W.T, b=B.T[None])
    z = layer.deq(lambda z: layer.cell(z, injection), jnp.asarray(case["in/x0"]).T[None], train=False).states[-1]
    close(z[0].T, case["out/z_true"], rtol=1e-9, what="fixed point")


def check_projection(case: Case, sub=None):
    for spec in case.meta["specs"]:
        A, kappa = jnp.asarray(case[f"in/{spec['i']}/A"]), float(case[f"in/{spec['i']}/kappa"])
        want = case.group(f"out/{spec['i']}")
        rows, columns = project_rows(A, kappa), project_columns(A, kappa)
        close(rows, want["inf_T0"], rtol=1e-10, what="rows")
        close(columns, want["inf_T1"], rtol=1e-10, what="columns")
        close(project_columns(rows, kappa), want["inf_and_1_first1"], rtol=1e-10, what="rows, then columns")
        close(project_rows(columns, kappa), want["inf_and_1_first0"], rtol=1e-10, what="columns, then rows")


KINDS = {
    "node_model": check_node_model,
    "ppi_model": check_ppi_model,
    "graph_model": check_graph_model,
    "trajectory_chains": check_trajectory_chains,
    "trajectory_ppi": check_trajectory_ppi,
    "original_layer": check_original_layer,
    "quirk": check_quirk,
    "projection": check_projection,
    **ignn_data.KINDS,
}
