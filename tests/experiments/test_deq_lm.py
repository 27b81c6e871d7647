"""The language-model experiment, through its command line."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from configs import pydoc
from deqjax.models.transformer import Memory
from deqjax.training.checkpoint import Checkpoints, committed_steps, load_arrays
from deqjax.training.errors import UserError
from deqjax.training.mesh import place_batch
from deqjax.training.state import named_leaves
from deqjax.training.step import prepare, step_function
from experiments import deq_lm
from experiments.deq_lm import LanguageModelTask, main
from tests.training.collectives import collectives
from tests.training.lowering import lowers_everywhere
from tests.training.meshes import assert_a_run_moves, assert_meshes_agree, compiled_step, mesh_of
from tests.training.runs import lines

ROOT = pathlib.Path(__file__).parents[2]

SMALL = {
    "data.name": "text",
    "data.batch_size": 8,
    "data.length": 6,
    "data.eval_batch_size": 2,
    "data.eval_length": 6,
    "data.eval_mem_len": 6,
    "model.d_model": 8,
    "model.d_embed": 8,
    "model.n_head": 2,
    "model.d_head": 4,
    "model.d_inner": 12,
    "model.mem_len": 6,
    "model.cutoffs": (4,),
    "steps": 4,
    "log_every": 1,
    "eval_every": 2,
    "checkpoint_every": 2,
    "generate.n_tokens": 5,
    "generate.prompt": "a b",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("valid", 6), ("test", 6)):
        lines = [" ".join(rng.choice(list("abcdefg"), 12)) for _ in range(n)]
        (folder / f"{split}.txt").write_text("\n".join(["a b c d e f g", *lines]) + "\n")
    return folder


def command(workdir, corpus, *extra, **changed):
    settings = {**SMALL, "data.dir": str(corpus), **{k.replace("__", "."): v for k, v in changed.items()}}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [
        "deq_lm",
        f"--config={ROOT / 'configs' / 'pydoc.py'}",
        *flags,
        f"--workdir={workdir}",
        "--config.mesh.data=-1",
        *extra,
    ]


def small_task(corpus, **changed):
    config = pydoc.get_config()
    for key, value in {**SMALL, "data.dir": str(corpus), **changed}.items():
        config.update_from_flattened_dict({key: value})
    return LanguageModelTask(config)


def test_trains_resumes_evaluates_and_generates(corpus, tmp_path, capsys):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert main(command(unbroken, corpus)) == 0
    assert main(command(resumed, corpus, steps=2)) == 0
    assert main(command(resumed, corpus)) == 0
    keep = lambda entries: [e for e in entries if not any(k.startswith("test/") for k in e)]
    assert keep(lines(unbroken)) == keep(lines(resumed))
    capsys.readouterr()
    assert main(command(unbroken, corpus, "--mode=eval")) == 0
    out = capsys.readouterr().out
    assert "unigram model" in out and "solver steps" in out and "after 80 solver steps" in out
    assert main(command(unbroken, corpus, "--mode=generate")) == 0
    assert len(capsys.readouterr().out.split()) >= 5


def test_evaluation_with_fewer_solver_steps_compiles_nothing_anew(corpus):
    task = small_task(corpus)
    model = task.model(nnx.Rngs(0))
    one = task.evaluate(model, "valid", {"f_limit": 1, "f_tol": 0.0})
    programs = task._evaluate_segment._cache_size()
    three = task.evaluate(model, "valid", {"f_limit": 3, "f_tol": 0.0})
    assert task._evaluate_segment._cache_size() == programs
    assert (one["forward/steps"], three["forward/steps"]) == (1, 3) and one["loss"] != three["loss"]


def weights(workdir):
    return {path: array for path, array in named_leaves(load_arrays(workdir, lambda path: path[0] != "best")).items()}


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_an_unbroken_one(corpus, tmp_path):
    """Through the command line, in processes of their own, with SIGKILL: metrics and weights agree bit for bit."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    settings = {"steps": 14, "checkpoint_every": 1, "eval_every": 4, "log_every": 3}

    def start(workdir):
        arguments = command(workdir, corpus, **settings)[1:]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.deq_lm", *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )

    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert start(unbroken).wait() == 0
    random, hits = np.random.default_rng(1), 0
    for at_least in (2, 7):
        process = start(killed)
        while process.poll() is None and (committed_steps(killed) or [0])[-1] < at_least:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        hits += process.wait() == -signal.SIGKILL
    assert hits == 2
    assert start(killed).wait() == 0
    assert lines(killed) == lines(unbroken)
    ours, expected = weights(killed), weights(unbroken)
    assert ours.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(ours[path], array, err_msg="/".join(path))


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(corpus, tmp_path, monkeypatch, capsys):
    assert main(command(tmp_path, corpus, steps=2)) == 0
    before = weights(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def on_a_full_disk(self, *args):
        # A limit on the size of files makes real writes fail in the middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", on_a_full_disk)
    try:
        assert main(command(tmp_path, corpus)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    err = " ".join(capsys.readouterr().err.split())
    assert "so the run stops here" in err and "Traceback" not in err
    for path, array in weights(tmp_path).items():
        np.testing.assert_array_equal(array, before[path], err_msg="/".join(path))
    assert main(command(tmp_path, corpus)) == 0


def test_a_published_checkpoint_starts_a_run_and_a_run_exports_one(corpus, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "lm.safetensors"
    assert main(command(run, corpus, steps=2)) == 0
    assert main(command(run, corpus, "--mode=export", export_path=file)) == 0
    capsys.readouterr()
    assert main(command(run, corpus, "--mode=eval")) == 0
    expected = capsys.readouterr().out
    assert main(command(tmp_path / "other", corpus, "--mode=eval", init_from=file)) == 0
    # The best weights were those of the last step, so nothing but the report differs.
    assert [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line] == [
        line for line in expected.splitlines() if "perplexity" in line
    ]
    assert main(command(tmp_path / "other", corpus, "--mode=eval", init_from=file, model__d_inner=16)) == 2
    assert "wrong shape: func.pos_ff.ff1_net.weight_v is (12, 8), the model needs (16, 8)" in " ".join(
        capsys.readouterr().err.split()
    )


SGD = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.5,
    "optimizer.clip": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
# Picard and a short map: what a solve that does not converge makes of rounding would drown the comparison.
CALM = {"deq.f_solver": "picard", "deq.b_solver": "picard", "deq.norm_no_scale": True, "deq.norm_target_norm": 0.05}
UNROLLED = {"model.recipe": "deq-lm", "model.norm": "pre", "deq.ift": False, "deq.grad": 3, "deq.f_max_iter": 0}
ONE_DEVICE = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.model": 1}
RECIPES = {"deq-seq": CALM | {"deq.f_max_iter": 12}, "deq-lm": UNROLLED | {"deq.jac_loss_weight": 0.0}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_mesh_computes_what_one_device_does(recipe, corpus):
    task = small_task(corpus, **SGD, **RECIPES[recipe], **{"model.div_val": 2})
    assert_meshes_agree(task, ((4, 2, 1), (2, 2, 2)))


def test_a_solve_on_many_devices_talks_once_per_check_and_twice_per_evaluation(corpus):
    """Data parallel: a scalar per check; with the matrices split over `model`, two sums over them per application of f."""
    with jax.enable_x64(False):  # arrays of two dtypes would not travel together
        task = small_task(corpus, **{"deq.jac_loss_weight": 0.0, "model.recipe": "deq-lm"})
        compiled = {shape: compiled_step(task, mesh_of(shape))[1] for shape in ((8, 1, 1), (4, 2, 1), (4, 1, 2))}
    for shape in ((8, 1, 1), (4, 2, 1)):
        found = collectives(compiled[shape])
        assert [c.entries for c in found if "while" in c.scope] == [1, 1], shape
        reductions = [c.kind for c in found if "while" not in c.scope and c.kind == "all-reduce" and c.entries > 100]
        assert reductions == ["all-reduce"], shape
    forward = [c for c in collectives(compiled[4, 1, 2]) if "/jvp()/while" in c.scope]
    assert [c.kind for c in forward] == ["all-reduce"] * 3 and sorted(c.entries for c in forward)[0] == 1


def test_large_matrices_are_split_over_model(corpus):
    task = small_task(corpus, **{"model.recipe": "deq-lm", "model.div_val": 2})
    mesh = mesh_of((2, 2, 2))
    program = prepare(task, task.config, mesh, place_batch(mesh, task.data("train").batch(0)))
    split = {"/".join(path): s.spec for path, s in named_leaves(program.shardings.params).items() if "model" in s.spec}
    block = "lm/cell/blocks/0"
    for name in ("inner/kernel", "outer/kernel", "attention/qkv/kernel", "attention/output/kernel", "attention/content_bias"):
        assert f"{block}/{name}" in split, name
    assert split[f"{block}/inner/kernel"] == P("fsdp", "model") and split[f"{block}/outer/kernel"] == P("model", "fsdp")
    assert "lm/embedding/tables/0" in split


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_training_and_evaluation_lower_for_every_platform(shape, corpus):
    task, mesh = small_task(corpus), mesh_of(shape)
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    lowers_everywhere(step_function(task, task.config, program, 1), program.shapes, batch)

    graph, state = nnx.split(program.model(program.init()).lm)
    segment = task.data("valid").batch(0)
    memory = Memory.empty(*(task.config.data[name] for name in ("eval_batch_size", "eval_mem_len")), 8)
    evaluate = lambda *arguments: task._segment(graph, (), {}, *arguments)
    lowers_everywhere(evaluate, state, memory, segment["tokens"], segment["targets"])


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_two_to_one(corpus, tmp_path, monkeypatch):
    make_task = lambda: small_task(corpus, **RECIPES["deq-seq"], **{"ema": 0.5})
    assert_a_run_moves(make_task, (deq_lm,), tmp_path, monkeypatch, rtol=1e-5, halfway={"fsdp": 2})


@pytest.mark.slow
def test_two_processes_train_save_and_go_on(corpus, tmp_path):
    """The language model on two processes of four devices, split every way, ends as on one device, and can be exported."""
    settings = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.model": 2, "steps": 4, "eval_every": 2} | RECIPES["deq-seq"]
    settings |= {"model.d_inner": 16, "export_path": tmp_path / "lm.safetensors"}

    def run(workdir, *extra, **changed):
        arguments = [x for x in command(workdir, corpus, *extra, **(settings | changed))[1:] if "mesh.data=-1" not in x]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            arguments += [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2"]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "experiments.deq_lm", *arguments, f"--process_id={i}"],
                cwd=ROOT,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            for i in range(2)
        ]
        errors = [process.communicate(timeout=400)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors

    run(tmp_path / "two", steps=2)
    assert committed_steps(tmp_path / "two")[-1] == 2
    run(tmp_path / "two")
    run(tmp_path / "two", "--mode=export", mesh__data=1, mesh__fsdp=1, mesh__model=8)  # one row of devices, over both
    assert load_file(tmp_path / "lm.safetensors")["func.pos_ff.ff1_net.weight_v"].shape == (16, 8)
    alone = subprocess.run(
        [sys.executable, "-m", "experiments.deq_lm", *command(tmp_path / "one", corpus, **(settings | ONE_DEVICE))[1:]],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )
    assert alone.returncode == 0
    for name in ("train/loss", "valid/loss"):
        ours, expected = ([e[name] for e in lines(tmp_path / run) if name in e] for run in ("two", "one"))
        assert ours == pytest.approx(expected, rel=1e-5) and len(ours) >= 2


def test_the_pretraining_phase_unrolls_and_then_solves(corpus):
    """Without the Jacobian term, whose weight grows at every second step after the phase, not within it."""
    weights = {"deq.jac_loss_weight": 0.1, "deq.jac_loss_freq": 1.0, "deq.jac_incremental": 2}
    task = small_task(corpus, **weights, **{"pretrain_steps": 3})
    model = task.model(nnx.Rngs(0))
    batch, key = task.data("train").batch(0), jax.random.key(0)
    before, after, grown = (task.loss(model, batch, key, np.int32(k))[1] for k in (0, 3, 4))
    assert before["forward/steps"][0] == 0 and after["forward/steps"][0] > 0
    assert before["jacobian"][0] == 0 and after["jacobian"][0] > 0
    np.testing.assert_allclose(grown["jacobian"][0], 2 * after["jacobian"][0], rtol=1e-5)


def test_a_generated_text_has_its_lines_and_no_spaces_around_them(corpus):
    task = small_task(corpus, **{"generate.prompt": "a <eos> <eos> b <eos>", "generate.n_tokens": 0})
    model = task.model(nnx.Rngs(0))
    assert task.generate(model) == "a\n\nb\n"
    task.config.data.eval_mem_len = 0
    with pytest.raises(UserError, match="needs a memory"):
        task.generate(model)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config.modl.d_model=3"], "modl"),
        (["--config.steps=many"], "steps"),
        (["--config.deq.f_solver=andersen"], "anderson"),
        (["--config.data.dir=/nowhere"], "/nowhere"),
        (["--config.deq.f_slver=broyden"], "did you mean 'f_solver'"),
        (["--config.deq.f_stop_mode=relative"], "stop_mode='relative'"),
        (["--config.deq.grad=0", "--config.deq.ift=False"], "steps=0"),
        (["--config.deq.f_max_iter=0", "--config.deq.eval_f_max_iter=0"], "no solver step"),
        (["--config.deq.core=indexing", "--config.deq.indexing=(3,70)"], "between 1 and f_max_iter=24"),
        (["--config.deq.sup_loc=(3,)", "--config.deq.ift=False"], "outside 1..1"),
        (["--config.model.dropout=1.5"], "between 0 and 1"),
        (["--config.model.n_layer=2"], "deq-seq cell is one block"),
        (["--config.model.d_inner=0"], "d_inner=0: must be positive"),
        (["--config.model.local_size=-1"], "must not be negative"),
        (["--config.model.cutoffs=(90,)"], "lie below n_tokens"),
        (["--config.data.length=0"], "data.length=0"),
        (["--config.data.eval_batch_size=5000"], "5000 streams"),
        (["--config.generate.top_k=-1"], "generate.top_k=-1"),
        (["--config.warm_start=True", "--config.model.mem_len=0"], "needs model.mem_len"),
        (["--config.deq.jac_loss_freq=1.5"], "jac_loss_freq=1.5: must be from 0 to 1"),
        (["--config.deq.jac_incremental=-1"], "jac_incremental=-1: must be 0 or more"),
        (["--config.optimizer.name=adamax"], "did you mean 'adam'"),
        (["--workdir=/dev/null/run"], "/dev/null"),
    ],
)
def test_mistakes_are_explained_in_a_paragraph(extra, message, corpus, tmp_path, capsys):
    assert main([*command(tmp_path, corpus), *extra]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "changed",
    [
        {"model.mem_len": 0, "data.eval_mem_len": 0},
        {"optimizer.name": "sgd", "optimizer.schedule": "inv_sqrt"},
        {"deq.ift": False, "deq.grad": 3, "deq.sup_loc": (1, 2), "deq.remat": True, "model.dropatt": 0.2},
        {"deq.core": "indexing", "deq.n_states": 3, "warm_start": True, "data.varlen": True},
        {"deq.b_solver": "gmres", "deq.norm_type": "spectral_norm", "deq.sradius_mode": True, "pretrain_steps": 2},
        {"model.dtype": "bfloat16", "model.tie_projections": "upstream", "model.tie_weights": False},
    ],
    ids=lambda changed: "+".join(changed),
)
def test_options_train_and_evaluate(changed, corpus, tmp_path, capsys):
    arguments = [f"--config.{key}={value}" for key, value in changed.items()]
    assert main([*command(tmp_path, corpus, steps=3, eval_every=0), *arguments]) == 0, capsys.readouterr().err
    losses = [entry["train/loss"] for entry in lines(tmp_path) if "train/loss" in entry]
    assert len(losses) == 3 and np.all(np.isfinite(losses))
    assert any("test/perplexity" in entry for entry in lines(tmp_path))


def test_missing_wikitext_says_where_it_comes_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    argv = [
        "deq_lm",
        f"--config={ROOT / 'configs' / 'wt103.py'}",
        f"--config.data.dir={tmp_path / 'w'}",
        f"--workdir={tmp_path}",
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "wikitext" in err.lower() and "configs/pydoc.py" in err


def test_a_checkpoint_of_another_vocabulary_or_model_is_refused(corpus, tmp_path, capsys):
    assert main(command(tmp_path / "run", corpus, steps=2)) == 0
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        (other / f"{split}.txt").write_text((corpus / f"{split}.txt").read_text().replace("g", "h"))
    capsys.readouterr()
    assert main(command(tmp_path / "run", other)) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(command(tmp_path / "run", corpus, model__d_inner=16)) == 2
    printed = capsys.readouterr()
    assert "another model" in " ".join(printed.err.split()) and "config.model.d_inner was 12, is 16" in printed.out
