"""The joint equilibrium of a sampling chain: properties that hold for any network, and a small U-Net's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deqjax import Anderson, Broyden, Implicit, NewtonKrylov, Phantom, Picard, Status, TriangularAnderson, fixed_point
from deqjax.interop.ddim import export_ddim, load_ddim
from deqjax.interop.state_dict import StateDictError
from deqjax.models.ddim import (
    Chain,
    JointSystem,
    NonFiniteOutput,
    UNet,
    UNetConfig,
    attach,
    betas,
    check_finite,
    encode,
    exact_gradient,
    inversion,
    one_step_gradient,
    sample_ddim,
    select_timesteps,
    signal_rates,
    slerp,
    solve_joint,
    with_dtype,
)

SHAPE = (2, 2, 3)
RATES = signal_rates(betas())


def network(chain, scale=1.0):
    """Pixels mixed at random, a little differently at every timestep: enough of a network for what holds for any."""
    D = int(np.prod(SHAPE))
    W = jax.random.normal(jax.random.key(0), (D, D)) * scale / D**0.5
    t = jnp.asarray(chain.t / 1000.0)

    def denoise(x, k):
        h = x.reshape(len(x), -1) @ W + jnp.sin(7 * t[k])[:, None]
        return jnp.tanh(h).reshape(x.shape) + 0.5 * x

    return denoise


def problem(T=12, B=3, eta=0.0, selection="quad", **settings):
    chain = Chain.create(RATES, select_timesteps(selection, T), eta)
    x_T = jax.random.normal(jax.random.key(1), (B, *SHAPE))
    noise = jax.random.normal(jax.random.key(2), (B, len(chain), *SHAPE)) if eta else None
    return JointSystem(network(chain), chain, **settings), x_T, noise


# Sampling ------------------------------------------------------------------------------------------------------------


def run(system, x_T, noise=None, **settings):
    return jax.jit(lambda x, z: solve_joint(system, x, z, **settings))(x_T, noise)


@pytest.mark.parametrize(("T", "B", "eta", "window"), [(1, 1, 0.0, 0), (12, 3, 0.5, 3), (12, 2, 0.0, 0), (25, 1, 1.0, 8)])
def test_time_ordered_solvers_find_the_sequential_trajectory_in_t_iterations(T, B, eta, window):
    system, x_T, noise = problem(T, B, eta)
    expected = sample_ddim(system.denoise, system.chain, x_T, noise).trajectory
    for solver in (Picard, TriangularAnderson):
        # A tolerance that nothing meets: only the guarantee is left.
        found = run(system, x_T, noise, solver=solver(max_steps=10 * T, tol=0.0), window=window)
        assert int(found.calls) == len(system.chain) and np.all(found.stats.status == Status.CONVERGED)
        np.testing.assert_allclose(found.trajectory, expected, rtol=1e-9, atol=1e-11)


def test_a_known_trajectory_is_recognised_window_by_window():
    system, x_T, _ = problem(T=12, B=2)
    known = sample_ddim(system.denoise, system.chain, x_T).trajectory
    found = run(system, x_T, solver=TriangularAnderson(max_steps=12, tol=1e-9), window=4, z_init=known)
    assert int(found.calls) == 3


def test_acceleration_needs_fewer_iterations_and_keeps_the_tolerance():
    system, x_T, _ = problem(T=40, B=2)
    expected = sample_ddim(system.denoise, system.chain, x_T).image
    calls = []
    for solver in (Picard, TriangularAnderson):
        found = run(system, x_T, solver=solver(max_steps=40, tol=1e-6))
        calls.append(int(found.calls))
        np.testing.assert_allclose(found.image, expected, atol=1e-4)
    assert calls[1] < calls[0] < 40


@pytest.mark.parametrize("solver", [Broyden, NewtonKrylov, TriangularAnderson])
def test_any_solver_of_the_core_finds_it_through_fixed_point(solver):
    system, x_T, noise = problem(eta=0.5)
    expected = sample_ddim(system.denoise, system.chain, x_T, noise).trajectory
    start = jnp.zeros_like(expected)
    solve = jax.jit(lambda z: fixed_point(system.map(x_T, noise), z, solver=solver(max_steps=60, tol=1e-12)))
    found = solve(start)
    assert np.all(found.stats.status == Status.CONVERGED)
    np.testing.assert_allclose(found.value, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("weights", "damping"), [("prefix", 1.0), ("prefix", 0.5), ("slot", 1.0)])
def test_one_more_slot_is_exact_after_each_evaluation(weights, damping):
    system, x_T, _ = problem(T=9)
    expected = sample_ddim(system.denoise, system.chain, x_T).trajectory
    f, solver = system.map(x_T), TriangularAnderson(weights=weights, damping=damping)
    z = jnp.repeat(x_T[:, None], len(system.chain), axis=1)

    @jax.jit
    def step(z, state):
        image = f(z)
        return image, *solver.step(f, z, image, state)

    state, worst = solver.init(z), []
    for i in range(len(system.chain)):
        image, z, state = step(z, state)
        worst.append(float(jnp.max(jnp.abs(image - expected)[:, : i + 1])))
    # The weights of single slots are worth less: they mix in what was not exact yet.
    assert (max(worst) < 1e-10) == (weights == "prefix")


def test_what_is_remembered_moves_with_the_window():
    """Two slots on for the second sample: those that enter have no history, and two fewer are exact."""
    solver, z = TriangularAnderson(memory=3), jax.random.normal(jax.random.key(0), (4, 2, 5, 1))
    step, state = jax.jit(lambda k, state: solver.step(None, z[k], z[k + 1], state)[1]), solver.init(z[0])
    for k in range(3):
        state = step(k, state)
    moved = jax.jit(solver.shift)(state, jnp.asarray([0, 2]))
    np.testing.assert_array_equal(moved.exact, [3, 1])
    np.testing.assert_array_equal(moved.kept, np.broadcast_to([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], (2, 2, 5)))
    np.testing.assert_array_equal(moved.residuals[1, :, :3], state.residuals[1, :, 2:])


def test_samples_stop_one_by_one_and_do_not_depend_on_their_batch():
    system, x_T, _ = problem(T=30, B=3)
    x_T = x_T * jnp.asarray([0.01, 1.0, 3.0])[:, None, None, None]
    solver = TriangularAnderson(max_steps=30, tol=1e-6)
    together = run(system, x_T, solver=solver, window=8)
    assert len(set(np.asarray(together.stats.steps).tolist())) > 1
    for i in (0, 2):
        alone = run(system, x_T[i : i + 1], solver=solver, window=8)
        np.testing.assert_allclose(together.trajectory[i], alone.trajectory[0], rtol=1e-9, atol=1e-12)
        assert int(together.stats.steps[i]) == int(alone.stats.steps[0])


def test_a_linear_guess_changes_the_way_but_not_the_goal():
    plain, x_T, noise = problem(T=20, eta=0.3)
    guessed = JointSystem(plain.denoise, plain.chain, data_variance=0.3)
    expected = sample_ddim(plain.denoise, plain.chain, x_T, noise).trajectory
    start = jnp.repeat(x_T[:, None], 20, axis=1)
    assert not np.allclose(plain.map(x_T, noise)(start), guessed.map(x_T, noise)(start), atol=1e-3)
    np.testing.assert_allclose(guessed.map(x_T, noise)(expected), expected, rtol=1e-9, atol=1e-11)


def test_chunks_change_nothing():
    system, x_T, noise = problem(T=10, B=3, eta=0.2)
    z = jax.random.normal(jax.random.key(5), (3, len(system.chain), *SHAPE))
    expected = system.map(x_T, noise)(z)
    for chunk in (1, 7, 100):
        chunked = JointSystem(system.denoise, system.chain, chunk=chunk)
        np.testing.assert_allclose(chunked.map(x_T, noise)(z), expected, rtol=1e-12)


def test_a_step_that_is_listed_twice_changes_nothing():
    once, twice = (Chain.create(RATES, select_timesteps("quad", 1000, dedupe=dedupe)) for dedupe in (True, False))
    assert (len(once), len(twice)) == (688, 1000)
    x_T = jax.random.normal(jax.random.key(1), (1, *SHAPE))
    images = [sample_ddim(network(chain), chain, x_T).image for chain in (once, twice)]
    np.testing.assert_allclose(*images, rtol=1e-10)


def test_a_record_shows_the_residuals_of_what_was_iterated_on():
    system, x_T, _ = problem(T=12, B=2)
    found = run(system, x_T, solver=TriangularAnderson(max_steps=12, tol=1e-5), window=5, record=True)
    residuals = np.asarray(found.record.residuals[: int(found.calls), 0])
    shown = np.isfinite(residuals)
    assert shown[0].sum() == 5 and shown.any(axis=0).all()
    # Windows move forward only, by one or more.
    begins = [np.argmax(row) for row in shown[: int(found.stats.steps[0])]]
    assert np.all(np.diff(begins) >= 1)
    # The states at the window's end, of which the first is final when the window leaves it.
    images = np.asarray(found.record.images[: int(found.calls), 0])
    assert not np.allclose(images[0], x_T[0]) and np.array_equal(images[-1], found.image[0])


def test_a_warm_start_at_the_solution_takes_few_iterations():
    system, x_T, _ = problem(T=25)
    solver = TriangularAnderson(max_steps=25, tol=1e-6)
    cold = run(system, x_T, solver=solver)
    warm = run(system, x_T + 1e-8, solver=solver, z_init=cold.trajectory)
    assert int(warm.calls) <= 2 < int(cold.calls)
    np.testing.assert_allclose(warm.image, cold.image, atol=1e-5)


def test_non_finite_output_is_reported_with_its_timestep():
    system, x_T, _ = problem(T=10, B=2)

    def broken(x, k, denoise=system.denoise):
        # Only for the second sample, which is larger.
        bad = (k == 4) & (jnp.max(jnp.abs(x), axis=(1, 2, 3)) > 50)
        return jnp.where(bad[:, None, None, None], jnp.nan, denoise(x, k))

    x_T = x_T.at[1].mul(1e3)
    expected = sample_ddim(broken, system.chain, x_T)
    system = JointSystem(broken, system.chain)
    for solver in (Picard(max_steps=10, tol=1e-6), TriangularAnderson(max_steps=10, tol=1e-6), Anderson(max_steps=20)):
        found = run(system, x_T, solver=solver)
        assert found.failed_at.tolist() == expected.failed_at.tolist() == [-1, 4]
        assert found.stats.status[1] == Status.NON_FINITE and np.all(np.isfinite(found.trajectory[0]))
    with pytest.raises(NonFiniteOutput, match=f"1 of 2 samples: sample 1 at timestep {system.chain.t[4]}"):
        check_finite(found.failed_at, system.chain)


# Gradients -----------------------------------------------------------------------------------------------------------


def losses(system, x_T, noise, rule):
    """The same loss through the equilibrium, and through the sequential sampler."""
    solver = Picard(max_steps=len(system.chain), tol=0.0)

    def joint(x_T, noise):
        found = solve_joint(system, jax.lax.stop_gradient(x_T), jax.lax.stop_gradient(noise), solver=solver)
        return jnp.sum(jnp.sin(attach(system, x_T, noise, found.trajectory, rule)[:, -1]))

    def sequential(x_T, noise):
        return jnp.sum(jnp.sin(sample_ddim(system.denoise, system.chain, x_T, noise).image))

    return joint, sequential


@pytest.mark.parametrize("reverse", [True, False])
def test_implicit_gradients_are_those_of_the_sequential_sampler(reverse):
    system, x_T, noise = problem(T=9, B=2, eta=0.7)
    rule = exact_gradient(system, tol=1e-13) if reverse else Implicit(solver=Picard(max_steps=10, tol=1e-14))
    joint, sequential = losses(system, x_T, noise, rule)
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x_T, noise) for f in (joint, sequential))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    direction = jax.random.normal(jax.random.key(7), x_T.shape)
    step = 1e-6
    difference = (sequential(x_T + step * direction, noise) - sequential(x_T - step * direction, noise)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(got[0] * direction), difference, rtol=1e-6)


@pytest.mark.parametrize("variance", [None, 0.5])
def test_the_closed_form_is_the_one_step_gradient(variance):
    system, x_T, _ = problem(T=8, data_variance=variance)
    trajectory = sample_ddim(system.denoise, system.chain, x_T).trajectory
    loss = lambda x: jnp.sum(jnp.square(attach(system, x, None, trajectory, Phantom(steps=1))[:, -1] - 1))
    closed = one_step_gradient(system, trajectory[:, -1], jnp.ones_like(x_T))
    np.testing.assert_allclose(closed, jax.grad(loss)(x_T), rtol=1e-9)


@pytest.mark.parametrize("gradient", ["one_step", "implicit", "sequential", Phantom(steps=2)])
def test_inversion_finds_the_latent_of_a_sample(gradient):
    system, x_T, _ = problem(B=2, selection=(0, 20, 40, 80, 120, 160), remat=True)
    x_T = 0.2 * x_T
    target = sample_ddim(system.denoise, system.chain, x_T[::-1]).image
    solver = TriangularAnderson(max_steps=6, tol=1e-6)
    init, update = inversion(system, target, gradient=gradient, optimizer=optax.adam(0.01), solver=solver)
    state, update, losses = init(x_T), jax.jit(update), []
    for _ in range(150):
        state = update(state)
        losses.append(state.loss)
    assert np.all(state.best_loss < 0.02 * losses[0])
    np.testing.assert_array_equal(state.best_loss, np.min(losses, axis=0))
    image = sample_ddim(system.denoise, system.chain, state.best_x_T).image
    np.testing.assert_allclose(jnp.sum(jnp.square(image - target), axis=(1, 2, 3)), state.best_loss, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("warm_start", [True, False])
def test_an_update_keeps_the_latent_of_its_loss_and_begins_where_the_last_one_ended(warm_start):
    system, x_T, _ = problem(B=1)
    settings = {"optimizer": optax.sgd(1e-9), "solver": TriangularAnderson(max_steps=12, tol=1e-4), "warm_start": warm_start}
    init, update = inversion(system, jnp.zeros_like(x_T), **settings)
    first = (update := jax.jit(update))(init(x_T))
    np.testing.assert_array_equal(first.best_x_T, x_T)
    assert np.any(first.x_T != x_T)
    assert (int(update(first).calls) <= 2) == warm_start and int(first.calls) > 2


# The network ---------------------------------------------------------------------------------------------------------

SMALL = {"image_size": 8, "width": 32, "multipliers": (1, 2), "n_blocks": 1, "attention": (4,)}


def unet_of(seed=0, **settings):
    """A float32 U-Net with random weights, made without compiling its initialisation."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(UNetConfig(**{**SMALL, **settings}), nnx.Rngs(0))))
    random = np.random.default_rng(seed)
    weights = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.1, x.shape), jnp.float32), shapes)
    return nnx.merge(graph, weights)


