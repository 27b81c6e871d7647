"""The implicit graph layer: X = relu(W X A + B), with its solution as output.

Gu et al. 2020 (arXiv 2009.06211), equation 2 with phi = relu. Here states are node-major, Z = X^T `[N, m]`, in batches of
G graphs: Z = relu(A^T Z W^T + B^T).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Float
from deqjax.models.ignn.aggregation import Adjacency
from deqjax.models.ignn.config import IGNNConfig
from deqjax.models.ignn.projection import project_columns
from deqjax.nn.config import DEQConfig
from deqjax.nn.deq import DEQ, DEQOutput
from deqjax.nn.layers import NormalizedLinear
from deqjax.nn.normalization import spectral_norm

_HIGHEST = jax.lax.Precision.HIGHEST


class Injection(NamedTuple):
    """Everything that f depends on besides z."""

    kernel: jax.Array  # W^T within the ball: [m, m], or [G, m, m] where graphs have radii of their own
    b: jax.Array  # [G, N, m], zero on padding
    adjacency: Adjacency


class ProjectionOffset(nnx.Variable):
    """What earlier projections have moved the weight by: the stored weight is the parameter and this together."""


class ImplicitGraphLayer(nnx.Module):
    """From features `[G, N, p]` to equilibrium states `[G, N, m]`.

    Args:
      p, m: features in and out.
      config: kappa and variants.
      deq: solver, gradient and weight normalisation.
      rngs: the "params" stream draws the initial weights.
    """

    def __init__(self, p: int, m: int, config: IGNNConfig, deq: DEQConfig, rngs: nnx.Rngs):
        # As in the originals, m scales the initial weights of all three.
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) / m**0.5  # noqa: E731
        identity = lambda key, shape, dtype: config.kappa * jnp.eye(m, dtype=dtype)  # noqa: E731
        init = {"uniform": uniform, "identity": identity}[config.init_weight]
        new = lambda n_in, init=uniform: NormalizedLinear(n_in, m, config=deq, use_bias=False, init=init, rngs=rngs)  # noqa: E731
        self.config, self.deq = config, DEQ(deq)
        self.weight, self.omega_1 = new(m, init), new(p)
        self.omega_2 = new(p) if config.has_omega_2 else None
        self.offset = ProjectionOffset(jnp.zeros_like(self.weight.kernel[...])) if deq.norm_type == "none" else None
        if deq.norm_type == "spectral_norm":
            for linear in (self.weight, self.omega_1, self.omega_2):
                if linear is not None:
                    _warm_up(linear, config.init_power_iters)

    # Encode ----------------------------------------------------------------------------------------------------------

    def encode(
        self,
        x: Float[Array, "G N p"] | None,
        adjacency: Adjacency,
        mask: Float[Array, "G N 1"],
        radius: Float[Array, "..."],
        *,
        train: bool = False,
    ) -> Injection:
        """The injection of features x, zero on padding; None stands for the identity matrix of a single graph.

        Args:
          radius: spectral radius of |A|: one, or one per graph `[G]`.
          train: advance power iterations, and keep the projected weight.
        """
        kernel = self.projected_weight(radius, train=train)
        omega_1 = self.omega_1.effective(train=train).kernel
        if x is None:
            b = adjacency.aggregate(omega_1[None])
        elif omega_1.shape[0] < omega_1.shape[1]:
            # The aggregation is the expensive part: do it where there are fewer features.
            b = _times(adjacency.aggregate(x), omega_1)
        else:
            b = adjacency.aggregate(_times(x, omega_1))
        if self.omega_2 is not None:
            omega_2 = self.omega_2.effective(train=train).kernel
            b = b + (omega_2[None] if x is None else _times(x, omega_2))
        return Injection(kernel, b * mask, adjacency)

    def projected_weight(self, radius: Float[Array, "..."], *, train: bool = False) -> Float[Array, "... m m"]:
        """W^T projected onto |W|_inf <= kappa / radius; the gradient passes straight through.

        Without weight normalisation the projection replaces the stored weight, in training: gradient and optimiser go on
        from there. Evaluation leaves it alone.
        """
        stored = self.weight.effective(train=train).kernel
        if self.offset is not None:
            stored = stored + self.offset[...]
        ball = self.config.kappa / radius
        constant = jax.lax.stop_gradient(stored)
        constant = jnp.broadcast_to(constant, radius.shape + constant.shape)
        projected = project_columns(constant, ball)
        if train and self.offset is not None:
            # Of several graphs the smallest ball counts.
            smallest = projected if radius.ndim == 0 else project_columns(constant[0], jnp.min(ball))
            self.offset[...] += smallest - jax.lax.stop_gradient(stored)
        return stored + (projected - constant)

    # Solve -----------------------------------------------------------------------------------------------------------

    def cell(self, z: Float[Array, "G N m"], injection: Injection) -> Float[Array, "G N m"]:
        """One application of f."""
        return jax.nn.relu(injection.adjacency.aggregate(_times(z, injection.kernel)) + injection.b)

    def solve(self, injection: Injection, *, train: bool = False, solver_options=None) -> DEQOutput:
        """The equilibrium `[G, N, m]`, with a residual and a stop of its own for every graph."""
        z_init = jax.lax.stop_gradient(injection.b)
        if self.config.starts_from_zero:
            z_init = jnp.zeros_like(z_init)
        f = lambda z: self.cell(z, injection)  # noqa: E731
        if self.config.samples == "graphs":
            return self.deq(f, z_init, train=train, solver_options=solver_options)
        to_rows, back = lambda z: jnp.moveaxis(z, -1, 0), lambda z: jnp.moveaxis(z, 0, -1)
        out = self.deq(lambda z: to_rows(f(back(z))), to_rows(z_init), train=train, solver_options=solver_options)
        return out._replace(states=tuple(back(z) for z in out.states))


def _times(x, kernel):
    # Tensor cores would round to about 1e-3, far above any useful tolerance.
    return jnp.matmul(x, kernel if kernel.ndim == x.ndim else kernel[None], precision=_HIGHEST)


def _warm_up(linear: NormalizedLinear, n_iterations: int) -> None:
    """Brings the singular vectors near their limits, so that the first estimate of the norm is one."""
    _, u, v = spectral_norm(linear.kernel[...], linear.u[...], linear.v[...], n_power_iters=n_iterations)
    linear.u[...], linear.v[...] = u, v
