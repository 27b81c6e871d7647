"""Several processes as one run, on JAX's own distributed engine."""

import os

import jax
import numpy as np

from deqjax.training.errors import UserError


def connect(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins this process to the others (`jax.distributed.initialize`).

    What is None is taken from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, and else from what JAX
    finds by itself: SLURM, Open MPI, Kubernetes (GKE), Cloud TPU.

    Args:
      coordinator: `host:port` of the first process.
      processes: how many there are.
      index: which of them this is, from 0.

    Raises:
      UserError: they do not find each other.
    """

    def number(given, variable):
        text = os.environ.get(variable)
        return int(text) if given is None and text else given

    try:
        processes, index = number(processes, "JAX_NUM_PROCESSES"), number(index, "JAX_PROCESS_ID")
        jax.distributed.initialize(coordinator, processes, index)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes of the run did not find each other: {str(error).splitlines()[0]} Give each of them --coordinator "
            "HOST:PORT --num_processes N --process_id I, or start them under SLURM, Kubernetes or on Cloud TPU."
        ) from error


def agree(ok: bool) -> bool:
    """Whether it is so in every process; waits for them all."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
