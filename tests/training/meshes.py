"""One training step of a task on a mesh, for comparison with the same step on one device."""

import jax
import numpy as np

from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import named_leaves
from deqjax.training.step import Program, prepare, step_function

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 2, 2)]


def mesh_of(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return make_mesh(dict(zip(("data", "fsdp", "model"), shape, strict=True)), devices)


def compiled_step(task, mesh) -> tuple[Program, jax.stages.Compiled, tuple]:
    """The task's program, its compiled step, and state and batch to call it with."""
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    # The same weights everywhere: computed on a mesh, initial scales differ in their last bit.
    one = mesh_of((1, 1, 1))
    state = prepare(task, task.config, one, place_batch(one, task.data("train").batch(0))).init()
    state = jax.tree.map(jax.device_put, state, program.shardings)
    update = jax.jit(step_function(task, task.config, program, 1), out_shardings=(program.shardings, None, None))
    return program, update.lower(state, batch).compile(), (state, batch)


def loss_and_gradient(task, mesh) -> dict[tuple, np.ndarray]:
    """The metrics of a step, its gradient, and the model's variables: the config must have sgd with momentum."""
    _, step, (state, batch) = compiled_step(task, mesh)
    after, sums, report = step(state, batch)
    # After one step the momentum is the gradient.
    everything = {"sums": sums, "norm": report["grad_norm"], "gradient": after.opt, "variables": after.variables}
    arrays = named_leaves(everything)
    return {path: np.asarray(x) for path, x in arrays.items() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)}
