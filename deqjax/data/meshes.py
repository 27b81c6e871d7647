"""Triangle meshes: solids to learn, read with trimesh, and surfaces to look at."""

import pathlib

import numpy as np

from deqjax.data.errors import DataError


class Mesh:
    """A closed mesh, centred on the mean of its vertices and scaled into 0 to 1 (Huang et al. 2021)."""

    def __init__(self, path):
        """Raises:
        DataError: there is no such file, or it holds no closed mesh.
        ImportError: trimesh is not installed.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise DataError(f"{path}: there is no such mesh (.ply, .obj, .stl). configs/inr_occupancy.py fits an exact shape.")
        try:
            import trimesh
        except ImportError as error:
            raise ImportError('reading meshes needs trimesh: pip install "deqjax[mesh]"') from error
        try:
            mesh = trimesh.load(path, force="mesh")
        except Exception as error:  # of whatever reader the suffix chooses
            raise DataError(f"{path} is no mesh that can be read ({error}).") from error
        if not len(getattr(mesh, "faces", ())):
            raise DataError(f"{path} has no triangles.")
        if not mesh.is_watertight:
            raise DataError(f"{path} is not closed, so nothing is inside of it.")
        if not mesh.area > 0:
            raise DataError(f"{path} has no surface: its triangles have no area.")
        vertices = mesh.vertices - mesh.vertices.mean(axis=0)
        mesh.vertices = (vertices / np.abs(vertices).max() + 1) / 2
        self._mesh = mesh

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Its least and largest coordinates, with a margin."""
        return self._mesh.vertices.min(axis=0) - 1e-3, self._mesh.vertices.max(axis=0) + 1e-3

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Whether points `[N, 3]` lie inside."""
        return np.asarray(self._mesh.contains(points))

    def surface(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Points `[count, 3]` on it, drawn evenly."""
        triangles = self._mesh.triangles
        chosen = triangles[random.choice(len(triangles), count, p=self._mesh.area_faces / self._mesh.area)]
        a, b = np.sqrt(random.random((count, 1))), random.random((count, 1))
        return (1 - a) * chosen[:, 0] + a * (1 - b) * chosen[:, 1] + a * b * chosen[:, 2]


def write_mesh(path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Writes triangles as a binary PLY file."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), [("n", "u1"), ("index", "<i4", 3)])
    rows["n"], rows["index"] = 3, faces
    pathlib.Path(path).write_bytes(header.encode() + np.asarray(vertices, "<f4").tobytes() + rows.tobytes())


def level_set(values: np.ndarray, level: float = 0.0) -> tuple[np.ndarray, np.ndarray] | None:
    """Vertices (from -1 to 1) and faces of the surface where values `[X, Y, Z]` on the cube cross a level; None if nowhere."""
    if not values.min() < level < values.max():
        return None
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise ImportError('meshes are drawn by scikit-image: pip install "deqjax[vision]"') from error
    vertices, faces, _, _ = marching_cubes(np.asarray(values, np.float32), level)
    return vertices / (np.array(values.shape) - 1) * 2 - 1, faces