@pytest.fixture(scope="module")
def unet():
    return unet_of(dropout=0.5)


def test_published_sizes():
    for size, multipliers, parameters in (
        (32, (1, 2, 2, 2), 35_746_307),
        (64, (1, 2, 2, 2, 4), 78_700_803),
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),
    ):
        shapes = nnx.eval_shape(lambda s=size, m=multipliers: UNet(UNetConfig(image_size=s, multipliers=m), nnx.Rngs(0)))
        leaves = jax.tree.leaves(nnx.state(shapes))
        assert sum(leaf.size for leaf in leaves) == parameters
        assert len(leaves) == {32: 328, 64: 390, 256: 450}[size]


def test_dropout_needs_a_key_and_half_precision_leaves_normalisation_alone(unet):
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.float32), jnp.asarray([3, 700])
    full = jax.jit(unet)(x, t)
    assert not np.allclose(jax.jit(unet)(x, t, jax.random.key(1)), full, atol=1e-3)
    half = with_dtype(unet, "bfloat16")
    assert half.conv_in.kernel[...].dtype == jnp.bfloat16 and half.norm_out.scale[...].dtype == jnp.float32
    out = jax.jit(half)(x, t)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, full, atol=0.05 * float(jnp.max(jnp.abs(full))))


@pytest.mark.parametrize("init", ["ddpm", "torch"])
def test_a_new_network_of_ddpm_predicts_nothing_yet(init):
    @jax.jit
    def predict(x):
        config = UNetConfig(**{**SMALL, "image_size": 4, "multipliers": (1,), "attention": ()}, init=init)
        return UNet(config, nnx.Rngs(0))(x, jnp.asarray([10]))

    largest = float(jnp.max(jnp.abs(predict(jax.random.normal(jax.random.key(0), (1, 4, 4, 3), jnp.float32)))))
    assert (largest < 1e-3) == (init == "ddpm")


