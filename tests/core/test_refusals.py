"""What a solve refuses, and how it says so."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import deqjax
from deqjax import Implicit, Phantom, Picard, Reversible, Unrolled, fixed_point
from deqjax.core.solve import check_samples, solve
from deqjax.core.solvers.base import require_count
from tests.core.test_fixed_point import cell, named


@pytest.mark.parametrize(
    ("f", "z", "message"),
    [
        (lambda z: z[:, :2], jnp.zeros((2, 3)), "keep shape and dtype"),
        (lambda z: z.astype(jnp.float32), jnp.zeros((2, 3)), "float32"),
        (lambda z: (z, z), jnp.zeros((2, 3)), "structure"),
        (lambda z: z, jnp.zeros((2, 3), jnp.int32), "floating point"),
        # The length of a complex vector is not that of its parts: (1, i) would count as converged.
        (lambda z: 0.9j * z, jnp.zeros((2, 3), jnp.complex128), "real and imaginary parts"),
    ],
)
def test_a_map_that_is_not_one_of_states_is_explained(f, z, message):
    for call in (fixed_point, lambda f, z: inspect.unwrap(solve)(f, z, Picard())):
        with pytest.raises(TypeError, match=message):
            call(f, z)


@pytest.mark.parametrize("axis", [1, -1, None])
def test_the_shapes_in_an_error_are_the_callers(axis):
    with pytest.raises(TypeError, match=r"z is float64\[2, 3\] but f returned float64\[3\]"):
        fixed_point(lambda z: z[0], jnp.zeros((2, 3)), batch_axis=axis)


def test_wrong_options_are_explained():
    with pytest.raises(ValueError, match="batch axis"):
        fixed_point(lambda z: z, (jnp.zeros((2, 3)), jnp.zeros((4, 3))))
    with pytest.raises(ValueError, match="batch axis"):
        deqjax.DEQ()(lambda z: z, (jnp.zeros((2, 3)), jnp.zeros((4, 3))), train=True)
    with pytest.raises(ValueError, match=r"the shapes are z \[\]\. If the whole state is one problem"):
        fixed_point(lambda z: z, jnp.zeros(()))
    for axis in (0, None):
        with pytest.raises(ValueError, match="no leaves"):
            fixed_point(lambda z: z, {}, batch_axis=axis)
    # What is no solver is told so by the annotations, where they are checked.
    for wrong in ({"solver": Picard}, {"solver": "anderson"}, {"gradient": "implicit"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*must be a"):
            inspect.unwrap(fixed_point)(lambda z: z, jnp.zeros((2, 3)), **wrong)
    with pytest.raises(ValueError, match="stop_mode='relative'"):
        Picard(stop_mode="relative")
    for wrong in (Picard, "anderson"):
        with pytest.raises(TypeError, match=r"solver=.*must be a solver"):
            inspect.unwrap(solve)(lambda z: z, jnp.zeros((2, 3)), wrong)
    with pytest.raises(TypeError, match="no array"):
        inspect.unwrap(fixed_point)(jnp.zeros((2, 3)), lambda z: z)
    for tol in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"tol=.*0 or more"):
            Picard(tol=tol)
    with pytest.raises(ValueError, match=r"memory=5\.0: must be a whole number"):
        require_count("memory", 5.0, 1)
    with pytest.raises(ValueError, match=r"sample_at=1\.5: must be a whole number"):
        check_samples((1.5, 3), 4)
    for estimate, wrong in ((deqjax.jacobian_loss, {"n_probes": 0}), (deqjax.spectral_radius, {"steps": 0})):
        with pytest.raises(ValueError, match="=0: must be a whole number"):
            estimate(lambda z: z, jnp.zeros((2, 3)), jax.random.key(0), **wrong)
    with pytest.raises(ValueError, match=r"adjoint_probe.*adjoint_probe\(\)"):
        inspect.unwrap(fixed_point)(lambda z: z, jnp.zeros((2, 3)), adjoint_probe=jnp.zeros(3))
    with pytest.raises(TypeError, match=r"rules=.*must be a mapping"):
        inspect.unwrap(deqjax.check_gradients)(cell, jnp.zeros((2, 3)), jnp.eye(3), jnp.ones((2, 3)), rules=[Phantom()])
    with pytest.raises(ValueError, match=r"did you mean 'anderson'\? There"):
        deqjax.get_solver("andersen")
    with pytest.raises(ValueError, match="did you mean 'memory'"):
        deqjax.get_solver("anderson", memry=3)
    with pytest.raises(ValueError, match="did you mean 'f_stop_mode'"):
        deqjax.DEQ.from_config({"stop_mode": "rel"})


def test_what_may_not_be_traced_is_explained():
    def layer(train, **options):
        run = inspect.unwrap(deqjax.DEQ.__call__)
        return run(deqjax.DEQ(), lambda z: 0.5 * z, jnp.zeros((1, 2)), train=train, solver_options=options).stats

    cases = (
        (lambda x: fixed_point(lambda z: 0.5 * z + x, jnp.zeros((1, 2))).stats.explain(), TypeError, "what they return"),
        (lambda x: layer(x > 0), ValueError, "train=.*static_argnames"),
        (lambda x: layer(True, f_max_iter=x.astype(int)), ValueError, "f_max_iter=.*not traced"),
    )
    for function, error, message in cases:
        with pytest.raises(error, match=message):
            jax.eval_shape(function, jnp.ones(()))


@pytest.mark.parametrize("sample_at", [(0,), (3, 1), (5,)])
@pytest.mark.parametrize("rule", [Implicit(), Unrolled()], ids=named)
def test_steps_that_a_solve_does_not_take_are_not_sampled(rule, sample_at):
    with pytest.raises(ValueError, match="max_steps=4"):
        fixed_point(lambda z: 0.5 * z, jnp.zeros((1, 2)), solver=Picard(max_steps=4), gradient=rule, sample_at=sample_at)


def test_a_budget_without_gradient_or_samples_is_refused():
    with pytest.raises(ValueError, match="max_steps=0"):
        Implicit(solver=Picard(max_steps=0))
    with pytest.raises(ValueError, match=r"max_steps=1.*2 or more"):
        fixed_point(lambda z: 0.5 * z, jnp.zeros((1, 2)), solver=Picard(max_steps=1), gradient=Reversible())
    for rule in (Implicit(), Unrolled()):
        with pytest.raises(ValueError, match="sample_at"):
            fixed_point(lambda z: 0.5 * z, jnp.zeros((1, 2)), solver=Picard(max_steps=0), gradient=rule, sample_at=(1,))
