"""Pictures are drawn from statistics."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from deqjax import OneStep, Picard, Reversible, fixed_point
from deqjax.core.solve import solve
from deqjax.viz import plot_convergence
from experiments.pyplot import pyplot

matplotlib.use("Agg")


@pytest.mark.parametrize("samples", [3, 40])
def test_residuals_are_drawn_until_each_sample_ends(samples, tmp_path):
    rates = jnp.linspace(0.1, 0.9, samples)
    stats = fixed_point(lambda z: rates[:, None] * z + 1, jnp.zeros((samples, 2)), solver=Picard(max_steps=30)).stats
    ax = plot_convergence(stats, tol=1e-3)
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "evaluations of f"
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(lines) == (samples if samples == 3 else 1)
    if samples == 3:
        drawn = [np.isfinite(line.get_ydata()).sum() for line in lines]
        np.testing.assert_array_equal(drawn, stats.steps)
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_samples_of_many_solves_are_drawn_as_those_of_one():
    run = lambda x: fixed_point(lambda z: 0.5 * z + x, jnp.zeros((2, 4)), solver=Picard(max_steps=5))
    assert len(plot_convergence(jax.vmap(run)(jnp.ones(3)).stats).lines) == 6


def test_what_is_drawn_is_what_was_measured():
    """A solve without monitoring measures at its end, a reversible one at every evaluation; what is infinite is left out."""
    run = lambda rule=OneStep(), n=1, **options: fixed_point(
        lambda z: 0.5 * z + 1, jnp.zeros((n, 2)), solver=Picard(max_steps=9, **options), gradient=rule
    )
    assert list(plot_convergence(run(monitor=False).stats).lines[0].get_xdata()) == [9]
    stats = run(Reversible(), tol=0.3).stats
    assert 2 < stats.steps[0] < 8
    assert np.isfinite(plot_convergence(stats).lines[0].get_ydata()).sum() == stats.steps[0]
    many = run(n=30).stats
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_convergence(dataclasses.replace(many, rel_trace=many.rel_trace.at[3].set(jnp.inf)))


def test_what_cannot_be_drawn_is_explained():
    stats = fixed_point(lambda z: z, jnp.zeros((2, 2)), solver=Picard(max_steps=3)).stats
    with pytest.raises(ValueError, match="mode='both'"):
        plot_convergence(stats, mode="both")
    for n, steps, message in ((0, 3, "of no samples"), (2, 0, "took no steps")):
        stats = fixed_point(lambda z: z, jnp.zeros((n, 2)), solver=Picard(max_steps=steps)).stats
        with pytest.raises(ValueError, match=message):
            plot_convergence(stats)
    with pytest.raises(ValueError, match="took no steps"):
        plot_convergence(solve(lambda z: z, jnp.zeros((2, 2)), Picard(max_steps=3), limit=0).stats)
    stats = fixed_point(lambda z: z, jnp.full((13, 2), jnp.nan), solver=Picard(max_steps=3)).stats
    with pytest.raises(ValueError, match="no residual of these statistics is finite"):
        plot_convergence(stats)


@pytest.mark.parametrize("chosen, kept", [("module://matplotlib.backends.backend_svg", True), ("svg", False)])
def test_the_experiments_pictures_leave_a_notebooks_backend_alone(chosen, kept, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", chosen)
    matplotlib.use(chosen)
    try:
        pyplot()
        assert matplotlib.get_backend() == (chosen if kept else "agg")
    finally:
        matplotlib.use("agg")