@pytest.mark.parametrize("form", ["plain", "module.", "diffusers", "older diffusers"])
def test_checkpoints_under_every_name_give_the_same_weights(unet, form):
    state_dict = export_ddim(unet, diffusers="diffusers" in form)
    if form == "module.":
        state_dict = {f"module.{key}": value for key, value in state_dict.items()}
    if form == "older diffusers":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state_dict = {key.replace(new, old): value for key, value in state_dict.items()}
    if form == "diffusers":
        assert state_dict["up_blocks.0.resnets.1.conv1.weight"].shape == (64, 96, 3, 3)  # the lowest resolution comes first
        assert state_dict["mid_block.attentions.0.to_out.0.weight"].shape == (64, 64)
    other = unet_of(1)
    load_ddim(other, state_dict)
    assert export_ddim(other).keys() == export_ddim(unet).keys()
    for key, value in export_ddim(unet).items():
        np.testing.assert_array_equal(export_ddim(other)[key], value, err_msg=key)


def test_a_checkpoint_of_another_resolution_is_explained(unet):
    larger = unet_of(image_size=16, multipliers=(1, 2, 2))
    with pytest.raises(StateDictError, match=r"of 3 levels with attention on \[2\].*for 16x16 images"):
        load_ddim(unet, export_ddim(larger))


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_timesteps("uniform", 1001), "1001 sampling steps.*at most 1000"),
        (lambda: select_timesteps("uniform", 0), "1 or more"),
        (lambda: select_timesteps("quadratic", 10), "did you mean 'quad'"),
        (lambda: select_timesteps([5, 3], 2), "must ascend"),
        (lambda: select_timesteps("custom", 10, 500), "made for schedules of 1000"),
        (lambda: betas("lineal"), "did you mean 'linear'"),
        (lambda: betas(start=0.0), "between 0 and 1"),
        (lambda: Chain.create(RATES, np.arange(5), 1.5), "eta=1.5: must lie between 0"),
        (lambda: Chain.create(RATES, np.arange(5), -0.1), "eta=-0.1"),
        (lambda: Chain.create(RATES, np.asarray([1000])), "between 0 and 999"),
        (lambda: Chain.create(RATES, np.asarray([5, 3])), "must ascend"),
        (lambda: Chain.create(signal_rates(betas("jsd")), np.arange(1000)), "alpha_bar is 0 at timestep 999"),
        (lambda: UNetConfig(image_size=18, multipliers=(1, 2, 2)), "cannot be halved 2 times"),
        (lambda: UNetConfig(image_size=16, width=48), "multiple of 32"),
        (lambda: problem(data_variance=-1.0), "data_variance=-1.0"),
        (lambda: sample_ddim(*_needs_noise()), "needs noise"),
        (lambda: solve_joint(problem(eta=1.0)[0], jnp.ones((1, *SHAPE))), "needs noise"),
        (lambda: solve_joint(*problem()[:2], solver=Broyden(), window=4), "takes neither a window"),
        (lambda: solve_joint(*problem()[:2], window=-1), "window=-1"),
        (lambda: solve_joint(*problem()[:2], solver=Picard(return_final=True)), r"Picard\(return_final=True\): must be False"),
        (lambda: solve_joint(*problem()[:2], solver=TriangularAnderson(stop="all")), "must be 'each'"),
        (lambda: inversion(problem()[0], jnp.ones((1, *SHAPE)), gradient="ift"), "must be"),
        (lambda: inversion(problem()[0], 255 * jnp.ones((1, *SHAPE))), r"within \[-1, 1\]"),
        (lambda: inversion(problem()[0], jnp.nan * jnp.ones((1, *SHAPE))), "must be finite"),
    ],
)
def test_what_cannot_be_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _needs_noise():
    system, x_T, _ = problem(eta=1.0)
    return system.denoise, system.chain, x_T


def test_images_of_another_size_are_explained(unet):
    with pytest.raises(ValueError, match="16x16x3 for a U-Net of 8x8x3"):
        unet(jnp.zeros((1, 16, 16, 3)), jnp.asarray([0]))


def test_encoding_runs_the_chain_backwards_and_slerp_ends_at_its_ends():
    chain = Chain.create(RATES, np.arange(0, 100, 2))
    silent = lambda x, k: jnp.zeros_like(x)
    x = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    states = encode(silent, chain, x)
    assert states.shape == (2, 50, *SHAPE)
    # Without noise the chain only scales.
    np.testing.assert_allclose(states[:, -1], x * np.sqrt(RATES[98] / RATES[0]), rtol=1e-10)
    between = slerp(x[0], x[1], jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(between[jnp.asarray([0, 2])], x, rtol=1e-10)
