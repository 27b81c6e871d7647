"""Devices: one mesh for every run, and where each array of it lives."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deqjax.nn.variables import BatchVariable
from deqjax.training.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      sizes: of the axes data, fsdp and model; one may be -1 and takes what is left. Absent: data takes everything.
      devices: default all.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1, "fsdp": 1, "model": 1} if sizes is None else {axis: 1 for axis in AXES} | dict(sizes)
    if unknown := set(sizes) - set(AXES):
        raise UserError(f"config.mesh has axes {', '.join(AXES)}; it cannot have {', '.join(sorted(unknown))}.")
    shape = [int(sizes[axis]) for axis in AXES]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = max(len(devices) // -math.prod(shape), 1)
    if math.prod(shape) != len(devices) or min(shape) < 1:
        asked = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh asks for {asked}, but there are {len(devices)} devices: the sizes must multiply to that. "
            "Give one of them as -1 and it takes what is left."
        )
    # Auto is passed always: with explicit axes, gathers and loop carries in ordinary model code fail.
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over the devices that share a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Among how many devices a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share of a batch as global arrays: split on axis 0, scalars everywhere.

    Raises:
      UserError: the batch cannot be split evenly.
    """

    def place(name, array):
        array = np.asarray(array)
        sharding = batch_sharding(mesh) if array.ndim else replicated(mesh)
        rows = array.shape[0] * jax.process_count() if array.ndim else 0
        _check_divisible(mesh, rows, f"The batch's {name!r}", "batch size")
        return jax.make_array_from_process_local_data(sharding, array)

    return {name: place(name, array) for name, array in batch.items()}


def place_whole(mesh: Mesh, batch: Mapping) -> dict[str, jax.Array]:
    """A batch that every process holds whole, as in evaluation: split on axis 0 where that is even, else on every device."""

    def place(array):
        array = np.asarray(array)
        even = array.ndim and array.shape[0] % batch_devices(mesh) == 0
        sharding = batch_sharding(mesh) if even else replicated(mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {name: place(array) for name, array in batch.items()}


def state_shardings(mesh: Mesh, tree):
    """Where a train state lives: a `BatchVariable` like the batch, all else on every device.

    Args:
      tree: shapes, with `nnx.Variable` objects in it where there are any.
    """

    def place(node):
        split = isinstance(node, BatchVariable)

        def sharding(leaf):
            if not (split and leaf.ndim):
                return replicated(mesh)
            _check_divisible(mesh, leaf.shape[0], "A memory of the model", "batch size")
            return batch_sharding(mesh)

        return jax.tree.map(sharding, node)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _check_divisible(mesh, rows, what, setting):
    count = batch_devices(mesh)
    if rows % count:
        raise UserError(
            f"{what} has {rows} rows, which {count} devices cannot share evenly. Choose a {setting} that is a multiple of "
            f"{count}, or fewer devices in config.mesh.data and config.mesh.fsdp."
        )
