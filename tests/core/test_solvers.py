"""The methods on problems that tell them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import Anderson, Broyden, NewtonKrylov, Picard, Status, TriangularAnderson, fixed_point
from deqjax.core.small_systems import solve_general, solve_lower, solve_positive
from deqjax.core.solve import solve
from deqjax.core.solvers.broyden import inverse_transposed
from deqjax.core.solvers.line_search import step_length
from deqjax.core.solvers.torchdeq_broyden import TorchDEQBroyden
from tests.core.test_fixed_point import named


def solved(f, shape, solver):
    return fixed_point(f, jnp.zeros(shape), solver=solver)


def with_spectrum(eigenvalues, key=0):
    """A non-symmetric matrix with the given eigenvalues."""
    n = len(eigenvalues)
    basis = jax.random.normal(jax.random.key(key), (n, n)) + 2 * jnp.eye(n)
    return jnp.linalg.solve(basis, jnp.diag(eigenvalues)) @ basis


@pytest.mark.parametrize(
    "solver",
    [
        Anderson(max_steps=60, tol=1e-8),
        Anderson(max_steps=60, tol=1e-8, kind="I", safeguard=10.0),
        Broyden(max_steps=60, tol=1e-8),
        NewtonKrylov(max_steps=20, tol=1e-8),
    ],
    ids=repr,
)
def test_a_rotation_that_picard_cannot_follow(solver):
    """|eigenvalue| = 1.2 at right angles: plain iteration spirals outwards."""
    turn = 1.2 * jnp.asarray([[0.0, -1.0], [1.0, 0.0]])
    f = lambda z: z @ turn + 1.0
    assert solved(f, (3, 2), Picard(max_steps=60, stop_mode="abs")).stats.status[0] == Status.DIVERGED
    solution = solved(f, (3, 2), solver)
    assert np.all(solution.stats.converged)
    expected = jnp.linalg.solve((jnp.eye(2) - turn).T, jnp.ones(2))
    np.testing.assert_allclose(solution.value, jnp.broadcast_to(expected, (3, 2)), rtol=1e-6)


@pytest.mark.parametrize("solver", [Anderson(max_steps=200, tol=1e-8), Broyden(max_steps=200, tol=1e-8)], ids=named)
def test_stiff_and_non_normal(solver):
    A = with_spectrum(jnp.linspace(-0.9, 0.97, 24))
    stats = solved(lambda z: z @ A + 1.0, (2, 24), solver).stats
    assert np.all(stats.converged), stats.explain()


def test_badly_scaled_leaves_converge_together():
    f = lambda s: (0.5 * s[0] + 1e-4 * s[1] + 1e6, 0.9 * s[1] + 1e-6)
    solver = Anderson(max_steps=60, tol=1e-12)
    big, small = fixed_point(f, (jnp.zeros((1, 3)), jnp.zeros((1, 3))), solver=solver).value
    np.testing.assert_allclose(big, 2e6, rtol=1e-8)
    np.testing.assert_allclose(small, 1e-5, atol=1e-4)


def test_newton_converges_quadratically_at_the_end():
    c = jnp.asarray([[2.0, 30.0], [7.0, 0.3]])
    f = lambda z: z - 0.1 * (z**3 - c)
    solution = fixed_point(f, jnp.ones_like(c), solver=NewtonKrylov(max_steps=30, tol=1e-13, line_search="sample"))
    np.testing.assert_allclose(solution.value, jnp.cbrt(c), rtol=1e-10)
    assert np.max(solution.stats.steps) < 20


def test_newton_solves_its_systems_as_tightly_as_it_pays():
    """Eisenstat and Walker 1996, the second choice with its safeguard."""
    c = jnp.asarray([[2.0, 30.0, 7.0, 0.3]])
    f = lambda z: z - 0.1 * (z**3 - c)
    solver, z = NewtonKrylov(inner_steps=4), 2 * jnp.ones_like(c)
    state, sizes, forcings = solver.init(z), [], [0.5]
    for _ in range(9):
        sizes.append(float(jnp.linalg.norm(f(z) - z)))
        expected = 0.9 * (sizes[-1] / sizes[-2]) ** 2 if sizes[1:] else 0.5
        if (careful := 0.9 * forcings[-1] ** 2) > 0.1:
            expected = max(expected, careful)
        z, state = solver.step(f, z, f(z), state)
        forcings.append(float(state.forcing[0]))
        assert forcings[-1] == pytest.approx(min(max(expected, 1e-4), 0.5), rel=1e-6)
    assert len({round(forcing, 6) for forcing in forcings}) > 4 and sizes[-1] < 1e-6 * sizes[0]


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("memory", [6, 40])
def test_anderson_ends_where_krylov_methods_do_on_linear_problems(kind, memory):
    """After a few more evaluations than unknowns; old residuals that are large do not hold it up."""
    A = with_spectrum(jnp.asarray([0.9, -0.5, 0.3, 0.95]))
    stats = solved(lambda z: z @ A + 1.0, (1, 4), Anderson(max_steps=12, kind=kind, memory=memory, tol=1e-9)).stats
    assert stats.converged[0] and stats.steps[0] <= 8


@pytest.mark.parametrize("kind", ["I", "II"])
def test_anderson_stays_finite_past_what_its_dtype_resolves(kind):
    """Its small systems are singular there, and what they give is no step to take."""
    A = with_spectrum(jnp.asarray([0.9, -0.5])).astype(jnp.float32)
    x = jax.random.normal(jax.random.key(0), (32, 2), jnp.float32)
    stats = fixed_point(lambda z: z @ A + x, jnp.zeros_like(x), solver=Anderson(max_steps=60, kind=kind, tol=0.0)).stats
    assert not np.any(stats.status == Status.NON_FINITE)
    assert np.all(stats.rel_lowest < 1e-6)


def test_the_safeguard_forgets_the_sample_whose_residual_grew():
    """It takes a plain step, and its batch mate goes on accelerating."""
    solver, f = Anderson(safeguard=2.0), None
    points = jax.random.normal(jax.random.key(0), (4, 2, 6))
    residuals = jax.random.normal(jax.random.key(1), (4, 2, 6)).at[3, 0].multiply(10.0)
    state = solver.init(points[0])
    for z, residual in zip(points, residuals, strict=True):
        z_next, state = solver.step(f, z, z + residual, state)
    plain = points[3] + residuals[3]
    np.testing.assert_allclose(z_next[0], plain[0], rtol=1e-12)
    assert np.max(np.abs(z_next[1] - plain[1])) > 1e-3
    np.testing.assert_array_equal(np.sum(state.kept, axis=1), [1, 4])


@pytest.mark.parametrize("n", [1, 3, 6, 8, 12])
def test_small_systems(n):
    a = jax.random.normal(jax.random.key(n), (5, n, n))
    matrix, rhs = a @ jnp.swapaxes(a, 1, 2) + 0.1 * jnp.eye(n)[None], jax.random.normal(jax.random.key(1), (5, n))
    got = solve_positive(jnp.moveaxis(matrix, 0, -1), rhs.T).T
    np.testing.assert_allclose(got, jnp.linalg.solve(matrix, rhs[..., None])[..., 0], rtol=1e-8)


@pytest.mark.parametrize("n", [3, 12])
def test_a_singular_system_has_no_part_of_a_solution(n):
    matrix = jnp.stack([jnp.eye(n), jnp.eye(n).at[1].set(0).at[:, 1].set(0)])
    rhs = jnp.ones((2, n))
    for solution in (solve_general(matrix, rhs), solve_positive(jnp.moveaxis(matrix, 0, -1), rhs.T).T):
        np.testing.assert_allclose(solution[0], 1)
        # Written out, a pivot of 0 counts as the smallest number there is.
        assert not np.any(solution[1]) or np.max(solution[1]) > 1e100


def test_nothing_compiles_again_when_numbers_change():
    @jax.jit
    def run(tol, damping, x):
        return fixed_point(lambda z: 0.5 * z + x, jnp.zeros_like(x), solver=Picard(tol=tol, damping=damping)).stats.steps

    for tol, damping, scale in ((1e-3, 1.0, 1.0), (1e-6, 0.5, 2.0)):
        run(jnp.asarray(tol), jnp.asarray(damping), scale * jnp.ones((2, 3)))
    assert run._cache_size() == 1


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_line_search_turns_back_from_where_f_is_not_finite(scope):
    """The full step goes to where f is not defined; a quarter of it is better than none."""
    z, direction = jnp.asarray([[1.0, 1.0], [0.5, 0.5]]), jnp.asarray([[4.0, 4.0], [-0.2, -0.2]])
    f = lambda z: z + jnp.where(z < 2.5, jnp.asarray([[3.0], [0.3]]) - z, jnp.nan)
    length = step_length(f, z, f(z) - z, direction, scope)
    if scope == "sample":
        np.testing.assert_allclose(length, [0.25, 1.0])
    else:
        np.testing.assert_allclose(length, [0.25, 0.25])


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda z: 0.9 * z, 1.0),  # the full step gains little, but more than nothing
        (lambda z: -z, 0.5),  # it mirrors the residual, and the parabola has its minimum at the solution
        (lambda z: z + 50 - jnp.expm1(5 * z - 5), 0.01),  # it multiplies the residual, as does a tenth of it
        (lambda z: z + jnp.where(z == 1, 1.0, 2.0), 1.0),  # every other place is worse
        (lambda z: z + jnp.where(z == 1, 1.0, jnp.nan), 2.0**-7),  # or f is not defined there
    ],
    ids=["full", "half", "hundredth", "worse", "undefined"],
)
def test_how_far_a_line_search_goes(f, expected):
    z = jnp.ones((1, 2))
    np.testing.assert_allclose(step_length(f, z, f(z) - z, f(z) - z, "sample"), [expected], rtol=1e-6)


def test_a_line_search_costs_one_evaluation_where_the_full_step_is_good():
    calls = []

    def f(z):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * z

    step_length(f, jnp.ones((3, 2)), -0.5 * jnp.ones((3, 2)), -jnp.ones((3, 2)), "sample")
    jax.effects_barrier()
    assert len(calls) == 1


def test_a_sample_that_is_not_finite_has_no_say_in_a_common_step():
    f = lambda z: z - jnp.arctan(z)
    solver = NewtonKrylov(max_steps=12, tol=1e-8, line_search="batch")
    z_init = jnp.asarray([[2.0], [jnp.nan], [1.5]])
    np.testing.assert_array_equal(fixed_point(f, z_init, solver=solver).stats.converged, [True, False, True])


def test_a_line_search_reaches_what_newton_alone_overshoots():
    """From the start a full step multiplies the residual more than a millionfold; a parabola asks for less than a hundredth."""
    c = jnp.asarray([[5.0, 12.0], [1.0, 9.0]])
    f = lambda z: z - 0.5 * (jnp.expm1(z) - c)
    start = -jnp.ones_like(c)
    searching, full = (NewtonKrylov(max_steps=14, tol=1e-9, line_search=search) for search in ("sample", None))
    solution = fixed_point(f, start, solver=searching)
    assert np.all(solution.stats.converged)
    np.testing.assert_allclose(solution.value, jnp.log1p(c), rtol=1e-8)
    assert not np.any(fixed_point(f, start, solver=full).stats.converged)


@pytest.mark.parametrize("line_search", [None, "sample"])
def test_broyden_in_product_form_is_broyden(line_search, monkeypatch):
    """With memory enough, step for step what the sum of rank-one terms gives."""
    monkeypatch.setattr("deqjax.core.solvers.torchdeq_broyden._step_length", step_length)
    x = jax.random.normal(jax.random.key(0), (3, 6), jnp.float64)
    f = lambda z: jnp.cos(2 * z[:, ::-1]) + x
    for steps in (1, 2, 5, 9):
        settings = {"max_steps": steps, "memory": None, "line_search": line_search, "return_final": True}
        product, rank_one = (solve(f, x, cls(**settings)).value for cls in (Broyden, TorchDEQBroyden))
        np.testing.assert_allclose(product, rank_one, rtol=1e-8)


@pytest.mark.parametrize("memory", [2, 4])
def test_broydens_inverse_maps_the_last_change_to_the_last_step(memory):
    """The secant condition, for full and for shortened steps, from the first step after each new beginning."""
    x, c = jax.random.normal(jax.random.key(0), (2, 3, 6), jnp.float64)
    f = lambda z: jnp.cos(2 * z[:, ::-1]) + x
    solver = Broyden(max_steps=20, memory=memory, line_search="sample")
    z, state = x, solver.init(x)
    checked, previous = 0, x
    for _ in range(12):
        z_next, state = solver.step(f, z, f(z), state)
        if state.used > 1:
            checked += 1
            ds, dg = z - previous, (f(z) - z) - (f(previous) - previous)
            np.testing.assert_allclose(jnp.sum(inverse_transposed(state, c) * dg, 1), jnp.sum(c * ds, 1), rtol=1e-6)
        previous, z = z, z_next
    assert checked >= 6


def test_small_triangular_systems():
    for n in (1, 4, 8, 11):
        matrix = jnp.moveaxis(
            jnp.tril(jax.random.normal(jax.random.key(n), (5, n, n), jnp.float64)) + 3 * jnp.eye(n)[None], 0, -1
        )
        b = jax.random.normal(jax.random.key(1), (n, 5), jnp.float64)
        np.testing.assert_allclose(jnp.einsum("mnb,nb->mb", matrix, solve_lower(matrix, b)), b, atol=1e-10)
        np.testing.assert_allclose(jnp.einsum("nmb,nb->mb", matrix, solve_lower(matrix, b, transpose=True)), b, atol=1e-10)


@pytest.mark.parametrize("weights", ["prefix", "slot"])
def test_time_reversed_a_trajectory_is_solved_in_the_same_steps(weights):
    A = jnp.tril(jax.random.normal(jax.random.key(0), (6, 6)), -1)
    forwards = lambda z: jnp.einsum("ts,bs->bt", A, jnp.sin(z)) + 1
    backwards = lambda z: forwards(z[:, ::-1])[:, ::-1]
    way, back = (
        solve(f, jnp.zeros((2, 6)), TriangularAnderson(max_steps=5, tol=0.0, weights=weights, reverse=reverse))
        for f, reverse in ((forwards, False), (backwards, True))
    )
    np.testing.assert_allclose(way.value, back.value[:, ::-1], rtol=1e-9)
    np.testing.assert_allclose(way.stats.rel_trace, back.stats.rel_trace, rtol=1e-9)
