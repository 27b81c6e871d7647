"""Every rule against unrolling, finite differences, or what it says of itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import (
    GMRES,
    SHINE,
    Anderson,
    BiCGSTAB,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    NormalCG,
    OneStep,
    Picard,
    Reversible,
    Unrolled,
    adjoint_probe,
    fixed_point,
)
from deqjax.core.hoist import hoist
from deqjax.core.solve import solve
from deqjax.core.solvers.broyden import inverse_transposed
from tests.core.test_fixed_point import cell, named

TIGHT = Anderson(max_steps=80, tol=1e-14)
ADJOINTS = [
    Picard(max_steps=120, tol=1e-14),
    Anderson(max_steps=60, tol=1e-14),
    Broyden(max_steps=60, tol=1e-14),
    NewtonKrylov(max_steps=15, tol=1e-13),
    Neumann(80),
    GMRES(max_steps=20, tol=1e-13),
    BiCGSTAB(max_steps=40, tol=1e-13),
    NormalCG(max_steps=80, tol=1e-13),
    SHINE(refine=40, solver=Broyden(tol=1e-14)),
]


def loss(rule, solver=TIGHT):
    def of(W, x):
        return jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=rule).value ** 3)

    return of


@pytest.fixture(scope="module")
def expected(problem):
    return jax.jit(jax.grad(loss(Unrolled(), Picard(max_steps=100)), argnums=(0, 1)))(*problem)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
def test_every_adjoint_solver_gives_the_unrolled_gradient(adjoint, problem, expected):
    solver = Broyden(max_steps=60, tol=1e-14, memory=None) if isinstance(adjoint, SHINE) else TIGHT
    got = jax.jit(jax.grad(loss(Implicit(solver=adjoint), solver), argnums=(0, 1)))(*problem)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("line_search", [None, "sample"])
def test_newtons_unrolled_gradient_is_that_of_the_steps_there_were(line_search, problem):
    """Its Jacobians depend on the parameters, too."""
    W, x = problem
    solver = NewtonKrylov(max_steps=2, forcing=1e-9, line_search=line_search)
    of, e = lambda t: loss(Unrolled(), solver)(t * W, x), 1e-5
    np.testing.assert_allclose(jax.grad(of)(2.0), (of(2 + e) - of(2 - e)) / (2 * e), rtol=1e-6)


def test_newtons_unrolled_gradient_is_exact_though_its_inner_solves_are_not(problem, expected):
    got = jax.jit(jax.grad(loss(Unrolled(), NewtonKrylov(max_steps=8)), argnums=(0, 1)))(*problem)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize(
    "solver",
    [Anderson(max_steps=14), Anderson(max_steps=14, memory=12), Anderson(max_steps=14, kind="I")],
    ids=["written out", "long memory", "type I"],
)
def test_unrolled_gradients_pass_samples_that_have_nothing_to_solve(solver):
    """A sample of padding has residual 0 from the start, and a small system that is singular."""
    x = jnp.asarray([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])

    def value(w):
        return jnp.sum(fixed_point(lambda z: 0.2 * w * z + x, 0 * x, solver=solver, gradient=Unrolled()).value)

    np.testing.assert_allclose(jax.grad(value)(1.0), 0.2 / 0.8**2 * jnp.sum(x), rtol=1e-9)


@pytest.mark.parametrize("adjoint", [ADJOINTS[1], *ADJOINTS[5:8]], ids=named)
def test_every_adjoint_solver_can_be_differentiated_again(adjoint, problem):
    W, x = problem
    of = lambda t: loss(Implicit(solver=adjoint))(t * W, x)
    e = 1e-4
    numerical = (jax.grad(of)(1 + e) - jax.grad(of)(1 - e)) / (2 * e)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(of)))(1.0), numerical, rtol=1e-6)


@pytest.mark.parametrize("adjoint", [ADJOINTS[1], GMRES(max_steps=20, tol=1e-14)], ids=named)
def test_forward_mode_gives_every_derivative(adjoint, problem):
    W, x = problem
    forward = lambda t: loss(Implicit(solver=adjoint, forward_mode=True))(t * W, x)
    reverse = lambda t: loss(Implicit(solver=adjoint))(t * W, x)
    first, e = jax.jit(jax.grad(reverse)), 1e-4
    numerical = (first(1 + e) - first(1 - e)) / (2 * e)
    tangent = jax.jit(lambda t: jax.jvp(forward, (t,), (1.0,))[1])
    np.testing.assert_allclose([tangent(1.0), jax.jit(jax.grad(forward))(1.0)], first(1.0), rtol=1e-9)
    for second in (jax.hessian(forward), jax.jacrev(jax.jacfwd(forward))):
        np.testing.assert_allclose(jax.jit(second)(1.0), numerical, rtol=1e-6)


@pytest.mark.parametrize("adjoint", [ADJOINTS[1], ADJOINTS[7]], ids=named)
def test_forward_mode_where_a_parameter_reaches_one_leaf_alone(adjoint):
    def of(t, rule):
        f = lambda z: {"a": jnp.tanh(t * z["a"] + z["b"]), "b": 0.5 * z["b"] + 1}
        start = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))}
        return jnp.sum(fixed_point(f, start, solver=TIGHT, gradient=rule).value["a"] ** 2)

    forward = jax.jit(jax.grad(lambda t: of(t, Implicit(solver=adjoint, forward_mode=True))))
    np.testing.assert_allclose(forward(0.5), jax.grad(lambda t: of(t, Implicit(solver=TIGHT)))(0.5), rtol=1e-9)


@pytest.mark.parametrize(
    ("adjoint", "measuring"),
    [(GMRES(max_steps=30), 3), (GMRES(max_steps=7), 3), (GMRES(max_steps=9, restart=4), 4)]
    + [(BiCGSTAB(max_steps=n), 2) for n in (2, 5, 8)]
    + [(NormalCG(max_steps=n), 4) for n in (2, 5, 8)],
    ids=str,
)
def test_a_linear_solver_takes_no_more_products_than_it_says(adjoint, measuring):
    """With the map or its transpose, on a system that takes far more; and those that measure."""
    calls = []

    def linear(u):
        jax.debug.callback(lambda: calls.append(1))
        return 3 * jnp.roll(u, 1, axis=1) * jnp.arange(1.0, 65)[None]

    c = jnp.ones((1, 64))
    adjoint.solve(hoist(linear, c), c)
    jax.effects_barrier()
    assert adjoint.max_steps // 2 < len(calls) <= adjoint.max_steps + measuring


@pytest.mark.parametrize("adjoint", [GMRES, BiCGSTAB, NormalCG])
def test_a_linear_solver_keeps_to_its_budget_and_says_so(adjoint, problem):
    """Its tolerance is relative to the cotangent: one that is small is not solved by that alone."""
    W, x = problem

    def scaled(scale, max_steps, probe):
        rule = Implicit(solver=adjoint(max_steps=max_steps, tol=1e-6))
        solution = fixed_point(cell, jnp.zeros_like(x), 2 * W, x, solver=TIGHT, gradient=rule, adjoint_probe=probe)
        return scale * jnp.sum(solution.value**3)

    measured = jax.jit(jax.grad(scaled, argnums=2), static_argnums=1)
    assert [measured(1e-6, n, adjoint_probe())[3] for n in (4, 60)] == [0, 4]


def test_an_absolute_tolerance_of_the_adjoint_holds_however_small_the_cotangent(problem):
    W, x = problem
    rule = Implicit(solver=Picard(max_steps=50, tol=1e-6, stop_mode="abs"))

    def scaled(scale, probe):
        return scale * jnp.sum(fixed_point(cell, 0 * x, 2 * W, x, solver=TIGHT, gradient=rule, adjoint_probe=probe).value)

    steps = [jax.grad(scaled, argnums=1)(scale, adjoint_probe())[2] for scale in (1, 1e-12)]
    assert steps[0] > 4 * steps[1] == 4 * len(x)


def test_a_small_cotangent_of_a_leaf_in_half_precision_is_no_division_by_zero():
    """The cotangent's size, 1e-9, is 0 in float16."""
    f = lambda z, w: (w * (0.5 * z[0] + 1), w.astype(jnp.float16) * (0.25 * z[1] + 1))
    start = (jnp.zeros((1, 3), jnp.float32), jnp.zeros((1, 3), jnp.float16))
    of = lambda w: 1e-9 * jnp.sum(fixed_point(f, start, w, solver=Anderson(max_steps=30)).value[0])
    np.testing.assert_allclose(jax.grad(of)(jnp.float32(1)), 1e-9 * 3 * 4, rtol=1e-3)


