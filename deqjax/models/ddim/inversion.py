"""Model inversion: the latent whose sample is a given image, by gradient descent through the equilibrium."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deqjax.core.annotations import Array, Float
from deqjax.core.gradients import Gradient
from deqjax.core.implicit import Implicit
from deqjax.core.solvers import Solver, TriangularAnderson
from deqjax.models.ddim.joint import JointSystem, attach
from deqjax.models.ddim.parallel import solve_joint
from deqjax.models.ddim.samplers import sample_ddim


class InversionState(NamedTuple):
    """Where an optimisation of latents stands.

    Attributes:
      x_T: `[B, H, W, C]` the latents.
      optimizer: its state.
      trajectory: `[B, T, H, W, C]` of the latents before the last update: where the next solve begins.
      best_x_T, best_loss: the best latents so far, and their losses `[B]`.
      loss: `[B]` of the latents before the last update: squared error, summed over an image.
      calls, evaluations: of the network in the last update's sampling: in sequence, and images. Not its gradient's.
      failed_at: `[B]` see `JointSolution`.
    """

    x_T: jax.Array
    optimizer: Any
    trajectory: jax.Array
    best_x_T: jax.Array
    best_loss: jax.Array
    loss: jax.Array
    calls: jax.Array
    evaluations: jax.Array
    failed_at: jax.Array


def exact_gradient(system: JointSystem, tol: float = 1e-5) -> Implicit:
    """The implicit gradient. The adjoint system is triangular too, in reverse, so T + 1 evaluations always solve it."""
    # And one more sees that it is solved.
    return Implicit(solver=TriangularAnderson(max_steps=len(system.chain) + 2, tol=tol, reverse=True))


def one_step_gradient(
    system: JointSystem, image: Float[Array, "B H W C"], target: Float[Array, "B H W C"]
) -> Float[Array, "B H W C"]:
    """The gradient of |image - target|^2 with respect to the latent through one application of the map, in closed form.

    The last slot of F depends on the latent directly by a factor alone, and on the other slots, which are taken as constants,
    through the network: so no derivative of the network is in it (it is that of `Phantom(steps=1)`, without a pass backwards).
    Its direction is that of the error itself.
    """
    return 2 * jnp.asarray(system.gains[-1], image.dtype) * (image - target)


def sequential_gradient(
    system: JointSystem, x_T: Float[Array, "B H W C"], target: Float[Array, "B H W C"], noise: Float[Array, "B T H W C"] | None
):
    """Trajectory, failures, and the exact gradient of |image - target|^2 by backpropagation through the sequential sampler."""
    denoise = jax.checkpoint(system.denoise) if system.remat else system.denoise

    def loss(x_T):
        sampled = sample_ddim(denoise, system.chain, x_T, noise)
        return jnp.sum(jnp.square(sampled.image - target)), sampled

    gradient, sampled = jax.grad(loss, has_aux=True)(x_T)
    return sampled, gradient


def inversion(
    system: JointSystem,
    target: Float[Array, "B H W C"],
    noise: Float[Array, "B T H W C"] | None = None,
    *,
    gradient: str | Gradient = "one_step",
    optimizer: optax.GradientTransformation = optax.adam(0.005),
    solver: Solver = TriangularAnderson(max_steps=1000),
    window: int = 0,
    warm_start: bool = True,
) -> tuple[Callable[[jax.Array], InversionState], Callable[[InversionState], InversionState]]:
    """Finds latents of images by gradient descent; the images of a batch do not influence each other.

    Args:
      system: the chain and its network, which stay as they are.
      target: `[B, H, W, C]` images, from -1 to 1.
      noise: the noise of the chain, which is kept, where it has eta > 0.
      gradient: "one_step" (the free one in closed form), "implicit" (exact), any rule of the core, or "sequential" (exact, by
        the sequential sampler throughout).
      optimizer: of the latents.
      solver, window: of the equilibrium, see `solve_joint`.
      warm_start: begin each solve at the trajectory before.

    Returns:
      `init(x_T)`, and `update(state)`, to be compiled.

    Raises:
      ValueError: there is no such gradient, or the images are out of range.
    """
    if isinstance(gradient, str) and gradient not in ("one_step", "implicit", "sequential"):
        raise ValueError(f'gradient={gradient!r}: must be "one_step", "implicit", "sequential" or a rule of deqjax.')
    if not isinstance(target, jax.core.Tracer) and not np.max(np.abs(np.asarray(target))) <= 1 + 1e-3:
        raise ValueError("images to invert must be finite and within [-1, 1]: scale 8 bits by x / 127.5 - 1.")
    rule = exact_gradient(system) if gradient == "implicit" else gradient
    T = len(system.chain)

    def init(x_T):
        nothing = jnp.zeros_like(x_T[:, 0, 0, 0])
        trajectory = jnp.repeat(x_T[:, None], T, axis=1)
        zero, none = jnp.zeros((), jnp.int32), nothing.astype(jnp.int32) - 1
        infinite = nothing + jnp.inf
        return InversionState(x_T, optimizer.init(x_T), trajectory, x_T, infinite, infinite, zero, zero, none)

    def update(state: InversionState) -> InversionState:
        x_T = state.x_T
        if rule == "sequential":
            found, g = sequential_gradient(system, x_T, target, noise)
            calls = jnp.full_like(state.calls, T)
            evaluations = jnp.full_like(state.evaluations, T * x_T.shape[0])
        else:
            z_init = state.trajectory if warm_start else None
            found = solve_joint(system, x_T, noise, solver=solver, window=window, z_init=z_init)
            calls, evaluations = found.calls, found.evaluations
            if rule == "one_step":
                g = one_step_gradient(system, found.image, target)
            else:
                attached = lambda x_T: attach(system, x_T, noise, found.trajectory, rule)[:, -1]  # noqa: E731
                g = jax.grad(lambda x_T: jnp.sum(jnp.square(attached(x_T) - target)))(x_T)
        loss = jnp.sum(jnp.square(found.image - target), axis=(1, 2, 3))
        better = loss < state.best_loss
        changes, optimizer_state = optimizer.update(g, state.optimizer, x_T)
        return InversionState(
            x_T=optax.apply_updates(x_T, changes),
            optimizer=optimizer_state,
            trajectory=found.trajectory,
            # The latent that has this loss, not the one that the update makes of it.
            best_x_T=jnp.where(better[:, None, None, None], x_T, state.best_x_T),
            best_loss=jnp.minimum(loss, state.best_loss),
            loss=loss,
            calls=calls,
            evaluations=evaluations,
            failed_at=found.failed_at,
        )

    return init, update
