"""Solids as networks: whether a point is inside, or how far from the surface it is."""

import functools
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax.data.meshes import Mesh, level_set, write_mesh
from deqjax.data.point_clouds import read_points
from deqjax.data.solids import SHAPES, signed_distance, surface
from deqjax.models.inr import INR, INRConfig, Output
from deqjax.training.mesh import batch_devices, make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums, vitals
from experiments import inr_pictures
from experiments.inr_task import Fit, RepresentationTask, chunks, values_on_grid

# The published shapes, which are downloaded by hand.
MESHES = ("dragon", "bunny", "buddha", "armadillo", "lucy")
CLOUDS = ("thai_statue", "room")


class ShapeTask(RepresentationTask):
    """Points are drawn anew at every step, so that there are no states to begin with: every solve starts from zero."""

    published: tuple[str, ...] = ()

    def __init__(self, config):
        super().__init__(config)
        data = config.data
        if not data.path and data.name not in (*SHAPES, *self.published):
            known = ", ".join((*SHAPES, *self.published))
            raise ValueError(f"data.name={data.name!r}: must be one of {known}, or give data.path.")
        if config.warm_start:
            raise ValueError("warm_start=True, but points of a shape are never visited twice: set it to False.")
        for name, least in (("batch_size", 1), ("eval_points", 1), ("grid", 2)):
            if data[name] < least:
                raise ValueError(f"data.{name}={data[name]}: must be {least} or more.")
        self._evaluate_chunk = jax.jit(self._chunk_metrics, static_argnums=0)
        self._tests: dict[str, dict] = {}

    @property
    def items_per_step(self):
        return ("points", self.rows)

    @functools.cached_property
    def rows(self) -> int:
        """Points in a batch, as many as the devices share evenly."""
        self.fit_into_memory(self.config.data.batch_size)
        unit = self.config.accumulate * batch_devices(make_mesh(self.config.get("mesh")))
        return -(-self.config.data.batch_size // unit) * unit

    @property
    def exact(self) -> bool:
        """Whether the shape is one whose distances are known."""
        return not self.config.data.path and self.config.data.name in SHAPES

    @property
    def path(self) -> str:
        """Of the file to read."""
        data = self.config.data
        return data.path or str(Path(data.dir) / f"{data.name}{self.suffix}")

    @property
    def fingerprint(self) -> str:
        """Of the shape: a run goes on with the one that it began with."""
        if self.exact:
            return self.config.data.name
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def architecture(self) -> INRConfig:
        return INRConfig(n_in=3, n_out=1, **self.config.model)

    def about(self) -> dict:
        shape = [self.config.data.grid] * 3
        return {"kind": self.config.data.kind, "shape": shape, "order": "ij", "rate": 0, "span": list(self.span)}

    @property
    def span(self) -> tuple[float, float]:
        return -1.0, 1.0

    def data(self, split: str) -> "ShapeTask":
        self.points(np.random.default_rng(0), 1)  # a file that cannot be read shows now
        return self

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Training batch `step`."""
        batch = self.points(np.random.default_rng((self.config.seed, step)), self.rows)
        p, n = process_share(make_mesh(self.config.get("mesh")))
        return {name: np.split(array, n)[p] for name, array in batch.items()}

    def evaluate(self, model: Fit, split: str) -> dict[str, float]:
        """Metrics at points that training has not seen, the same at every evaluation."""
        if split not in self._tests:  # which side of a mesh a point is on takes long to find out
            random = np.random.default_rng((self.config.seed, 1 if split == "valid" else 2, 2**32))
            self._tests[split] = self.test_points(random)
        graph, state = nnx.split(model)
        mesh, report = make_mesh(self.config.get("mesh")), {}
        for name, batch in self._tests[split].items():
            sums, total = Sums(), len(batch["x"])
            rows, results = self.chunk(total), []
            for start, kept in chunks(total, rows):
                part = {key: array[start : start + rows] for key, array in batch.items()}
                part["new"] = np.zeros(rows, np.float32)
                part["new"][kept] = 1
                results.append(self._evaluate_chunk(graph, state, place_whole(mesh, part)))
            for metrics in results:
                sums.add(metrics)
            report |= {f"{name}{metric}": value for metric, value in self.summary(sums.means()).items()}
        return report

    def show(self, model: Fit, workdir: Path) -> None:
        """Slices through the function, its surface as a mesh, and the metric against steps, to `workdir`."""
        data, mesh = self.config.data, make_mesh(self.config.get("mesh"))
        values = values_on_grid(model.signals.net, (data.grid,) * 3, "ij", mesh, data.memory_gib, self.span)[..., 0]
        if jax.process_index() != 0:  # which had its part in the values
            return
        inr_pictures.draw_slices(workdir / "slices.png", values)
        found = level_set(values)
        if found is not None:
            write_mesh(workdir / "surface.ply", *found)
        inr_pictures.draw_curve(workdir, self.config.best_metric)


class OccupancyTask(ShapeTask):
    """The logit that a point is inside (Mescheder et al. 2019)."""

    published, suffix = MESHES, ".ply"

    @functools.cached_property
    def mesh(self) -> Mesh:
        return Mesh(self.path)

    @property
    def span(self) -> tuple[float, float]:
        return (-1.0, 1.0) if self.exact else (0.0, 1.0)

    def points(self, random, count: int) -> dict[str, np.ndarray]:
        """Points drawn evenly from the box around the shape, and whether they are inside."""
        low, high = self.span if self.exact else self.mesh.box
        x = random.uniform(low, high, (count, 3)).astype(np.float32)
        return {"x": x, "inside": self._inside(x)}

    def test_points(self, random) -> dict[str, dict]:
        """Easy points, drawn evenly, and hard ones, a thousandth beside the surface."""
        count = self.config.data.eval_points
        near = surface(self.config.data.name, count, random)[0] if self.exact else self.mesh.surface(count, random)
        near = (near + random.normal(0, 1e-3, near.shape)).astype(np.float32)
        return {"": self.points(random, count), "hard/": {"x": near, "inside": self._inside(near)}}

    def _inside(self, x):
        inside = signed_distance(self.config.data.name, x) < 0 if self.exact else self.mesh.inside(x)
        return inside.astype(np.float32)

    def loss(self, model: Fit, batch, key, step):
        """Mean binary cross entropy."""
        x, inside = batch["x"], batch["inside"]
        values, _, sums, jacobian = self.from_zero(model.signals.net, x, key, self.deq.training_options(step))
        criterion = lambda values: jnp.mean(optax.sigmoid_binary_cross_entropy(values[:, 0], inside))  # noqa: E731
        return self.supervised(criterion, values, sums, jacobian, jnp.asarray(len(x), values[-1].dtype))

    def _chunk_metrics(self, graph, state, batch):
        new, inside = batch["new"], batch["inside"]
        out = nnx.merge(graph, state).signals.net(batch["x"])
        logits = out.values[-1][:, 0]
        said, count = (logits > 0).astype(new.dtype), jnp.sum(new)
        over = lambda x: (jnp.sum(x * new), count)  # noqa: E731
        losses = optax.sigmoid_binary_cross_entropy(logits, inside)
        metrics = {"loss": over(losses), "hit": over(said * inside), "said": over(said), "true": over(inside)}
        return metrics | {"same": over(said == inside)} | measured(out)

    def summary(self, means: dict) -> dict[str, float]:
        """Accuracy, precision, recall and intersection over union."""
        hit, said, true = means.pop("hit"), means.pop("said"), means.pop("true")
        ratio = lambda a, b: a / b if b else 0.0  # noqa: E731
        report = {"loss": means.pop("loss"), "iou": ratio(hit, said + true - hit), "accuracy": means.pop("same")}
        return report | {"precision": ratio(hit, said), "recall": ratio(hit, true)} | means


class SDFTask(ShapeTask):
    """The signed distance to a surface, from its points and normals and the eikonal equation (Sitzmann et al. 2020)."""

    published, suffix = CLOUDS, ".xyz"
    order = 2

    def __init__(self, config):
        super().__init__(config)
        if config.model.network == "deq" and not (self.deq.ift or self.deq.hook_ift):
            raise ValueError(
                "the loss of signed distances differentiates slopes of the equilibrium, which only the implicit gradient gives "
                "exactly: set deq.hook_ift=True."
            )
        if config.model.network == "deq" and (self.deq.n_supervised > 1 or self.deq.jac_loss_weight):
            raise ValueError(
                "the loss of signed distances is of one state, without a Jacobian term: set deq.n_states=1, deq.sup_gap=-1 and "
                "deq.jac_loss_weight=0."
            )

    @functools.cached_property
    def cloud(self) -> tuple[np.ndarray, np.ndarray]:
        return read_points(self.path)

    def on_surface(self, random, count):
        """Points of the surface and its normals there."""
        if self.exact:
            return surface(self.config.data.name, count, random)
        points, normals = self.cloud
        chosen = random.integers(len(points), size=count)
        return points[chosen], normals[chosen]

    def points(self, random, count: int) -> dict[str, np.ndarray]:
        """Points on the surface, with normals, in even rows; in odd rows points of the cube, whose normal is -1 -1 -1."""
        half = -(-count // 2)
        x = np.empty((2 * half, 3), np.float32)
        normals = np.full_like(x, -1)
        x[::2], normals[::2] = self.on_surface(random, half)
        x[1::2] = random.uniform(-1, 1, (half, 3))
        return {"x": x[:count], "normals": normals[:count], "on": (np.arange(count) % 2 == 0)}

    def test_points(self, random) -> dict[str, dict]:
        points = self.points(random, 2 * self.config.data.eval_points)
        if self.exact:
            points["distance"] = signed_distance(self.config.data.name, points["x"]).astype(np.float32)
        return {"": points}

    def loss(self, model: Fit, batch, key, step):
        """The four terms of `sdf_loss`."""
        options = self.deq.training_options(step)
        terms, _, _, out = sdf_loss(model.signals.net, batch["x"], batch["normals"], batch["on"], options)
        total = sum(terms.values())
        count = jnp.asarray(batch["x"].shape[0], total.dtype)
        metrics = {f"loss/{name}": (value * count, count) for name, value in terms.items()}
        return total, {"loss": (total * count, count), **metrics, **measured(out)}

    def _chunk_metrics(self, graph, state, batch):
        net, new, on = nnx.merge(graph, state).signals.net, batch["new"], batch["on"].astype(jnp.float32)
        values, slopes, out = values_and_slopes(net, batch["x"], train=False)
        length = jnp.linalg.norm(slopes, axis=-1)
        cosine = jnp.clip(jnp.sum(slopes * batch["normals"], axis=-1) / jnp.maximum(length, 1e-12), -1, 1)
        over = lambda x, chosen: (jnp.sum(x * chosen * new), jnp.sum(chosen * new))  # noqa: E731
        metrics = {
            "surface": over(jnp.square(values[:, 0]), on),
            "angle": over(jnp.degrees(jnp.arccos(cosine)), on),
            "eikonal": over(jnp.abs(length - 1), 1 - on),
        }
        if "distance" in batch:
            metrics["distance_error"] = over(jnp.abs(values[:, 0] - batch["distance"]), 1 - on)
        return metrics | measured(out)

    def summary(self, means: dict) -> dict[str, float]:
        """Root mean square of the distance on the surface; mean angle to the normals, in degrees; | |slope| - 1 | off it."""
        return {"surface_rmse": means.pop("surface") ** 0.5, "normal_angle": means.pop("angle")} | means


def sdf_loss(net: nnx.Module, x, normals, on_surface, solver_options=None):
    """The loss of a signed distance, every mean over all points (Sitzmann et al. 2020, equation 6 and its weights).

    The slopes are derivatives of the equilibrium in its coordinates; the gradient of this loss is their exact derivative.

    Args:
      net: from coordinates `[N, 3]` to values `[N, 1]`.
      x, normals: `[N, 3]`; normals count on the surface only.
      on_surface: `[N]` booleans.

    Returns:
      The four terms by name, values `[N, 1]`, slopes `[N, 3]`, and the network's output.
    """
    values, slopes, out = values_and_slopes(net, x, train=True, solver_options=solver_options)
    distance, length = values[:, 0], safe_norm(slopes)
    cosine = jnp.sum(slopes * normals, axis=-1) / jnp.maximum(length * safe_norm(normals), 1e-8)
    terms = {
        "surface": 3e3 * jnp.mean(jnp.where(on_surface, jnp.abs(distance), 0)),
        "off_surface": 1e2 * jnp.mean(jnp.where(on_surface, 0, jnp.exp(-1e2 * jnp.abs(distance)))),
        "normals": 1e2 * jnp.mean(jnp.where(on_surface, 1 - cosine, 0)),
        "eikonal": 5e1 * jnp.mean(jnp.abs(length - 1)),
    }
    return terms, values, slopes, out


def values_and_slopes(net: nnx.Module, x, *, train: bool, solver_options=None) -> tuple[jax.Array, jax.Array, Output]:
    """Values `[N, 1]`, their derivatives in the coordinates `[N, d]`, and the output they come from."""
    # What a forward pass changes in the network, it changes before differentiation begins.
    weights = net.weights(train=train) if isinstance(net, INR) else None

    def of(x):
        out = net(x) if weights is None else net.at(x, weights, train=train, solver_options=solver_options)
        return out.values[-1], out

    values, pullback, out = jax.vjp(of, x, has_aux=True)
    (slopes,) = pullback(jnp.ones_like(values))
    return values, slopes, out


def safe_norm(x):
    """Lengths along the last axis, with a gradient of zero where they are zero."""
    squares = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def measured(out: Output) -> dict:
    """How the solves went, where there were any."""
    return {} if out.stats is None else vitals(out.stats.sums())
