"""Coordinates of the samples of signals on regular grids, each axis from -1 to 1, both ends included."""

import math
from collections.abc import Sequence

import numpy as np

# "ij": coordinates in the order of the axes (time, row, column). "xy": the published order of pictures, column then row.
ORDERS = ("ij", "xy")


def axis(n: int) -> np.ndarray:
    """n coordinates from -1 to 1; a single one is 0."""
    return (np.linspace(0, 1, n) * 2 - 1 if n > 1 else np.zeros(1)).astype(np.float32)


def coordinates(index: np.ndarray, shape: Sequence[int], order: str = "ij") -> np.ndarray:
    """Coordinates `[..., d]` of the samples with given numbers, counted row-major on a grid of d axes.

    Raises:
      ValueError: no such order.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: must be one of {', '.join(map(repr, ORDERS))}.")
    places = np.unravel_index(index, shape)
    columns = [axis(n)[place] for n, place in zip(shape, places, strict=True)]
    return np.stack(columns[::-1] if order == "xy" else columns, axis=-1)


def size(shape: Sequence[int]) -> int:
    """How many samples a grid has."""
    return math.prod(int(n) for n in shape)
