"""Optical flow with deep equilibrium models.

    python -m experiments.deq_flow --config configs/flow_warped_photos.py
    python -m experiments.deq_flow --config configs/flow_things.py --config.init_from=runs/flow_chairs

    python -m experiments.deq_flow --config configs/flow_warped_photos.py --mode viz --config.viz.input=clip.mp4

Modes: train (and resume); eval (EPE, 1, 3 and 5 px, F1-all on the sets in `config.evaluate`); submit (the files for a server of
`config.submit`); viz (colours and warp errors of two frames, a folder or a video, `config.viz`; without input, samples of the
first set in `config.evaluate`, and residual and EPE against solver steps); export (the weights as a PyTorch state dict, to
`config.export_path`). `config.init_from` takes another run or such a file.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core.correction import correction_weights
from deqjax.core.naming import did_you_mean
from deqjax.data.errors import DataError
from deqjax.interop.flow import export_flow, load_flow
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.flow import DEQFlow, FlowConfig, pad, padding_of, unpad
from deqjax.models.flow.upsampling import SCALE
from deqjax.nn.config import DEQConfig
from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.metrics import vitals
from experiments.flow_data import EVALUATIONS, OFFLINE, STAGES, evaluation_set, training_mix
from experiments.flow_evaluation import estimator, evaluate_set, submit
from experiments.flow_metrics import WITHIN, masked_l1, scores
from experiments.flow_pictures import draw_convergence, draw_frames, draw_samples
from experiments.image_batches import chosen_rows, training_stream


class FlowTask:
    """What the training loop needs to know about optical flow."""

    name = "deq_flow"
    modes = ("train", "eval", "submit", "viz", "export")
    # Not `evaluate`: by its first set weights are chosen.
    free_to_change = (
        "data.dir",
        "data.threads",
        "data.ahead",
        "submit",
        "viz",
        "export_path",
        "warm_start",
        "fixed_point_reuse",
    )

    def __init__(self, config):
        """Reads nothing yet but the settings.

        Raises:
          ValueError: a setting is wrong.
        """
        self.config = config
        _check_settings(config)
        self.deq = DEQConfig.from_config(config.deq)
        self.deq.eval_budget()
        self.architecture = FlowConfig(**config.model)
        self.items_per_step = ("pairs", config.data.batch_size)

    def model(self, rngs: nnx.Rngs) -> DEQFlow:
        return DEQFlow(self.architecture, self.deq, rngs)

    def data(self, split: str):
        """Batches of training pairs, made by threads.

        Raises:
          DataError: a set to train or to evaluate on is missing, or there are too few pairs.
        """
        mix = training_mix(self.config.data)
        for name in self.config.evaluate:
            try:
                evaluation_set(name, self.config.data)
            except DataError as error:
                # Rather now than at the first evaluation.
                raise DataError(f"config.evaluate names {name}, but: {error}") from error
        if len(mix) < self.config.data.batch_size:
            raise DataError(f"data.batch_size={self.config.data.batch_size}, but there are {len(mix)} pairs to train on.")

        def jobs(step):
            numbers, seeds = chosen_rows(self.config, len(mix), step)
            return [functools.partial(mix.sample, int(n), seed) for n, seed in zip(numbers, seeds, strict=True)]

        return training_stream(self.config, jobs)

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: DEQFlow, batch, key, step):
        """Weighted sum over states of the mean |flow - truth|, with the scores of the last state."""
        key_noise, key_dropout = jax.random.split(key)
        image1, image2 = (batch[name] for name in ("image1", "image2"))
        if self.config.noise:
            image1, image2 = noisy(image1, image2, key_noise)
        freeze = self.config.freeze_batch_norm
        injection = model.encode(image1, image2, train=True, freeze=freeze, key=key_dropout)
        out = model.solve(injection, train=True, solver_options=self.deq.training_options(step))
        truth, valid = batch["flow"], batch["valid"]
        predictions = [model.decode(z) for z in out.states]
        values = [masked_l1(flow, truth, valid) for flow in predictions]
        weights = correction_weights(len(values), gamma=self.deq.gamma)
        total = sum(weight * value for weight, value in zip(weights, values, strict=True))
        count = jnp.asarray(len(image1), total.dtype)
        metrics = {"loss": (total * count, count), "loss_last": (values[-1] * count, count)}
        return total, metrics | scores(predictions[-1], truth, valid) | vitals(out.stats.sums())

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: DEQFlow, split: str = "valid") -> dict[str, float]:
        """Scores of every set in `config.evaluate`; of the first one under their bare names. There is no test split."""
        if split != "valid":
            return {}
        result = {}
        for name in self.config.evaluate:
            of_set = evaluate_set(evaluation_set(name, self.config.data), self._estimator(model, name), **self._video)
            result |= {f"{name}/{score}": value for score, value in of_set.items()} if result else of_set
        return result

    def report(self, model: DEQFlow) -> None:
        """Prints the scores of every set."""
        for name in self.config.evaluate:
            pairs = evaluation_set(name, self.config.data)
            found = evaluate_set(pairs, self._estimator(model, name), **self._video)
            below = ", ".join(f"{k}px {found[f'{k}px']:.2f} %" for k in WITHIN)
            say(
                f"{name}: {len(pairs)} pairs, EPE {found['epe']:.3f} (of zero flow {found['zero_flow']:.3f}), {below}, "
                f"F1-all {found['f1']:.2f} %"
            )
            others = ("epe_below_400", "steps", "spectral_radius")
            say("  " + ", ".join(f"{other} {found[other]:.3f}" for other in others if other in found))

    def export(self, model: DEQFlow) -> str:
        """Writes the weights under the originals' names; `.safetensors`, or `.pth` with PyTorch installed."""
        state_dict = export_flow(model)
        write_checkpoint(self.config.export_path, state_dict)
        return f"Wrote {len(state_dict)} tensors to {self.config.export_path}."

    def import_checkpoint(self, path: str, model: DEQFlow) -> None:
        """Published weights: a `.pth`, `.pt` or `.safetensors` state dict."""
        load_flow(model, read_checkpoint(path))

    def submit(self, model: DEQFlow) -> str:
        """Writes the files of `config.submit.set`, or their pictures, to `config.submit.path`."""
        options = self.config.submit
        of_mode = lambda mode: estimator(model, mode, self.config.get("mesh"))  # noqa: E731
        try:
            n = submit(options.set, self.config.data.dir, options.path, of_mode, pictures=options.pictures, **self._video)
        except ValueError as error:
            raise UserError(str(error)) from error
        return f"Wrote {n} files to {options.path}."

    def viz(self, model: DEQFlow) -> str:
        """Draws `config.viz.input`, or else samples and convergence, to the folder `config.viz.output`."""
        options = self.config.viz
        if not options.input:
            self.show(model, Path(options.output))
            return f"Wrote samples.png and convergence.png to {options.output}."
        written = draw_frames(options.input, options.output, self._estimator(model, self.config.evaluate[0]), **self._video)
        return f"Wrote {len(written)} file(s) to {options.output}: {written[0].name} ..."

    def show(self, model: DEQFlow, workdir) -> None:
        """Samples of the first set that is evaluated, and what more solver steps bring there."""
        name = self.config.evaluate[0]
        pairs = evaluation_set(name, self.config.data)
        workdir.mkdir(parents=True, exist_ok=True)
        numbers = range(0, len(pairs), max(len(pairs) // 4, 1))[:4]
        samples = [pairs.read(number) for number in numbers]
        estimate, steps = self._estimator(model, name), tuple(self.config.viz.steps)
        draw_samples(samples, [np.asarray(estimate(s.image1, s.image2).flow[0]) for s in samples], workdir / "samples.png")

        graph, state = nnx.split(model)

        @jax.jit
        def solve(state, image1, image2):
            model = nnx.merge(graph, state)
            padding = padding_of(*image1.shape[1:3], EVALUATIONS[name])
            states, stats = model.trajectory(model.encode(pad(image1, padding), pad(image2, padding)), steps)
            return [unpad(model.decode(z), padding) for z in states], stats.abs_trace

        residuals, errors = [], []
        for sample in samples:
            frames = (np.asarray(image[None], np.float32) for image in (sample.image1, sample.image2))
            flows, trace = jax.device_get(solve(state, *frames))
            residuals.append(trace[0])
            known = sample.valid > 0
            errors.append([np.mean(np.linalg.norm(flow[0] - sample.flow, axis=-1)[known]) for flow in flows])
        draw_convergence(np.array(residuals), steps, np.mean(errors, axis=0), workdir / "convergence.png")

    def _estimator(self, model, name):
        return estimator(model, EVALUATIONS[name], self.config.get("mesh"))

    @property
    def _video(self) -> dict:
        return {"warm_start": self.config.warm_start, "fixed_point_reuse": self.config.fixed_point_reuse}


def noisy(image1, image2, key):
    """Both frames with Gaussian noise of one strength, at most 5 grey levels."""
    strength, *keys = jax.random.split(key, 3)
    sigma = jax.random.uniform(strength, (), image1.dtype, 0, 5)
    add = lambda image, key: jnp.clip(image + sigma * jax.random.normal(key, image.shape, image.dtype), 0, 255)  # noqa: E731
    return add(image1, keys[0]), add(image2, keys[1])


def _check_settings(config) -> None:
    """Raises ValueError for a setting that cannot be."""
    data = config.data
    if data.stage not in STAGES:
        raise ValueError(f"data.stage={data.stage!r}: must be one of {', '.join(STAGES)}.")
    if not config.evaluate:
        raise ValueError(f"evaluate is empty: name one set or more of {', '.join(EVALUATIONS)}.")
    for name in config.evaluate:
        if name not in EVALUATIONS:
            raise ValueError(f"evaluate={name!r}{did_you_mean(name, EVALUATIONS)} Sets: {', '.join(EVALUATIONS)}.")
    if "warped_photos" in (data.stage, *config.evaluate) and (missing := [key for key in OFFLINE if key not in data]):
        raise ValueError(f"warped_photos needs data.{', data.'.join(missing)}, as in configs/flow_warped_photos.py.")
    if len(data.crop) != 2 or any(n < SCALE or n % SCALE for n in data.crop):
        raise ValueError(f"data.crop={tuple(data.crop)}: height and width must be multiples of {SCALE}.")
    for key, least in (("batch_size", 1), ("threads", 0), ("ahead", 1)):
        if data[key] < least:
            raise ValueError(f"data.{key}={data[key]}: must be {least} or more.")
    steps = tuple(config.viz.steps)
    if not steps or steps[0] < 1 or list(steps) != sorted(set(steps)):
        raise ValueError(f"viz.steps={steps}: must be increasing numbers of solver steps.")


def main(argv=None):
    from deqjax.cli import run

    return run(FlowTask, argv)


if __name__ == "__main__":
    sys.exit(main())
