"""The diffusion experiment, through its command line, on meshes, and on platforms that are not here."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import ddim_celeba, ddim_cifar10, ddim_digits, ddim_lsun
from deqjax.interop.ddim import load_ddim
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.models.ddim import JointSystem, sample_ddim, solve_joint
from deqjax.training.mesh import batch_sharding, place_batch
from deqjax.training.step import prepare, step_function
from experiments import ddim_inversion, deq_ddim
from experiments.ddim_data import read
from experiments.ddim_pictures import tiled
from experiments.ddim_sampling import Sampler
from experiments.deq_ddim import DiffusionTask
from experiments.fid import Moments, frechet_distance, load_features
from tests.models.test_ddim import network, problem
from tests.training.collectives import collectives
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_a_run_moves, assert_devices_share_out_a_batch, assert_meshes_agree, mesh_of

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = {"model.image_size": 8, "model.multipliers": (1,), "model.attention": (), "data.batch_size": 8, "data.eval_images": 16}
TINY |= {"data.eval_batch_size": 8, "steps": 4, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}
TINY |= {"sampler.timesteps": 4, "sample.n": 3, "sample.batch_size": 2, "eval.n": 6, "eval.batch_size": 4, "eval.reference": 32}
TINY |= {"invert.steps": 3, "invert.images": 2, "invert.timesteps": 0, "compare.timesteps": (2, 4), "compare.repeats": 1}


def command(workdir, *extra, **settings):
    flags = [f"--config.{key}={value}" for key, value in (TINY | {"out": workdir / "out"} | settings).items()]
    return ["deq_ddim", f"--config={CONFIGS / 'ddim_digits.py'}", *flags, f"--workdir={workdir}", *extra]


def tiny_task(**settings):
    config = ddim_digits.get_config()
    config.update_from_flattened_dict(TINY | settings)
    return DiffusionTask(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    assert deq_ddim.main(command(workdir)) == 0
    return workdir


def test_training_resumes_with_its_average(trained, tmp_path):
    assert deq_ddim.main(command(tmp_path, **{"steps": 2})) == 0
    assert deq_ddim.main(command(tmp_path, "--allow_changes")) == 0
    both = []
    for workdir in (trained, tmp_path):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        both.append([line for line in lines if "train/loss" in line][-1] | lines[-1])
    for name in ("train/loss", "train/grad_norm", "test/loss"):
        assert both[0][name] == both[1][name], name


def test_every_mode_does_what_it_says(trained, capsys):
    out = trained / "out"
    assert deq_ddim.main(command(trained, "--mode=sample")) == 0
    assert "3 images in" in capsys.readouterr().out
    for name in ("samples/0.png", "samples/2.png", "grid.png", "filmstrip.png", "residuals.png", "predictions.png"):
        assert (out / name).stat().st_size > 50, name
    assert (out / "interpolation.png").is_file()
    with np.load(out / "latents" / "2.npz") as file:
        assert file["x_T"].shape == file["image"].shape == (8, 8, 1)
    grid = (out / "grid.png").read_bytes()
    (out / "samples" / "1.png").unlink()
    assert deq_ddim.main(command(trained, "--mode=sample")) == 0
    assert "2 images were there already. 1 images" in capsys.readouterr().out
    assert (out / "grid.png").read_bytes() == grid and len(list((out / "samples").iterdir())) == 3
    # Images of another sampler or of other weights would not be told from these.
    weights = out / "zeros.safetensors"
    assert deq_ddim.main(command(trained, "--mode=export", export_path=weights)) == 0
    write_checkpoint(weights, {name: 0 * array for name, array in read_checkpoint(weights).items()})
    for other, words in (
        ({"sampler.timesteps": 2}, "config.sampler.timesteps was 4, is 2"),
        ({"init_from": weights}, "the weights are others"),
    ):
        assert deq_ddim.main(command(trained, "--mode=sample", **other)) == 2
        assert words in " ".join(capsys.readouterr().err.split())

    gradients = ("one_step", "implicit", "sequential")
    assert deq_ddim.main(command(trained, "--mode=invert", **{"invert.gradients": gradients})) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in gradients) and (out / "inversion.png").is_file()
    with np.load(out / "inverted_implicit.npz") as file:
        assert file["x_T"].shape == (2, 8, 8, 1) and file["trajectory"].shape == (2, 4, 8, 8, 1)
        np.testing.assert_array_equal(file["trajectory"][:, -1], file["image"])
        error = np.mean(np.square(file["image"] - file["target"]).sum(axis=(1, 2, 3)))
    row = next(line for line in text.splitlines() if line.startswith("| implicit |")).split("|")
    assert float(row[-3]) == pytest.approx(error, rel=0.05)  # of two digits

    assert deq_ddim.main(command(trained, "--mode=eval")) == 0
    text = capsys.readouterr().out
    assert "held-out loss per pixel" in text and "FID with the features of pixels" in text and "encoded and decoded" in text

    assert deq_ddim.main(command(trained, "--mode=compare", **{"sampler.tol": 1e-6})) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [cell.strip() for cell in rows[0]]
    for row in rows[2:]:
        values = dict(zip(names, map(float, row), strict=True))
        assert values["parallel calls"] <= values["sequential calls"] == values["T"]
        assert values["max difference"] < 1e-4 and values["8-bit difference"] <= 1

    file = out / "ddim.safetensors"
    assert deq_ddim.main(command(trained, "--mode=export", export_path=file)) == 0
    task = tiny_task()
    graph, shapes = nnx.split(nnx.eval_shape(lambda: task.model(nnx.Rngs(0))))
    model = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    load_ddim(model, read_checkpoint(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler.timesteps": 1001}, "1001 sampling steps: there must be 1 or more, and at most 1000"),
        ({"sampler.eta": 1.5}, "eta=1.5: must lie between 0"),
        ({"sampler.method": "paralel"}, "did you mean 'parallel'"),
        ({"sampler.solver": "andersen"}, "did you mean 'anderson'"),
        ({"sampler.tol": 0.0}, "sampler.tol=0.0"),
        ({"sampler.solver": "broyden", "sampler.window": 2}, "'broyden' takes the whole trajectory"),
        ({"compare.timesteps": (10, 2000)}, "2000 sampling steps"),
        ({"compare.timesteps": (0,)}, "0 sampling steps"),
        ({"model.image_size": 7}, "8x8 pixels"),
        ({"model.width": 40}, "multiple of 32"),
        ({"data.name": "cifar"}, "did you mean 'cifar10'"),
        ({"data.name": "celeba", "data.dir": "/nowhere"}, "img_align_celeba"),
        ({"data.name": "folder", "data.dir": "/nowhere"}, "no such folder"),
        ({"invert.gradients": ("exact",)}, r"invert.gradients\[0\]='exact'"),
        ({"invert.gradients": ()}, "invert.gradients is empty"),
        ({"compare.timesteps": ()}, "compare.timesteps is empty"),
        ({"sample.shown": 0}, "sample.shown=0"),
        ({"sampler.data_variance": -1.0}, "sampler.data_variance=-1.0"),
        ({"sampler.options.memmory": 3}, "did you mean 'memory'"),
        ({"sampler.options.stop": "all"}, r"stop='all'\): must be 'each'"),
        ({"model.image_channels": 3}, r"images of 8x8x1 \(digits\) for a model of 8x8x3"),
        ({"diffusion.schedule": "cosine"}, "no noise schedule is called 'cosine'"),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, settings, message):
    assert deq_ddim.main(command(tmp_path, **settings)) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(message, text), text


def test_a_checkpoint_of_another_resolution_is_refused(trained, tmp_path, capsys):
    file = tmp_path / "small.safetensors"
    assert deq_ddim.main(command(trained, "--mode=export", export_path=file)) == 0
    other = {"model.image_size": 16, "model.multipliers": (1, 2), "init_from": file}
    assert deq_ddim.main(command(tmp_path / "other", "--mode=sample", **other)) == 2
    assert "has 2 levels" in " ".join(capsys.readouterr().err.split())


def test_a_network_that_returns_nan_is_reported_with_the_timestep(trained, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    assert deq_ddim.main(command(trained, "--mode=export", export_path=file)) == 0
    weights = read_checkpoint(file)
    weights["conv_out.bias"] = np.full_like(weights["conv_out.bias"], np.nan)
    write_checkpoint(file, weights)
    # A data set is not needed for that.
    settings = {"init_from": file, "data.name": "cifar10", "data.dir": "/nowhere"}
    assert deq_ddim.main(command(tmp_path, "--mode=sample", **settings)) == 2
    assert "not finite for 2 of 2 samples: sample 0 at timestep" in " ".join(capsys.readouterr().err.split())


def test_one_timestep_is_a_chain_too():
    task = tiny_task(**{"sampler.timesteps": 1})
    system, x_T, _ = problem(T=1)
    assert len(Sampler(task.config, task.rates, jitted_model(task)).chain) == 1
    np.testing.assert_allclose(solve_joint(system, x_T).image, sample_ddim(system.denoise, system.chain, x_T).image, rtol=1e-12)


def test_a_budget_that_is_too_small_shows():
    task = tiny_task(**{"sampler.timesteps": 4, "sampler.solver": "picard"})
    for budget in (0, 2):
        task.config.sampler.max_steps = budget
        sampler = Sampler(task.config, task.rates, jitted_model(task))
        outcome = sampler(*sampler.latents(range(2)))
        assert outcome.calls == (budget or 4) and outcome.converged.tolist() == [not budget] * 2


def test_targets_of_the_models_own_are_images():
    task = tiny_task(**{"invert.in_distribution": True})
    sampler = Sampler(task.config, task.rates, jitted_model(task), "sequential")
    far = 3 * np.ones((2, 8, 8, 1), np.float32)
    sampler._run = lambda x_T, noise: (far, 4, 8, np.full(2, -1), np.full(2, True))
    assert np.max(ddim_inversion._targets(task.config, sampler, None)) == 1


def jitted_model(task):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: task.model(nnx.Rngs(0))))
    random = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.1, x.shape), jnp.float32), shapes))


def test_published_recipes_are_what_they_say():
    sizes = {"cifar10": (32, 1.0, 0.9999, 2e-4), "celeba": (64, 1.0, 0.9999, 2e-4), "lsun": (256, 0.0, 0.999, 2e-5)}
    for module, name in ((ddim_cifar10, "cifar10"), (ddim_celeba, "celeba"), (ddim_lsun, "lsun")):
        config = module.get_config()
        got = (config.model.image_size, config.optimizer.clip, config.ema, config.optimizer.learning_rate)
        assert got == sizes[name]
        with pytest.raises(ValueError, match="has no variant 'large'"):
            module.get_config("large")
        assert module.get_config("sddim").sampler.eta > 0
    assert ddim_lsun.get_config("church+sddim").data.name == "lsun_church_outdoor"
    for name in ("cifar10", "lsun_cat", "ffhq"):
        config = ddim_cifar10.get_config()
        config.data.name, config.data.dir = name, "/nowhere"
        with pytest.raises(ValueError, match="/nowhere"):
            read(config)


# Many devices --------------------------------------------------------------------------------------------------------

SGD = {"optimizer.name": "sgd", "optimizer.clip": 0.0, "optimizer.schedule": "constant"}


def sgd_task():
    task = tiny_task(**SGD)
    task.config.optimizer.momentum = 0.9
    return task


def test_training_on_eight_devices_computes_what_one_does():
    steps = assert_meshes_agree(sgd_task(), ((8, 1, 1), (4, 2, 1)))
    assert_devices_share_out_a_batch(steps[8, 1, 1])


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one(tmp_path, monkeypatch):
    assert_a_run_moves(lambda: tiny_task(log_every=1), (deq_ddim,), tmp_path, monkeypatch, rtol=1e-4)


@pytest.mark.parametrize(("T", "B", "window"), [(16, 1, 0), (13, 2, 0), (13, 2, 5)])
def test_timesteps_spread_over_eight_devices_give_the_sequential_image(T, B, window):
    system, x_T, noise = problem(T, B, eta=0.5)
    spread = JointSystem(network(system.chain), system.chain, chunk=1, spread=batch_sharding(mesh_of((4, 2, 1))))
    expected = sample_ddim(system.denoise, system.chain, x_T, noise).trajectory
    compiled = jax.jit(lambda x, z: solve_joint(spread, x, z, window=window)).lower(x_T, noise).compile()
    found = compiled(x_T, noise)
    assert int(found.calls) <= len(system.chain)
    np.testing.assert_allclose(found.trajectory, expected, atol=1e-2)
    alone = jax.jit(lambda x, z: solve_joint(system, x, z, window=-(-window // 8) * 8))(x_T, noise)
    np.testing.assert_allclose(found.trajectory, alone.trajectory, rtol=1e-9, atol=1e-11)
    # The network's work is split: of the eight images of a chunk, every device multiplies one.
    assert any("while" in c.scope for c in collectives(compiled))
    assert set(re.findall(r"= f64\[(\d+),12\]\S* dot\(", compiled.as_text())) == {"1"}


def test_training_and_sampling_lower_for_every_platform():
    task, mesh = sgd_task(), mesh_of((2, 2, 2))
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)
    sampler = Sampler(task.config, task.rates, jitted_model(task))
    graph, state = nnx.split(jitted_model(task))
    lowers_everywhere(lambda s, x: sampler._sample(nnx.merge(graph, s), x, None), state, sampler.latents(range(2))[0])


# Distances -----------------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_gaussians_is_known(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 500, 6)) @ random.normal(size=(2, 6, 6))
    got = frechet_distance(Moments().add(a[:200]).add(a[200:]), Moments().add(b))
    covariances = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1])
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + sum(map(np.trace, covariances)) - 2 * np.sum(np.sqrt(eigenvalues.real))
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    assert abs(frechet_distance(Moments().add(a), Moments().add(a))) < 1e-8
    with pytest.raises(ValueError, match="two or more"):
        frechet_distance(Moments().add(a[:1]), Moments().add(b))


def test_feature_networks_come_from_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    (tmp_path / "mean.py").write_text("def features(images):\n    return images.mean(axis=(1, 2))\n")
    mean = load_features(str(tmp_path / "mean.py"))(images)
    exported = jax.export.export(jax.jit(lambda x: x.mean(axis=(1, 2))))(jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32))
    (tmp_path / "mean.jax").write_bytes(exported.serialize())
    np.testing.assert_allclose(load_features(str(tmp_path / "mean.jax"))(images), mean, rtol=1e-6)
    assert load_features("pixels")(images).shape == (5, 48)
    with pytest.raises(ValueError, match="fails on images of 8x8x1"):
        load_features(str(tmp_path / "mean.jax"))(np.zeros((2, 8, 8, 1), np.uint8))
    (tmp_path / "one.py").write_text("def features(images):\n    return images.mean()\n")
    with pytest.raises(ValueError, match="not a row of finite numbers for each"):
        load_features(str(tmp_path / "one.py"))(images)
    (tmp_path / "broken.py").write_text("features = 1 / 0")
    (tmp_path / "weights.bin").write_text("")
    for name, message in (("absent.pt", "no such file"), ("broken.py", "ZeroDivisionError"), ("weights.bin", "must end in")):
        with pytest.raises(ValueError, match=message):
            load_features(str(tmp_path / name))


def test_images_are_tiled_with_gaps():
    page = tiled(np.full((3, 4, 5, 1), -1.0), columns=2)
    assert page.shape == (2 * (4 + 2) + 2, 2 * (5 + 2) + 2, 1)
    assert (page == 0).sum() == 3 * 20
