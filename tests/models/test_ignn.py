"""Properties of the implicit graph networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deqjax.interop.ignn import entries, load_ignn
from deqjax.interop.state_dict import StateDictError
from deqjax.models.ignn import (
    GCN,
    IGNN,
    Bucket,
    GraphsTuple,
    IGNNConfig,
    choose_bucket,
    fit_buckets,
    project_columns,
    project_rows,
    single,
    stack,
)
from deqjax.models.ignn.aggregation import METHODS, adjacency
from deqjax.models.ignn.network import unit_length
from deqjax.nn.clipping import clip_gradient
from deqjax.nn.config import DEQConfig
from deqjax.training.mesh import make_mesh, place_batch

TIGHT = dict(f_tol=1e-13, b_tol=1e-13, f_stop_mode="rel", b_stop_mode="rel", f_max_iter=600, b_max_iter=600, hook_ift=True)
SIZES = dict(n_features=3, n_hidden=4, n_classes=2, dropout=0.0)


def graph(seed, n=7, density=0.4, features=3, radius=None):
    """A random directed graph with its true spectral radius."""
    random = np.random.default_rng(seed)
    matrix = random.random((n, n)) * (random.random((n, n)) < density)
    senders, receivers = np.nonzero(matrix)
    true = float(np.abs(np.linalg.eigvals(matrix)).max()) + 1e-5
    nodes = random.standard_normal((n, features))
    return single(nodes, senders, receivers, matrix[senders, receivers], n, radius or true)


def network(name="chains", deq=None, **settings):
    net = IGNN(IGNNConfig(network=name, **{**SIZES, **settings}), DEQConfig(norm_type="none", **(deq or TIGHT)), nnx.Rngs(1))
    split, state = nnx.split(net)
    return nnx.merge(split, jax.tree.map(lambda x: x.astype(jnp.float64), state))


@functools.partial(jax.jit, static_argnums=0)
def _apply(split, state, batch):
    return nnx.merge(split, state)(batch)


def apply(net, batch):
    """The output in evaluation, compiled."""
    return _apply(*nnx.split(net), batch)


# The projection ------------------------------------------------------------------------------------------------------


def test_the_projection_is_the_nearest_point_of_the_ball():
    """Against the variational inequality <a - p, q - p> <= 0 for the corners q of the ball."""
    a = 3 * jax.random.normal(jax.random.key(0), (50, 6), jnp.float64)
    p = project_rows(a, 0.7)
    assert jnp.max(jnp.sum(jnp.abs(p), axis=1)) <= 0.7 + 1e-12
    corners = 0.7 * jnp.concatenate([jnp.eye(6), -jnp.eye(6)])
    inner = jnp.einsum("ri,rqi->rq", a - p, corners[None] - p[:, None])
    assert jnp.max(inner) <= 1e-10
    inside = 0.1 * a / jnp.sum(jnp.abs(a), axis=1, keepdims=True)
    np.testing.assert_array_equal(project_rows(inside, 0.7), inside)


def test_the_projection_takes_a_radius_per_matrix():
    a = jax.random.normal(jax.random.key(0), (3, 5, 5))
    radii = jnp.array([0.2, 1.0, 50.0])
    each = jnp.stack([project_columns(m, r) for m, r in zip(a, radii, strict=True)])
    np.testing.assert_allclose(project_columns(a, radii), each, rtol=1e-6)


def test_the_weight_in_use_lies_in_the_ball_of_every_graph():
    graphs = [graph(0), graph(1, density=0.9)]
    net = network("ppi")
    batch = stack(graphs, Bucket(8, 60))
    A, mask, x = net.encode(batch)
    kernel = net.layers[0].encode(x, A, mask, net.radius(batch)).kernel
    bound = 0.9 / batch.globals[:, 0]
    assert np.all(np.abs(kernel).sum(axis=1).max(axis=1) <= bound * (1 + 1e-12))


# The aggregation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
def test_aggregation_is_the_product_with_the_transposed_matrix(method):
    random = np.random.default_rng(0)
    matrices = random.random((3, 6, 6)) * (random.random((3, 6, 6)) < 0.5)
    E = 40
    ends, weights = np.zeros((2, 3, E), np.int32), np.zeros((3, E))
    for g, matrix in enumerate(matrices):
        index = np.nonzero(matrix)
        order = random.permutation(len(index[0]))  # any order will do
        ends[:, g, : len(order)], weights[g, : len(order)] = np.stack(index)[:, order], matrix[index][order]
    z = jnp.asarray(random.standard_normal((3, 6, 2)))
    A = jax.jit(lambda e, w: adjacency(e[0], e[1], w, 6, method))(jnp.asarray(ends), jnp.asarray(weights))
    expected = np.einsum("gij,gim->gjm", matrices, z)
    np.testing.assert_allclose(A.aggregate(z), expected, rtol=1e-12)
    c = jnp.asarray(random.standard_normal((3, 6, 2)))
    pulled = jax.vjp(A.aggregate, z)[1](c)[0]
    np.testing.assert_allclose(pulled, np.einsum("gij,gjm->gim", matrices, c), rtol=1e-12)
    # And its gradient once more.
    twice = jax.grad(lambda c: jnp.sum(jax.vjp(A.aggregate, z)[1](c)[0] * z))(c)
    np.testing.assert_allclose(twice, expected, rtol=1e-12)
    # Forward mode, which Newton's method takes, and a batch of states.
    np.testing.assert_allclose(jax.jvp(A.aggregate, (z,), (c,))[1], np.einsum("gij,gim->gjm", matrices, c), rtol=1e-12)
    batched = jax.vmap(lambda c: jax.vjp(A.aggregate, z)[1](c)[0])(jnp.stack([c, 2 * c]))
    np.testing.assert_allclose(batched, jnp.stack([pulled, 2 * pulled]), rtol=1e-12)


# Graphs in batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chains", "ppi", "graphs"])
def test_a_prediction_does_not_depend_on_padding_or_batch_mates(name):
    graphs = [graph(0), graph(1, n=5, density=0.9), graph(2, n=3)]
    net = network(name)
    together = apply(net, stack(graphs, Bucket(9, 60), n_graphs=5)).logits
    for g, one in enumerate(graphs):
        for bucket in (Bucket(8, 50), Bucket(20, 90)):
            alone = apply(net, stack([one], bucket)).logits[0]
            n = int(one.n_node[0]) if name != "graphs" else None
            np.testing.assert_allclose(alone[:n], together[g][:n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["chains", "ppi", "graphs"])
def test_padding_stays_zero_and_has_the_radius_of_a_real_graph(name):
    graphs = [graph(0, radius=0.7), graph(1, n=5, radius=0.7)]
    batch = stack(graphs, Bucket(9, 60), n_graphs=3)
    out = apply(network(name), batch)
    for values in (*out.states, out.logits) if name == "ppi" else out.states:
        for values_of_graph, n in zip(values, (7, 5, 0), strict=True):
            assert not np.any(values_of_graph[n:]) and np.any(values_of_graph[:n]) == (n > 0)
    np.testing.assert_array_equal(batch.globals[2], batch.globals[0])


def test_every_graph_stops_on_its_own():
    """A graph without edges is done at once, whatever its mates need."""
    still = single(np.ones((3, 3)), [], [], np.zeros(0), 3, 1.0)
    out = apply(network(), stack([still, graph(0), graph(1)], Bucket(8, 60)))
    steps = out.stats[0].steps
    assert steps[0] <= 2 < 10 < steps[1] and bool(jnp.all(out.stats[0].converged))
    alone = apply(network(), stack([graph(0)], Bucket(8, 60)))
    assert alone.stats[0].steps[0] == steps[1]


def test_renumbered_nodes_get_renumbered_predictions():
    g = graph(0)
    order = np.random.default_rng(5).permutation(7)
    place = np.argsort(order)
    renumbered = g._replace(nodes=g.nodes[order], senders=place[g.senders], receivers=place[g.receivers])
    net = network("ppi")
    first, second = (apply(net, stack([x], Bucket(8, 60))).logits[0][:7] for x in (g, renumbered))
    np.testing.assert_allclose(np.asarray(first)[order], second, rtol=1e-10)


def test_isolated_nodes_and_separate_parts_are_solved_too():
    """Two copies side by side and a node without edges: each copy is what it is alone, the node its own injection."""
    g = graph(0)
    both = single(
        np.concatenate([g.nodes, g.nodes, np.ones((1, 3))]),
        np.concatenate([g.senders, g.senders + 7]),
        np.concatenate([g.receivers, g.receivers + 7]),
        np.concatenate([g.edges, g.edges]),
        15,
        float(g.globals[0]),
    )
    net = network()
    z = apply(net, stack([both], Bucket(16, 120))).states[0][0]
    alone = apply(net, stack([g], Bucket(8, 60))).states[0][0]
    np.testing.assert_allclose(z[:7], alone[:7], rtol=1e-10)
    np.testing.assert_allclose(z[7:14], alone[:7], rtol=1e-10)
    layer = net.layers[0]
    np.testing.assert_allclose(z[14], jax.nn.relu(jnp.ones(3) @ layer.omega_2.kernel[...]), rtol=1e-10)


def test_graphs_of_all_sizes_fit_in_few_buckets():
    random = np.random.default_rng(0)
    sizes = random.integers(3, 300, 60)
    graphs = [single(np.zeros((n, 1)), *np.zeros((2, 3 * n), int), np.ones(3 * n), n) for n in map(int, sizes)]
    buckets = fit_buckets(graphs, 4)
    assert 1 <= len(buckets) <= 4
    shapes = {choose_bucket(graphs[k : k + 5], buckets) for k in range(0, 60, 5)}
    assert shapes <= set(buckets)
    for g in graphs:
        bucket = choose_bucket([g], buckets)
        # Not four times too large: sizes grow by a factor of about (300 / 3) ** (1 / 4) between buckets.
        assert bucket.n_node <= 8 + 3.3 * (int(g.n_node[0]) + 1) and bucket.n_edge >= 3 * int(g.n_node[0])
    # One node of a bucket is for padding.
    five = [graph(0, n=5)]
    assert choose_bucket(five, [Bucket(5, 99), Bucket(6, 99)]) == Bucket(6, 99)
    with pytest.raises(ValueError, match="fits in none"):
        choose_bucket([single(np.zeros((999, 1)), [], [], [], 999)], buckets)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chains", "ppi", "graphs"])
def test_the_gradient_equals_finite_differences(name):
    """In float64, of a directed graph, in every parameter; weights inside the ball, where the projection is the identity."""
    net = network(name, init_power_iters=0)
    split, params, rest = nnx.split(net, nnx.Param, ...)
    shrink = lambda path, x: 0.1 * x if "weight" in jax.tree_util.keystr(path) else x
    params = jax.tree_util.tree_map_with_path(shrink, params)
    batch = stack([graph(0), graph(3, n=4)], Bucket(8, 60))

    @jax.jit
    def loss(params):
        logits = nnx.merge(split, params, rest, copy=True)(batch, train=True).logits
        return jnp.sum(jnp.sin(3 * logits) * jnp.arange(logits.size).reshape(logits.shape))

    gradient = jax.jit(jax.grad(loss))(params)
    leaves, structure = jax.tree.flatten(params)
    for seed in range(3):
        random = np.random.default_rng(seed)
        direction = [random.standard_normal(x.shape) for x in leaves]
        moved = lambda h, direction=direction: structure.unflatten([x + h * d for x, d in zip(leaves, direction, strict=True)])
        h = 1e-6
        difference = (loss(moved(h)) - loss(moved(-h))) / (2 * h)
        slope = sum(jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
        np.testing.assert_allclose(slope, difference, rtol=2e-6)


def test_the_projection_passes_gradients_straight_through():
    net = network(kappa=0.3)
    batch = stack([graph(0)], Bucket(8, 60))
    split, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params, project):
        net = nnx.merge(split, params, rest, copy=True)
        layer = net.layers[0]
        if not project:
            # The same weight, put there without a projection.
            layer.weight.kernel[...] = layer.weight.kernel[...] + jax.lax.stop_gradient(
                project_columns(layer.weight.kernel[...], 0.3 / batch.globals[0, 0]) - layer.weight.kernel[...]
            )
        return jnp.sum(net(batch, train=True).logits ** 2)

    assert jnp.max(jnp.sum(jnp.abs(net.layers[0].weight.kernel[...]), axis=0)) > 0.3 / batch.globals[0, 0]
    for a, b in zip(*(jax.tree.leaves(jax.grad(loss)(params, p)) for p in (True, False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(("radii", "n_graphs"), [([0.5], 1), ([0.5], 3), ([0.5, 1.0], 2)])
def test_training_keeps_the_projected_weight_and_evaluation_changes_nothing(radii, n_graphs):
    """That of the smallest ball, whatever number of empty graphs fills the batch."""
    graphs = [graph(k, radius=radius) for k, radius in enumerate(radii)]
    net, batch = network(kappa=0.3), stack(graphs, Bucket(8, 60), n_graphs)
    layer, bound = net.layers[0], 0.3 / max(radii)
    stored = lambda: np.abs(layer.weight.kernel[...] + layer.offset[...]).sum(axis=0).max()
    before = stored()
    apply(net, batch)
    assert stored() == before > bound
    net(batch, train=True)
    assert stored() == pytest.approx(bound)


def test_unit_length_has_a_gradient_everywhere():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30], [3e-9, 4e-9]], jnp.float32)
    y = unit_length(x)
    np.testing.assert_allclose(y, [[0.6, 0.8], [0, 0], [3e-18, 4e-18], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.jacobian(unit_length)(x)
    assert jnp.all(jnp.isfinite(gradient))


def test_clipping_survives_huge_gradients():
    for size, expected in ((0.01, 0.01), (3.0, 0.5), (1e30, 0.5)):
        gradient = jax.grad(lambda x, size=size: size * jnp.sum(clip_gradient(x, 0.5)) / 2)(jnp.ones(4, jnp.float32))
        np.testing.assert_allclose(jnp.linalg.norm(gradient), expected, rtol=1e-5)


# The networks --------------------------------------------------------------------------------------------------------


def test_an_implicit_layer_sees_any_distance_and_an_explicit_one_its_layers():
    n = 12
    chain = single(np.eye(n, 3), np.arange(n - 1), np.arange(1, n), np.ones(n - 1), n, 1.0)
    other = chain._replace(nodes=np.concatenate([[[2.0, 5.0, 0.0]], chain.nodes[1:]]))
    batches = [stack([g], Bucket(n + 1, n)) for g in (chain, other)]
    split, state = nnx.split(network("amazon"))
    positive = nnx.merge(split, jax.tree.map(jnp.abs, state))
    far = [apply(positive, batch).states[0][0, n - 1] for batch in batches]
    assert not np.allclose(*far, rtol=1e-3)
    split, state = nnx.split(GCN(3, 4, 2, 3, nnx.Rngs(0), dropout=0.0))
    gcn = nnx.merge(split, jax.tree.map(jnp.abs, state))
    near, out = (np.asarray([apply(gcn, batch).logits[0, k] for batch in batches]) for k in (3, 5))
    assert not np.array_equal(*near) and np.array_equal(*out)


@pytest.mark.parametrize("norm", ["none", "weight_norm", "spectral_norm"])
def test_graphs_are_shared_out_over_eight_devices(norm):
    graphs = [graph(k, n=3 + k % 4) for k in range(8)]
    config = IGNNConfig(network="ppi", **SIZES)
    net = IGNN(config, DEQConfig(norm_type=norm, norm_clip=True, **{**TIGHT, "f_tol": 1e-6, "b_tol": 1e-6}), nnx.Rngs(0))
    split, params, rest = nnx.split(net, nnx.Param, ...)
    batch = {
        k: np.asarray(v, np.float32) if v.dtype.kind == "f" else v for k, v in stack(graphs, Bucket(8, 40))._asdict().items()
    }

    @jax.jit
    def gradient(params, batch):
        of_params = lambda p: jnp.mean(nnx.merge(split, p, rest, copy=True)(GraphsTuple(**batch), train=True).logits ** 2)
        return jax.grad(of_params)(params)

    results = [gradient(params, place_batch(make_mesh(devices=jax.devices()[:n]), batch)) for n in (1, 8)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 1.0}, "well-posed"),
        ({"kappa": -0.1}, "kappa=-0.1"),
        ({"network": "cora"}, "'chains', 'amazon', 'ppi', 'graphs'"),
        ({"spectral_radius": 0.0}, "spectral_radius=0.0"),
        ({"n_hidden": 0}, "n_hidden=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"aggregation": "scatter"}, "aggregation='scatter'"),
        ({"samples": "rows"}, "samples='rows'"),
    ],
)
def test_settings_that_cannot_be_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        IGNNConfig(**{"network": "chains", **SIZES, **settings})


@pytest.mark.parametrize(
    ("settings", "message"), [({"n_states": 3}, "supervise 3 states"), ({"jac_loss_weight": 0.1}, "jac_loss_weight=0.1")]
)
def test_equilibrium_settings_without_use_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IGNN(IGNNConfig(network="chains", **SIZES), DEQConfig(norm_type="none", **settings), nnx.Rngs(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_nodes": 0, "nodes": np.zeros((0, 3))}, "without nodes"),
        ({"senders": [0, 3]}, "senders name node 3, but the nodes are 0 to 2"),
        ({"receivers": [-1, 0]}, "receivers name node -1"),
        ({"receivers": [0, 5_000_000_000]}, "receivers name node 5000000000"),
        ({"senders": [0]}, "equally many"),
        ({"nodes": np.ones((2, 3))}, r"\(2, 3\): must be \[3, features\]"),
        ({"nodes": np.ones(3)}, r"\(3,\): must be"),
        ({"nodes": np.full((3, 3), np.nan)}, "nodes hold NaN"),
        ({"weights": [1.0, np.inf]}, "weights hold NaN or infinity"),
    ],
)
def test_arrays_that_make_no_graph_are_refused(change, message):
    good = dict(nodes=np.ones((3, 3)), senders=[0, 1], receivers=[1, 2], weights=[1.0, 1.0], n_nodes=3)
    assert single(**good).n_edge == 2
    # Whole numbers as weights make neither the radius nor anything else whole.
    assert single(**{**good, "weights": [1, 1]}, radius=1.5).globals == 1.5
    with pytest.raises(ValueError, match=message):
        single(**{**good, **change})


def test_features_of_another_number_are_explained():
    with pytest.raises(ValueError, match="nodes of 5 features for a network of n_features=3"):
        apply(network(), stack([graph(0, features=5)], Bucket(8, 60)))
    with pytest.raises(ValueError, match="nodes of 5 features for a network of n_features=3"):
        apply(GCN(3, 4, 2, 1, nnx.Rngs(0)), stack([graph(0, features=5)], Bucket(8, 60)))


def test_weights_of_the_original_repository_need_its_network():
    """Which has no second Omega; with one, they would compute something else without a word."""
    original, zoo = (network("ppi", omega_2=has) for has in (False, True))
    state_dict = {e.key: e.layout.export(np.asarray(e.variable[...])) for e in entries(original, original=True)}
    load_ignn(original, state_dict)
    with pytest.raises(StateDictError, match=r"original repository.*omega_2=False"):
        load_ignn(zoo, state_dict | {f"ig{k}.Omega_2": np.zeros((m, p)) for k, (p, m) in enumerate(zoo.config.widths, 1)})


def test_a_batch_without_radii_is_explained():
    bare = graph(0)._replace(globals=None)
    with pytest.raises(ValueError, match="no spectral radius"):
        apply(network(), stack([bare], Bucket(8, 60)))
    shared = network(spectral_radius=float(graph(0).globals[0]))
    np.testing.assert_allclose(
        apply(shared, stack([bare], Bucket(8, 60))).logits,
        apply(network(), stack([graph(0)], Bucket(8, 60))).logits,
        rtol=1e-12,
    )