def test_krylov_adjoints_treat_samples_alone(problem):
    """A sample's gradient is the same, whatever the others are."""
    W, x = problem
    rule = Implicit(solver=GMRES(max_steps=4, tol=1e-3))
    gradient = jax.grad(lambda x: jnp.sum(fixed_point(cell, jnp.zeros_like(x), W, x, solver=TIGHT, gradient=rule).value))
    np.testing.assert_allclose(gradient(x)[1:2], gradient(x[1:2]), atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("adjoint", [Anderson(tol=1e-5), GMRES(tol=1e-5)], ids=named)
def test_gradients_scale_with_the_loss_however_small_or_large(adjoint, dtype, problem):
    W, x = (a.astype(dtype) for a in problem)

    def gradient(scale):
        of = lambda W: jnp.sum(cell_value(W) ** 2) * scale
        cell_value = lambda W: (
            fixed_point(cell, jnp.zeros_like(x), W, x, solver=Anderson(), gradient=Implicit(solver=adjoint)).value
        )
        return jax.grad(of)(2 * W) / scale

    gradient = jax.jit(gradient)
    for scale in (1e-12, 1e-22, 1e22):
        np.testing.assert_allclose(gradient(jnp.asarray(scale, dtype)), gradient(jnp.ones((), dtype)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=named)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(adjoint, bad, problem):
    """A gradient of zero would hide an overflow. Other samples' are what they would be."""
    W, x = problem
    solver = Broyden(tol=1e-6) if isinstance(adjoint, SHINE) else Anderson(tol=1e-6)
    value = lambda W, x: fixed_point(cell, jnp.zeros_like(x), W, x, solver=solver, gradient=Implicit(solver=adjoint)).value
    gradient = jax.jit(jax.grad(lambda W, x, weight: jnp.sum(value(W, x) * weight), argnums=(0, 1)))
    weight = jnp.ones((4, 1))
    (_, expected), (of_W, of_x) = gradient(W, x, weight), gradient(W, x, weight.at[0].set(bad))
    assert not np.any(np.isfinite(of_W)) and not np.any(np.isfinite(of_x[0]))
    np.testing.assert_allclose(of_x[1:], expected[1:], rtol=1e-6)


@pytest.mark.parametrize("rule", [Implicit(solver=GMRES(max_steps=20, tol=1e-13)), Reversible()], ids=named)
def test_integers_booleans_and_keys_may_be_captured(rule, problem):
    W, x = problem
    mask, table, key = jnp.arange(8) > 2, jnp.arange(8), jax.random.key(3)

    def of(rule, solver):
        def inner(W, mask, key):
            noise = jax.random.normal(key, x.shape, x.dtype)
            f = lambda z: jnp.where(mask[None], cell(z, W, x), 0.1 * z[:, table]) + 0.01 * noise
            return jnp.sum(fixed_point(f, jnp.zeros_like(x), solver=solver, gradient=rule).value ** 2)

        # Inside scan and checkpoint, whose tracers a rule must not close over.
        body = lambda total, _: (total + jax.checkpoint(jax.grad(inner))(W, mask, key), None)
        return jax.jit(lambda: jax.lax.scan(body, jnp.zeros_like(W), length=2)[0])()

    solver = Picard(max_steps=80, tol=0.0) if isinstance(rule, Reversible) else TIGHT
    np.testing.assert_allclose(of(rule, solver), of(Unrolled(), Picard(max_steps=100)), atol=1e-8)


def test_shine_differentiated_again_uses_its_estimate_the_other_way_round():
    """With S for the estimate of (I - A)^-1, the gradient in x of sum(w z^2) / 2 is S^T (w z), and that along v S^T (w S v)."""
    A = jnp.asarray([[0.3, -0.4, 0.2], [0.1, 0.5, -0.3], [0.0, 0.2, -0.4]])
    w, v, x = jnp.asarray([[1.0, 2.0, 3.0], [0.3, -1.0, 0.7], [1.0, -0.5, 0.2]])[:, None]
    f = lambda z, x: z @ A.T + x
    solver, rule = Broyden(max_steps=4, tol=0.0, memory=None), Implicit(solver=SHINE(fallback=9.0), polish=False)
    gradient = jax.grad(lambda x: jnp.sum(w * fixed_point(f, 0 * x, x, solver=solver, gradient=rule).value ** 2) / 2)

    method = solve(lambda z: f(z, x), jnp.zeros_like(x), solver).method
    # Row i of S is S^T applied to the i-th unit vector.
    S = -jnp.concatenate([inverse_transposed(method, e[None]) for e in jnp.eye(3)])
    assert jnp.max(jnp.abs(S - jnp.linalg.inv(jnp.eye(3) - A))) > 0.02 and jnp.max(jnp.abs(S - S.T)) > 0.1
    along_v = jax.grad(lambda x: jnp.sum(gradient(x) * v))(x)
    np.testing.assert_allclose(along_v[0], S.T @ (w[0] * (S @ v[0])), rtol=1e-9)


def test_what_shine_estimates_for_a_sample_is_not_touched_by_its_batch_mates():
    """One that converged early stands still, and the inverse learnt on its way stays as it is."""
    rates, x = jnp.asarray([[0.3], [0.95]]), jnp.asarray([[0.1, 0.5, 0.9], [0.2, 0.6, 1.0]])
    rule, solver = Implicit(solver=SHINE(fallback=1e9)), Broyden(max_steps=20, tol=1e-6, memory=None)

    @jax.jit
    def gradient(rates, x):
        def loss(x):
            f = lambda z, x: rates * jnp.sin(z) + x
            solution = fixed_point(f, jnp.zeros_like(x), x, solver=solver, gradient=rule)
            return jnp.sum(solution.value**2), solution.stats.steps

        return jax.grad(loss, has_aux=True)(x)

    (together, steps), (alone, _) = gradient(rates, x), gradient(rates[:1], x[:1])
    assert steps[0] < steps[1]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-9)


@pytest.mark.parametrize(("max_steps", "tol"), [(12, 0.0), (60, 3e-2)], ids=["the whole budget", "an early stop"])
def test_the_reversible_gradient_is_that_of_its_own_steps(max_steps, tol, problem):
    """Exact after any number of steps, converged or not, and to the start as well."""
    W, x = problem
    beta, start, solver = 0.6, jnp.full_like(x, 0.3), Picard(max_steps=max_steps, tol=tol)
    solve = lambda W, x, z: fixed_point(cell, z, W, x, solver=solver, gradient=Reversible(beta=beta))
    stats = solve(W, x, start).stats
    steps = int(stats.steps[0]) // 2
    assert steps == 6 if tol == 0 else 1 < steps < 30
    np.testing.assert_allclose(stats.abs_trace[:, 0], jnp.linalg.norm(cell(start, W, x) - start, axis=1), rtol=1e-12)

    def by_hand(W, x, z_init):
        y = z = z_init
        for _ in range(steps):
            y = (1 - beta) * y + beta * cell(z, W, x)
            z = (1 - beta) * z + beta * cell(y, W, x)
        return jnp.sum(z**3)

    def reversible(W, x, z_init):
        return jnp.sum(solve(W, x, z_init).value ** 3)

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))(W, x, start) for of in (by_hand, reversible))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    for p, q in zip(da, db, strict=True):
        np.testing.assert_allclose(p, q, atol=1e-10)


