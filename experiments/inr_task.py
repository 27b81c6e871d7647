"""What all implicit representations have in common: the model, its files, and values at any number of coordinates."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.correction import fixed_point_correction
from deqjax.core.stability import jacobian_loss
from deqjax.data.coordinates import coordinates, size
from deqjax.data.errors import DataError
from deqjax.interop.inr import export_inr, load_inr
from deqjax.interop.inr_file import read_signals, write_signals
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.inr import INRConfig, Signals, WarmStart, evaluation_bytes, has_equilibrium, representation, training_bytes
from deqjax.nn.config import DEQConfig
from deqjax.training.console import say
from deqjax.training.mesh import batch_devices, make_mesh, place_whole, replicated
from deqjax.training.metrics import vitals
from experiments import inr_pictures


class Fit(nnx.Module):
    """The networks of the signals and, if the recipe keeps any, the states that the next visit starts from."""

    def __init__(self, signals: Signals, warm: WarmStart | None):
        self.signals = signals
        self.warm = warm


class RepresentationTask:
    """The part of a task that does not depend on what is represented; subclasses say what the data and the loss are."""

    name = "deq_inr"
    modes = ("train", "eval", "export", "render")
    without_model = ("render",)
    weights_transfer = True
    # Slices change the order of sums alone, and a run chooses their number by its memory.
    free_to_change = ("data.dir", "export_path", "export_dtype", "render", "data.grid", "data.memory_gib", "accumulate")
    count = 1
    order = 1  # of the derivatives that training takes

    def __init__(self, config):
        """Reads nothing yet: a file of weights can be rendered where the signal itself is not at hand.

        Raises:
          ValueError: a setting is wrong.
        """
        self.config = config
        self.deq = DEQConfig.from_config(config.deq)
        self.deq.eval_budget()
        INRConfig(n_in=1, n_out=1, **config.model)  # what is wrong with it shows now
        if self.deq.sradius_mode and config.model.network != "deq":
            raise ValueError("deq.sradius_mode is of equilibria: model.network must be 'deq'.")
        for name, value, least in (
            ("data.batch_size", config.data.batch_size, 0),
            ("data.memory_gib", config.data.memory_gib, 1e-6),
            ("resolve_every", config.resolve_every, 0),
            ("render.scale", config.render.scale, 1e-3),
        ):
            if not least <= value < math.inf:  # NaN is refused, too
                raise ValueError(f"{name}={value}: must be a number, {least} or more.")
        if any(not isinstance(n, int) for n in config.render.shape):
            raise ValueError(f"render.shape={tuple(config.render.shape)}: must be whole numbers, one for each axis.")

    # Subclasses ------------------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> INRConfig:
        raise NotImplementedError

    def about(self) -> dict:
        """What coordinates and values mean, for the file of weights."""
        raise NotImplementedError

    # Model -----------------------------------------------------------------------------------------------------------

    def model(self, rngs: nnx.Rngs) -> Fit:
        architecture = self.architecture
        signals = Signals(lambda rngs: representation(architecture, self.deq, rngs), self.count, rngs)
        return Fit(signals, self.new_warm_start())

    def new_warm_start(self) -> WarmStart | None:
        return None

    def import_checkpoint(self, path: str, model: Fit) -> None:
        """The weights in a `.pth`, `.pt` or `.safetensors` state dict of TorchDEQ's zoo or of the original code."""
        if self.count > 1:
            raise DataError(f"{path}: a state dict holds one signal, but this config has {self.count}.")
        load_inr(model.signals.net, read_checkpoint(path))

    def export(self, model: Fit) -> str:
        """Writes the signal as weights, or a state dict under the zoo's names if the file ends in .safetensors or .pth."""
        path, signals = self.config.export_path, model.signals
        if path.endswith((".safetensors", ".pth", ".pt")):
            if self.count > 1:
                raise DataError(f"a state dict holds one signal, not {self.count}: give config.export_path another ending.")
            write_checkpoint(path, export_inr(signals.net))
            return f"Wrote a state dict to {path}."
        written = write_signals(path, signals, self.about(), self.config.export_dtype)
        return f"Wrote {path}: {written:,} bytes in {self.config.export_dtype}{self.compared(written, path)}."

    def compared(self, n_bytes: int, path: str) -> str:
        """The size beside that of the signal itself, and what rounding has cost."""
        return ""

    # Training --------------------------------------------------------------------------------------------------------

    def fit_into_memory(self, rows: int) -> None:
        """A batch that would not fit into memory is computed in slices (config.accumulate), which changes nothing else."""
        config = self.config
        memory = config.data.memory_gib * 2**30 * batch_devices(make_mesh(config.get("mesh")))
        needed = rows * self.count * self.order * training_bytes(self.architecture, self.deq)
        if config.accumulate == 1 and needed > memory:
            config.accumulate = 2 ** math.ceil(math.log2(needed / memory))
            say(
                f"{rows:,} coordinates would take about {needed / 2**30:.1f} GiB at once: the gradient is added up over "
                f"{config.accumulate} slices (config.data.memory_gib={config.data.memory_gib})."
            )

    def from_zero(self, net: nnx.Module, x: jax.Array, key: jax.Array, options: Mapping):
        """Values of the supervised states, last state, sums of statistics and Jacobian term of one signal, solved from zero."""
        if not has_equilibrium(net):
            values = net(x, train=True).values
            return values, (), {}, jnp.zeros((), values[-1].dtype)
        injection = net.encode(x, net.weights(train=True))
        return self.decoded(net, injection, net.solve(injection, train=True, solver_options=options), key)

    def decoded(self, net, injection, out, key):
        z = out.states[-1]
        jacobian = jacobian_term(self.deq, lambda z: net.cell(z, injection), z, key)
        return tuple(net.decode(state) for state in out.states), z, out.stats.sums(), jacobian

    def supervised(self, criterion: Callable, values, sums: Mapping, jacobian: jax.Array, total: jax.Array):
        """The loss, weighted over the supervised states, and the metrics.

        Args:
          criterion: of the values of one state, a mean over coordinates, summed over signals.
          values, sums, jacobian: see `from_zero`.
          total: over how many coordinates it is a mean.
        """
        error, each = fixed_point_correction(criterion, list(values), gamma=self.deq.gamma, return_values=True)
        metrics = {"loss": (each[-1] / self.count * total, total)}
        if sums:
            metrics |= vitals({name: jnp.sum(value) for name, value in sums.items()})
        if self.deq.jac_loss_weight:
            metrics["jacobian"] = (jnp.mean(jacobian), jnp.ones_like(total))
        return error + jnp.sum(jacobian), metrics

    # Values at any coordinates ---------------------------------------------------------------------------------------

    def chunk(self, rows: int) -> int:
        """How many coordinates are evaluated at once, out of so many, for the memory there is."""
        return chunk_rows(self.architecture, rows, make_mesh(self.config.get("mesh")), self.config.data.memory_gib, self.count)

    def render(self) -> str:
        """Draws what a file of weights holds, at `render.shape`, or at `render.scale` times its own resolution."""
        options = self.config.render
        networks, about = read_signals(self.config.export_path)
        own = tuple(about["shape"])
        shape = tuple(options.shape) or scaled_shape(own, options.scale, about["kind"])
        least = 2 if about["kind"] in ("occupancy", "sdf") else 1
        if len(shape) != len(own) or min(shape) < least:
            raise DataError(
                f"render.shape={shape}: this signal has {len(own)} axes, {own} samples of its own; {least} or more are needed "
                "along each."
            )
        mesh, written = make_mesh(self.config.get("mesh")), []
        for number, net in enumerate(networks):
            span = about.get("span", (-1.0, 1.0))
            values = values_on_grid(net, shape, about["order"], mesh, self.config.data.memory_gib, span)
            output = Path(options.output)
            if len(networks) > 1:
                output = output.with_name(f"{output.stem}-{number}{output.suffix}")
            rate = about["rate"] * shape[0] / own[0] if about["rate"] else 0
            written.append(str(inr_pictures.write_values(output, values, about["kind"], rate)))
        axes = " x ".join(map(str, shape))
        return f"Rendered {self.config.export_path} at {axes}: {', '.join(written[:3])}{', ...' if written[3:] else ''}."


