"""Devices: one mesh for every run, and how batches are spread over it."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
    if shape.count(-1) == 1 and 0 not in shape:
        shape[shape.index(-1)] = max(len(devices) // -math.prod(shape), 1)
    if math.prod(shape) != len(devices) or min(shape) < 1:
        found = "is 1 device" if len(devices) == 1 else f"are {len(devices)} devices"
        asked = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh asks for {asked}, but there {found}: the sizes must multiply to that. "
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


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process feeds: `(part, parts)`.

    Processes whose devices hold the same rows, as where the axis model spans hosts, feed the same part.
    """
    rows: dict[int, set[int]] = {}
    for row, group in enumerate(mesh.devices.reshape(-1, mesh.shape["model"])):
        for device in group:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's share of a batch as global arrays: split on axis 0, scalars everywhere.

    Raises:
      UserError: the batch cannot be split evenly.
    """
    parts = process_share(mesh)[1]

    def place(name, array):
        array = np.asarray(array)
        if not array.ndim:
            return jax.make_array_from_process_local_data(replicated(mesh), array)
        rows = array.shape[0] * parts
        check_divisible(mesh, rows, f"The batch's {name!r}")
        return jax.make_array_from_process_local_data(batch_sharding(mesh), array, (rows, *array.shape[1:]))

    return {name: place(name, array) for name, array in batch.items()}


def place_whole(mesh: Mesh, batch: Mapping) -> dict[str, jax.Array]:
    """A batch that every process holds whole, as in evaluation: split on axis 0 where that is even, else on every device."""

    def place(array):
        array = np.asarray(array)
        even = array.ndim and array.shape[0] % batch_devices(mesh) == 0
        sharding = batch_sharding(mesh) if even else replicated(mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {name: place(array) for name, array in batch.items()}


def check_divisible(mesh: Mesh, rows: int, what: str, slices: int = 1) -> None:
    """Raises UserError unless so many rows fill `slices` batches over the mesh."""
    count = batch_devices(mesh)
    if rows % (count * slices):
        each = "" if slices == 1 else f", each in {slices} slices (config.accumulate)"
        raise UserError(
            f"{what} has {rows} rows, which {count} devices cannot share evenly{each}. Choose a batch size that is a multiple "
            f"of {count * slices}, or fewer devices in config.mesh.data and config.mesh.fsdp."
        )
