"""Where each array of a train state lives on the mesh.

Batch variables are split like the batch. A parameter, with its moments and its average, is split over `model` where the
task's layout says so, and over `fsdp` along the longest axis that is left.
"""

import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deqjax.core.naming import leaf_path
from deqjax.training.mesh import batch_sharding, check_divisible, replicated
from deqjax.training.state import TrainState, kinds_of_state

# (pattern, axis, units): where the pattern is found in the path of a parameter, its axis may be split over `model`, in as
# many parts as divide the units: attention heads, say, of which each has to stay whole.
Layout = Sequence[tuple[str, int, int]]


def state_shardings(mesh: Mesh, shapes: TrainState, layout: Layout = ()) -> TrainState:
    """The sharding of every array of a train state, given its shapes (with `nnx.Variable` objects in it)."""

    def place(kind, leaf):
        if kind != "row":
            return replicated(mesh)
        check_divisible(mesh, leaf.shape[0], "A memory of the model")
        return batch_sharding(mesh)

    everywhere = jax.tree.map(lambda _: replicated(mesh), shapes)
    return everywhere.replace(
        params=parameter_shardings(mesh, shapes.params, layout),
        ema=parameter_shardings(mesh, shapes.ema, layout),
        opt=parameter_shardings(mesh, shapes.opt, layout),
        variables=jax.tree.map(place, kinds_of_state(shapes.variables), shapes.variables),
    )


def parameter_shardings(mesh: Mesh, shapes, layout: Layout = (), *, gathered: bool = False):
    """The shardings of parameters, or of anything with an array per parameter such as an optimiser's state.

    Args:
      shapes: the tree; a leaf's path must contain its parameter's.
      layout: of the task.
      gathered: as during a step, when every device has all of a parameter but for its split over `model`.
    """

    def place(key_path, leaf):
        spec = parameter_spec(dict(mesh.shape), "/".join(leaf_path(key_path)), leaf.shape, layout)
        return NamedSharding(mesh, PartitionSpec(*(None if gathered and axis == "fsdp" else axis for axis in spec)))

    return jax.tree_util.tree_map_with_path(place, shapes)


def parameter_spec(sizes: dict[str, int], path: str, shape: tuple[int, ...], layout: Layout) -> PartitionSpec:
    """Mesh axes by axis of one array. What does not divide evenly is not split."""
    spec: list = [None] * len(shape)
    for pattern, axis, units in layout:
        if sizes["model"] > 1 and -len(shape) <= axis < len(shape) and re.search(pattern, path):
            if units % sizes["model"] == 0 and shape[axis] % sizes["model"] == 0:
                spec[axis] = "model"
            break
    free = [axis for axis, n in enumerate(shape) if spec[axis] is None and n and n % sizes["fsdp"] == 0]
    if sizes["fsdp"] > 1 and free:
        spec[max(free, key=shape.__getitem__)] = "fsdp"
    return PartitionSpec(*spec)