def scaled_shape(shape, scale: float, kind: str) -> tuple[int, ...]:
    """The grid with so many times the samples along every axis; of a video, along those of its pictures."""
    kept = 1 if kind == "video" else 0
    return tuple(n if k < kept else max(round(n * scale), 1) for k, n in enumerate(shape))


def values_on_grid(net: nnx.Module, shape, order: str, mesh, memory_gib: float = 8.0, span=(-1.0, 1.0)) -> np.ndarray:
    """The values of one network on a regular grid over `span` along every axis, `[*shape, C]`, chunk by chunk."""
    total = size(shape)
    rows = chunk_rows(net.config, total, mesh, memory_gib)
    graph, state = nnx.split(net)
    parts = []
    for start, kept in chunks(total, rows):
        # In double precision, or the coordinates would not quite be those of training, which a sound's phases magnify.
        x = coordinates(np.arange(start, start + rows), shape, order).astype(np.float64)
        x = (span[0] + (x + 1) / 2 * (span[1] - span[0])).astype(np.float32)
        parts.append(np.asarray(_values(graph, mesh, state, place_whole(mesh, {"x": x})["x"]))[kept])
    return np.concatenate(parts).reshape(*shape, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(graph, mesh, state, x):
    """Compiled once for all networks of one architecture."""
    return jax.lax.with_sharding_constraint(nnx.merge(graph, state)(x).values[-1], replicated(mesh))


def chunk_rows(config: INRConfig, total: int, mesh, memory_gib: float, count: int = 1) -> int:
    """How many of so many coordinates to evaluate at once, in about an eighth of the memory of each device."""
    limit = int(memory_gib * 2**30 / 8 / (count * evaluation_bytes(config)))
    return min(total, max(limit, 1) * batch_devices(mesh))


def chunks(total: int, rows: int):
    """Starts of pieces of `rows` that cover `total`, and which of their rows are new: the last piece overlaps."""
    for start in range(0, total, rows):
        first = min(start, total - rows)
        yield first, slice(start - first, None)


def jacobian_term(deq: DEQConfig, f: Callable, z: jax.Array, key: jax.Array) -> jax.Array:
    """Weighted Jacobian loss at a state, present with the configured probability."""
    zero = jnp.zeros((), z.dtype)
    if deq.jac_loss_weight == 0 or deq.jac_loss_freq == 0:
        return zero
    key_probe, key_choice = jax.random.split(key)
    chosen = jax.random.bernoulli(key_choice, deq.jac_loss_freq)
    z = jax.lax.stop_gradient(z)
    return deq.jac_loss_weight * jax.lax.cond(chosen, lambda: jacobian_loss(f, z, key_probe), lambda: zero)


def psnr(squared_error: float | np.ndarray) -> np.ndarray:
    """-10 log10 of a mean squared error, for values whose peak is 1."""
    return -10 * np.log10(np.maximum(squared_error, 1e-30))
