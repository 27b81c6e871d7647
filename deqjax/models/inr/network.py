"""The implicit representation: encode, solve and decode, every coordinate a fixed-point problem of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deqjax.core.annotations import Array, Bool, Float
from deqjax.core.stats import SolverStats
from deqjax.models.inr.config import INRConfig
from deqjax.models.inr.filters import Filters
from deqjax.models.inr.sine import sin
from deqjax.nn.config import PLAIN, DEQConfig
from deqjax.nn.deq import DEQ, DEQOutput
from deqjax.nn.layers import LinearWeights, NormalizedLinear
from deqjax.nn.normalization import spectral_norm


class Injection(NamedTuple):
    """What the solve needs of the coordinates and weights."""

    shift: jax.Array  # [N, D], added to the state
    gates: tuple[jax.Array, ...]  # [N, D] of every layer
    layers: tuple[LinearWeights, ...]


class Output(NamedTuple):
    """What a representation makes of its coordinates."""

    values: tuple[jax.Array, ...]  # [N, C] of every supervised state, earliest first; one in evaluation
    states: tuple[jax.Array, ...]  # [N, D]; none of an explicit network
    stats: SolverStats | None  # of the solve, coordinate by coordinate
    spectral_radius: jax.Array | None  # [N], where it is asked for


class INR(nnx.Module):
    """A signal as the equilibrium of a filter network (Huang, Bai and Kolter 2021, "(Implicit)^2").

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from deqjax.models.inr import INR, INRConfig
      >>> from deqjax.nn.config import PLAIN, DEQConfig
      >>> config = INRConfig(n_in=2, n_out=3, n_hidden=16, input_scale=8.0)
      >>> model = INR(config, DEQConfig(grad=3), nnx.Rngs(0))
      >>> model(jnp.zeros((5, 2))).values[-1].shape
      (5, 3)

    Args:
      config: network "deq" or "one_pass".
      deq: solver, gradient, and the normalisation of the hidden weights.
      rngs: the "params" stream draws the initial weights.
    """

    def __init__(self, config: INRConfig, deq: DEQConfig, rngs: nnx.Rngs):
        D = config.n_hidden
        self.config = config
        self.filters = Filters(config, rngs)
        self.layers = nnx.List([linear(D, D, rngs, deq) for _ in range(config.n_layers)])
        self.output = linear(D, config.n_out, rngs)
        self.deq = DEQ(deq) if config.network == "deq" else None
        if deq.norm_type == "spectral_norm":
            for layer in self.layers:
                _warm_up(layer, config.init_power_iters)

    def __call__(
        self, x: Float[Array, "N d"], *, z_init: Float[Array, "N D"] | None = None, train: bool = False, solver_options=None
    ) -> Output:
        """The values at the coordinates x.

        Args:
          z_init: states to start from; zeros by default.
          train: supervised states with gradients as configured, and power iterations move on.
          solver_options: see `DEQ`.
        """
        return self.at(x, self.weights(train=train), z_init=z_init, train=train, solver_options=solver_options)

    def at(
        self,
        x: Float[Array, "N d"],
        weights: tuple[LinearWeights, ...],
        *,
        z_init: Float[Array, "N D"] | None = None,
        train: bool = False,
        solver_options=None,
    ) -> Output:
        """The same with hidden weights that are given: a function of x that changes nothing, to be differentiated."""
        injection = self.encode(x, weights)
        if self.deq is None:
            return Output((self.decode(self.cell(jnp.zeros_like(injection.shift), injection)),), (), None, None)
        out = self.solve(injection, z_init, train=train, solver_options=solver_options)
        return Output(tuple(self.decode(z) for z in out.states), out.states, out.stats, out.spectral_radius)

    # Encode ----------------------------------------------------------------------------------------------------------

    def weights(self, *, train: bool = False) -> tuple[LinearWeights, ...]:
        """The hidden weights to use in one forward pass; they do not depend on the coordinates."""
        return tuple(layer.effective(train=train) for layer in self.layers)

    def encode(self, x: Float[Array, "N d"], weights: tuple[LinearWeights, ...]) -> Injection:
        """The filters at the coordinates, with everything done to them that no state has a part in."""
        first, *gates = self.filters(x)
        if self.config.filter == "siren_like":
            # sin(W z + b + u): b joins u.
            gates = [gate + layer.bias[None] for gate, layer in zip(gates, weights, strict=True)]
            return Injection(sin(first), tuple(gates), tuple(LinearWeights(layer.kernel, None) for layer in weights))
        return Injection(first, tuple(gates), weights)

    # Solve -----------------------------------------------------------------------------------------------------------

    def cell(self, z: Float[Array, "N D"], injection: Injection) -> Float[Array, "N D"]:
        """One application of f: z + u_0, then sin(W z + b + u) or u (W z + b), layer after layer."""
        z = z + injection.shift
        for gate, layer in zip(injection.gates, injection.layers, strict=True):
            v = self._product(z, layer)
            z = sin(v + gate) if self.config.filter == "siren_like" else v * gate
        return z

    def _product(self, z, layer):
        if self.config.dtype is None:
            return layer(z)
        dtype = jnp.dtype(self.config.dtype)
        v = jnp.matmul(z.astype(dtype), layer.kernel.astype(dtype), preferred_element_type=z.dtype)
        return v if layer.bias is None else v + layer.bias[None]

    def solve(
        self, injection: Injection, z_init: Float[Array, "N D"] | None = None, *, train: bool = False, solver_options=None
    ) -> DEQOutput:
        """The equilibrium `[N, D]`, with a residual and a stop of its own for every coordinate."""
        z_init = jnp.zeros_like(injection.shift) if z_init is None else z_init
        return self.deq(lambda z: self.cell(z, injection), z_init, train=train, solver_options=solver_options)

    def start(
        self, injection: Injection, z: Float[Array, "N D"], known: Bool[Array, ""] | bool, solver_options=None
    ) -> tuple[Float[Array, "N D"], dict]:
        """Where a training step begins: at the states of the last one if they are known, else at the solution.

        Args:
          solver_options: of the solve, see `DEQ`, such as a tolerance that falls in the course of training.

        Returns:
          The states, without gradients, and the sums of the solve's statistics (zeros where there was none).
        """
        c = self.deq.config
        # Before the branches, so that no tangent of theirs exists.
        injection, z = jax.lax.stop_gradient((injection, z))

        def solved():
            budget = {"eval_f_max_iter": c.f_max_iter, "f_tol": c.f_tol}
            out = self.solve(injection, z, solver_options=budget | dict(solver_options or {}))
            return jax.lax.stop_gradient((out.states[-1], out.stats.sums()))

        sums = jax.eval_shape(lambda: solved()[1])
        skipped = lambda: (z, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums))  # noqa: E731
        return jax.lax.cond(known, skipped, solved)

    # Decode ----------------------------------------------------------------------------------------------------------

    def decode(self, z: Float[Array, "N D"]) -> Float[Array, "N C"]:
        """States to values."""
        return self.output.effective()(z)


def linear(n_in: int, n_out: int, rngs: nnx.Rngs, config: DEQConfig = PLAIN, bound: float | None = None) -> NormalizedLinear:
    """A linear layer with PyTorch's initial distribution, or its kernel uniform within another bound."""
    uniform = lambda bound: lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)  # noqa: E731
    layer = NormalizedLinear(n_in, n_out, config=config, init=uniform(n_in**-0.5 if bound is None else bound), rngs=rngs)
    layer.bias[...] = uniform(n_in**-0.5)(rngs.params(), (n_out,), jnp.float32)
    return layer


def _warm_up(layer: NormalizedLinear, n_iterations: int) -> None:
    """Brings the singular vectors near their limits, so that the first estimate of the norm is one."""
    _, u, v = spectral_norm(layer.kernel[...], layer.u[...], layer.v[...], n_power_iters=n_iterations)
    layer.u[...], layer.v[...] = u, v
