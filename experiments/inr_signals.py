"""Signals on regular grids: pictures, sound and video, fitted at all samples or at some and tested at others."""

import functools
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.data.coordinates import coordinates, size
from deqjax.data.images import write_image
from deqjax.interop.inr_file import read_signals
from deqjax.models.inr import INRConfig, WarmStart
from deqjax.training.mesh import batch_devices, make_mesh, place_whole, process_share
from deqjax.training.metrics import Sums
from experiments import inr_pictures
from experiments.inr_data import KINDS, Signal, read
from experiments.inr_pictures import displayed
from experiments.inr_task import Fit, RepresentationTask, chunks, psnr, values_on_grid


class SignalTask(RepresentationTask):
    """What the training loop needs to know about fitting signals."""

    def __init__(self, config, signal: Signal | None = None):
        """Args:
        signal: instead of what the config names.
        """
        super().__init__(config)
        data = config.data
        if signal is None and not data.path and data.name not in KINDS[data.kind]:
            raise ValueError(f"data.name={data.name!r}: {data.kind} may be {', '.join(KINDS[data.kind])}, or give data.path.")
        for name, least in (("step", 1), ("count", 1), ("rate", 1), ("seconds", 0), ("frames", 0)):
            if not data[name] >= least:
                raise ValueError(f"data.{name}={data[name]}: must be {least} or more.")
        if config.warm_start_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f'warm_start_dtype={config.warm_start_dtype!r}: must be "float32", "bfloat16" or "float16".')
        if data.channels not in (0, 1, 3):
            raise ValueError(f"data.channels={data.channels}: must be 1 (grey), 3 (colour) or 0 (as the picture is).")
        if data.channels and data.kind == "audio":
            raise ValueError(f"data.channels={data.channels} is of pictures and video; of sound the mean of all is fitted.")
        if data.generalize and data.kind != "image":
            raise ValueError("data.generalize holds out pixels of pictures; data.kind must be 'image'.")
        if self.keeps_states:
            if self.deq.core == "indexing" or self.deq.indexing:
                raise ValueError("a step that begins warm has no solve to sample: deq.core='indexing' needs warm_start=False.")
            if self.deq.f_max_iter == 0:
                raise ValueError("deq.f_max_iter=0: the first visit to a coordinate needs a solve, or set warm_start=False.")
        self._given = signal
        self._evaluate_chunk = jax.jit(self._chunk_metrics, static_argnums=(0, 1))

    # Data ------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def signal(self) -> Signal:
        return self._given or read(self.config.data)

    @property
    def count(self) -> int:
        return self.signal.raw.shape[0]

    @property
    def architecture(self) -> INRConfig:
        return INRConfig(n_in=len(self.signal.shape), n_out=self.signal.raw.shape[-1], **self.config.model)

    @property
    def keeps_states(self) -> bool:
        """Whether training keeps the states of every coordinate; an explicit network has none."""
        return self.config.warm_start and self.config.model.network == "deq"

    @property
    def fingerprint(self) -> str:
        """Of the samples: a run goes on with the signal that it began with."""
        digest = hashlib.sha256(repr((self.signal.raw.shape, len(self.signal.train))).encode())
        return digest.update(np.ascontiguousarray(self.signal.raw)) or digest.hexdigest()

    @property
    def items_per_step(self):
        return ("samples", self.layout_of_batches[0] * self.count)

    def about(self) -> dict:
        signal = self.signal
        return {"kind": signal.kind, "shape": list(signal.shape), "order": signal.order, "rate": signal.rate}

    @functools.cached_property
    def layout_of_batches(self) -> tuple[int, int]:
        """Rows in a batch and number of batches in an epoch.

        Batches are filled up to a multiple of 8, or of a power of two that is up to a 128th of them: where the devices times
        the slices divide that, the rows are as many as on one device, and the states of a run fit where it goes on.
        """
        config, n, devices = self.config, len(self.signal.train), batch_devices(make_mesh(self.config.get("mesh")))
        rows = min(config.data.batch_size or n, n)
        self.fit_into_memory(rows)
        unit = math.lcm(max(8, 2 ** int(math.log2(max(rows / 128, 1)))), config.accumulate * devices)
        rows = -(-rows // unit) * unit
        return rows, -(-n // rows)

    def data(self, split: str) -> "SignalTask":
        return self

    def dealt(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Which sample is in which row of which batch, `[R, K]`, and the rows' weights: 0 of those that only fill up.

        Where states are kept the samples are dealt once, so that a batch meets its own again; else anew in every epoch.
        """
        return self._dealt(0 if self.keeps_states else epoch)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one task per process)
    def _dealt(self, epoch):
        (rows, blocks), train = self.layout_of_batches, self.signal.train
        if blocks > 1:
            train = np.random.default_rng((self.config.seed, epoch)).permutation(train)
        place = np.arange(rows * blocks)
        weight = (place < len(train)).astype(np.float32).reshape(blocks, rows).T
        return train[place % len(train)].reshape(blocks, rows).T, weight

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Training batch `step`: an epoch visits every batch of coordinates once, in an order of its own."""
        epoch, part = divmod(step, self.layout_of_batches[1])
        block = int(np.random.default_rng((self.config.seed, 1, epoch)).permutation(self.layout_of_batches[1])[part])
        index, weight = (array[:, block] for array in self.dealt(epoch))
        p, n = process_share(make_mesh(self.config.get("mesh")))
        return self.samples(*(np.split(array, n)[p] for array in (index, weight))) | {"block": np.int32(block)}

    def samples(self, index: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        signal = self.signal
        x = coordinates(index, signal.shape, signal.order)
        return {"x": x, "target": signal.values(index), "weight": weight}

    def new_warm_start(self) -> WarmStart | None:
        config = self.config
        if not self.keeps_states:
            return None
        rows, blocks = self.layout_of_batches
        dtype = jnp.dtype(config.warm_start_dtype)
        needed = rows * blocks * self.count * config.model.n_hidden * dtype.itemsize / 2**30
        allowed = config.data.memory_gib * batch_devices(make_mesh(config.get("mesh")))
        if needed > allowed:
            raise ValueError(
                f"the states of {rows * blocks:,} coordinates take {needed:.1f} GiB, more than there is (data.memory_gib): set "
                "warm_start=False, which solves from zero at every visit, or warm_start_dtype='bfloat16'."
            )
        return WarmStart(rows, blocks, self.count, config.model.n_hidden, dtype)

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: Fit, batch, key, step):
        """Mean squared error, weighted over the supervised states; of several signals the sum: gradients stay apart."""
        x, weight, warm = batch["x"], batch["weight"], model.warm
        target, total = jnp.moveaxis(batch["target"], 1, 0), jnp.sum(weight)
        keys = jax.random.split(key, self.count)
        options, moves = self.deq.training_options(step), {}
        if warm is None:
            values, states, sums, jacobian = model.signals.each(lambda net, key: self.from_zero(net, x, key, options), keys)
        else:
            z, known = warm.recall(batch["block"])
            if self.config.resolve_every:
                known = known & (step % self.config.resolve_every != 0)
            values, states, sums, jacobian = model.signals.each(
                lambda net, z, key: self._warm(net, x, z, known, key, options), z, keys
            )
            warm.remember(batch["block"], states)
            moved = jnp.sum(jnp.linalg.norm(states - z, axis=-1)) / states.shape[1]
            moves = {"warm/moved": (moved, jnp.asarray(self.count, moved.dtype))}

        def squared_error(values):
            # A slice of a batch may hold nothing but rows that fill up.
            return jnp.sum(jnp.mean(jnp.square(values - target), axis=-1) * weight[None]) / jnp.maximum(total, 1)

        loss, metrics = self.supervised(squared_error, values, sums, jacobian, total)
        return loss, metrics | moves

    def _warm(self, net, x, z, known, key, options):
        """As `from_zero`, but from the last visit's states; the solver runs only if they are not known."""
        injection = net.encode(x, net.weights(train=True))
        start, sums = net.start(injection, z, known, options)
        out = net.solve(injection, start, train=True, solver_options={**options, "f_max_iter": 0})
        values, states, _, jacobian = self.decoded(net, injection, out, key)
        return values, states, sums, jacobian

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: Fit, split: str) -> dict[str, float]:
        """PSNR of the signal as it is decoded from nothing, and how far that is from the states that training keeps.

        "valid" is on the samples that are trained on, "test" on those held out, or the same where there are none. Of several
        signals, and of the frames of a video, the mean and the standard deviation of their PSNRs; of sound, the signal-to-noise
        ratio too.
        """
        held_out = split == "test" and self.signal.test is not self.signal.train
        blocks = [(None, self.signal.test, np.ones(len(self.signal.test), np.float32))] if held_out else None
        if blocks is None:
            index, weight = self.dealt(0)
            blocks = [(k, index[:, k], weight[:, k]) for k in range(index.shape[1])]
        graph, state = nnx.split(model)
        mesh, sums, results = make_mesh(self.config.get("mesh")), Sums(), []
        for block, index, weight in blocks:
            rows = self.chunk(len(index))
            for start, kept in chunks(len(index), rows):
                chosen = slice(start, start + rows)
                new = np.zeros(rows, np.float32)
                new[kept] = 1
                batch = self.samples(index[chosen], weight[chosen] * new)
                batch["frame"] = self._frame(index[chosen])
                batch = place_whole(mesh, batch)
                results.append(self._evaluate_chunk(graph, block is not None, state, batch, start, block or 0))
        errors, maxima = {}, {}
        for squared, largest, metrics in jax.device_get(results):
            errors = {name: errors.get(name, 0) + np.asarray(value) for name, value in squared.items()}
            maxima = {name: max(maxima.get(name, 0.0), float(value)) for name, value in largest.items()}
            sums.add(metrics)
        report, means = {}, sums.means()
        if "warm/gap" not in means:
            maxima.pop("warm/gap_max", None)
        for name, (count, *signals) in errors.items():
            # Without states that training has left there is no quality of theirs.
            each = psnr(np.stack(signals)[:, count > 0] / count[count > 0])
            if each.size:
                report |= {name: float(np.mean(each))} | ({f"{name}_std": float(np.std(each))} if each.size > 1 else {})
        if self.signal.kind == "audio" and np.any(self.signal.raw):  # silence has no power to compare with
            report["snr"] = report["psnr"] - float(psnr(np.mean(np.square(self.signal.raw))))
        return report | means | maxima

    def _frame(self, index):
        """Which group of samples has a PSNR of its own: the frame of a video, else one for all."""
        per_frame = size(self.signal.shape[1:]) if self.signal.kind == "video" else size(self.signal.shape)
        return (index // per_frame).astype(np.int32)

    def _chunk_metrics(self, graph, has_states, state, batch, start, block):
        """Weights and, of every signal, squared errors of the frames, `[1 + S, F]`, maxima, and metrics."""
        model = nnx.merge(graph, state, copy=True)
        x, weight = batch["x"], batch["weight"]
        frames = self.signal.shape[0] if self.signal.kind == "video" else 1
        target = displayed(jnp.moveaxis(batch["target"], 1, 0), self.signal.kind)

        def per_frame(values, weight):
            error = jnp.mean(jnp.square(displayed(values, self.signal.kind) - target), axis=-1)
            summed = jnp.concatenate([weight[None], error * weight[None]])
            return jax.ops.segment_sum(summed.T, batch["frame"], frames).T

        def cold(net):
            out = net(x)
            return out.values[-1], out.states, out.stats, out.spectral_radius

        values, states, stats, radius = model.signals.each(cold)
        errors, maxima, metrics = {"psnr": per_frame(values, weight)}, {}, {}
        if stats is not None:
            counted = jnp.broadcast_to(weight[None], stats.steps.shape)
            mean = lambda x: (jnp.sum(x.astype(weight.dtype) * counted), jnp.sum(counted))  # noqa: E731
            metrics = {f"forward/{name}": mean(getattr(stats, name)) for name in ("steps", "converged")}
            finite = jnp.isfinite(stats.rel_lowest)
            metrics["forward/rel"] = mean(jnp.where(finite, stats.rel_lowest, 0))
            maxima["forward/steps_max"] = jnp.max(stats.steps * (counted > 0))
            if radius is not None:
                metrics["forward/spectral_radius"] = mean(radius)
        if has_states and model.warm is not None:
            z, known = model.warm.recall(block)
            # A model that was read without its training has no states, one early in its first epoch not all.
            counted = counted * known
            z = jax.lax.dynamic_slice_in_dim(z, start, x.shape[0], axis=1)
            options = {"f_max_iter": 0}
            step = lambda net, z: net(x, z_init=z, train=True, solver_options=options).values[-1]  # noqa: E731
            errors["psnr_warm"] = per_frame(model.signals.each(step, z), weight * known)
            apart = jnp.linalg.norm(states[-1] - z, axis=-1)
            maxima["warm/gap_max"] = jnp.max(apart * (counted > 0))
            metrics["warm/gap"] = mean(apart)
        return errors, maxima, metrics

    # What is written -------------------------------------------------------------------------------------------------

    def compared(self, n_bytes: int, path: str) -> str:
        """Bits per sample beside the raw signal's, and the PSNR of what the file renders."""
        signal, mesh = self.signal, make_mesh(self.config.get("mesh"))
        networks, about = read_signals(path)
        targets = signal.values(np.arange(size(signal.shape)))
        each = []
        for number, net in enumerate(networks):
            values = values_on_grid(net, signal.shape, about["order"], mesh, self.config.data.memory_gib)
            target = targets[:, number].reshape(values.shape)
            error = np.square(displayed(values, signal.kind) - displayed(target, signal.kind), dtype=np.float64)
            # As in evaluation: of a video the mean over its frames.
            error = error.reshape(signal.shape[0] if signal.kind == "video" else 1, -1)
            each.append(np.mean(psnr(np.mean(error, axis=1))))
        bits = 8 * n_bytes / (len(targets) * self.count)
        raw = 8 * min(signal.raw.itemsize, 2) * signal.raw.shape[-1]
        unit = {"image": "pixel", "video": "pixel"}.get(signal.kind, "sample")
        return f", {bits:.2f} bits per {unit} (the signal itself: {raw}), which renders at {np.mean(each):.2f} dB"

    def show(self, model: Fit, workdir: Path) -> None:
        """The reconstruction beside the original and their difference, and PSNR against steps, to `workdir`."""
        signal, mesh, kind = self.signal, make_mesh(self.config.get("mesh")), self.signal.kind
        for number in range(min(self.count, 8)):
            values = values_on_grid(model.signals.one(number), signal.shape, signal.order, mesh, self.config.data.memory_gib)
            if jax.process_index() != 0:  # which had its part in the values
                continue
            original, suffix = signal.whole(number), f"-{number}" if self.count > 1 else ""
            shown = displayed(values, kind)
            if kind == "image":
                write_image(workdir / f"reconstruction{suffix}.png", shown)
                write_image(workdir / f"comparison{suffix}.png", inr_pictures.comparison(original, shown))
            elif kind == "audio":
                inr_pictures.write_values(workdir / "reconstruction.wav", values, kind, signal.rate)
                inr_pictures.write_values(workdir / "original.wav", original, kind, signal.rate)
                inr_pictures.draw_waves(workdir / "comparison.png", original[:, 0], shown[:, 0], signal.rate)
            else:
                inr_pictures.write_values(workdir / "reconstruction.mp4", values, kind, signal.rate)
                sheets = (
                    inr_pictures.sheet(frames) for frames in (original, shown, np.clip(4 * np.abs(original - shown), 0, 1))
                )
                write_image(workdir / "comparison.png", np.concatenate(list(sheets), axis=0))
        if jax.process_index() == 0:
            inr_pictures.draw_curve(workdir, "psnr")
