"""Points on a surface with normals: `.xyz` text files, one point a line."""

import pathlib
import warnings

import numpy as np

from deqjax.data.errors import DataError


def read_points(path) -> tuple[np.ndarray, np.ndarray]:
    """Points `[N, 3]` and unit normals `[N, 3]` from rows `x y z nx ny nz`, the points centred and scaled into -1 to 1.

    The scale is one for all axes (as published: the cloud's least and largest number become -1 and 1).

    Raises:
      DataError: there is no such file, or it holds anything else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file. It has a line `x y z nx ny nz` for every point of a surface; without one, "
            "configs/inr_sdf.py fits an exact shape."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is reported below
            rows = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path} is no text of numbers ({error}).") from error
    if rows.shape[0] < 1 or rows.shape[1] != 6:
        raise DataError(f"{path} has {rows.shape[0]} rows of {rows.shape[1]} numbers; rows of 6 are needed: x y z nx ny nz.")
    if not np.all(np.isfinite(rows)):
        raise DataError(f"{path} has numbers that are not finite.")
    points, normals = rows[:, :3] - rows[:, :3].mean(axis=0), rows[:, 3:]
    low, high = points.min(), points.max()
    points = 2 * (points - low) / ((high - low) or 1.0) - 1
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return points.astype(np.float32), normals.astype(np.float32)
