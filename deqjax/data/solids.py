"""Solid shapes given by exact signed distances, negative inside, within the cube from -1 to 1."""

from collections.abc import Callable

import numpy as np

from deqjax.data.errors import DataError


def _sphere(p):
    return np.linalg.norm(p, axis=-1) - 0.6


def _box(p):
    outside = np.abs(p) - np.array([0.5, 0.4, 0.6])
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(np.max(outside, axis=-1), 0)


def _torus(p):
    ring = np.linalg.norm(p[..., :2], axis=-1) - 0.55
    return np.hypot(ring, p[..., 2]) - 0.22


def _capsule(p):
    along = np.clip(p[..., 2], -0.45, 0.45)
    return np.linalg.norm(p - along[..., None] * np.array([0, 0, 1.0]), axis=-1) - 0.25


def _snowman(p):
    """Two spheres; outside of both, the smaller distance is exact."""
    return np.minimum(np.linalg.norm(p - [0, 0, -0.3], axis=-1) - 0.5, np.linalg.norm(p - [0, 0, 0.45], axis=-1) - 0.3)


SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sphere": _sphere,
    "box": _box,
    "torus": _torus,
    "capsule": _capsule,
    "snowman": _snowman,
}


def signed_distance(name: str, points: np.ndarray) -> np.ndarray:
    """Signed distances `[...]` of points `[..., 3]`; inside the snowman's waist they are bounds, elsewhere exact.

    Raises:
      DataError: there is no such shape.
    """
    if name not in SHAPES:
        raise DataError(f"there is no shape called {name!r}. There are: {', '.join(SHAPES)}.")
    return SHAPES[name](np.asarray(points, np.float64))


def surface(name: str, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points `[count, 3]` on a surface, drawn near-evenly, and the outward unit normals there.

    Points are drawn in a thin shell, where the chance of each part of the surface is its area, and moved along the gradient of
    the distance onto it.
    """
    kept, found = [], 0
    while found < count:
        points = random.uniform(-1, 1, (16 * count + 64, 3))
        points = points[np.abs(signed_distance(name, points)) < 0.05]
        for _ in range(3):  # once where the gradient is constant along the way, more at edges
            points = points - signed_distance(name, points)[:, None] * gradient(name, points)
        # In a crease that points inwards there is no way onto the surface.
        points = points[np.abs(signed_distance(name, points)) < 1e-6]
        kept.append(points)
        found += len(points)
    points = np.concatenate(kept)[:count]
    return points.astype(np.float32), gradient(name, points).astype(np.float32)


def gradient(name: str, points: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Unit gradients of the distance, by central differences."""
    offsets = step * np.eye(3)
    slopes = [signed_distance(name, points + o) - signed_distance(name, points - o) for o in offsets]
    slopes = np.stack(slopes, axis=-1)
    return slopes / np.maximum(np.linalg.norm(slopes, axis=-1, keepdims=True), 1e-12)