@pytest.mark.parametrize("rule", [Implicit(), Reversible()], ids=named)
def test_memory_does_not_grow_with_the_budget(rule, problem):
    W, x = jnp.zeros((64, 64)), jnp.zeros((256, 64))

    def bytes_of(max_steps):
        adjoint = Picard(max_steps=max_steps)
        chosen = dataclasses.replace(rule, solver=adjoint) if isinstance(rule, Implicit) else rule
        gradient = jax.jit(jax.grad(loss(chosen, Picard(max_steps=max_steps))))
        return gradient.lower(W, x).compile().memory_analysis().temp_size_in_bytes

    few, many = bytes_of(10), bytes_of(100)
    # The residual traces are the only thing that the budget lengthens: 90 more numbers a sample, of each kind, twice.
    assert many - few <= 2 * 4 * 90 * 256 * 8


def test_shine_beats_the_one_step_gradient_and_needs_broyden(problem, expected):
    forward = Broyden(max_steps=60, tol=1e-14, memory=None)
    error = lambda rule: np.linalg.norm(jax.grad(loss(rule, forward))(*problem) - expected[0])
    plain, one_step = error(Implicit(solver=SHINE())), error(OneStep())
    assert error(Implicit(solver=SHINE(refine=5))) < plain < one_step
    # Without refinement the solver for it does nothing. An estimate that is too long is as good as none.
    np.testing.assert_allclose(error(Implicit(solver=SHINE(solver=Picard()))), plain, rtol=1e-9)
    np.testing.assert_allclose(error(Implicit(solver=SHINE(fallback=0.0))), one_step, rtol=1e-9)
    with pytest.raises(TypeError, match=r"solver=Broyden\(memory=None\)"):
        jax.grad(loss(Implicit(solver=SHINE()), Anderson()))(*problem)


@pytest.mark.parametrize("adjoint", [TIGHT, ADJOINTS[5], ADJOINTS[7]], ids=named)
def test_a_solve_inside_a_solve(adjoint, problem):
    W, x = problem
    inner = lambda z: fixed_point(lambda u: 0.3 * jnp.tanh(u) + z, jnp.zeros_like(z), solver=TIGHT).value
    f = lambda z, W, x: jnp.tanh(inner(z) @ W + x)
    rule = Implicit(solver=adjoint)
    solve = lambda W: fixed_point(f, jnp.zeros_like(x), W, x, solver=TIGHT, gradient=rule).value
    of = jax.jit(jax.value_and_grad(lambda t: jnp.sum(solve(t * W) ** 2)))
    e = 1e-5
    numerical = (of(0.5 + e)[0] - of(0.5 - e)[0]) / (2 * e)
    np.testing.assert_allclose(of(0.5)[1], numerical, rtol=1e-5)
