import json
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deqjax.cli import load_config, parse, run
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh
from tests.training.tiny import TinyTask

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CONFIG = "--config=tests/training/tiny.py"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing"),
        (["--config=tests/training/absent.py"], "no such file. There are: .*tiny.py"),
        ([CONFIG, "--config.stepz=3"], "did you mean 'steps'"),
        ([CONFIG, "--config.optimizer.clp=3"], "did you mean 'clip'"),
        ([CONFIG, "--config.steps=few"], "few"),
        ([CONFIG, "--config.steps=1.5"], "1.5"),
        ([CONFIG, "--wrkdir=x"], "workdir"),
        ([CONFIG, "--mode=trian"], "train"),
        ([CONFIG, "--workdir="], "--workdir is empty"),
        ([CONFIG, "stray"], "Stray argument 'stray'"),
        ([CONFIG, "--config.seed=-1"], "config.seed=-1: must be from 0"),
        ([CONFIG, "--process_id=1", "--num_processes=2"], "did not find each other"),
        ([CONFIG, "--config.width=0"], "width=0: must be positive"),
        ([CONFIG, "--config.mesh.data=3"], "8 devices"),
        ([CONFIG, "--config.optimizer.name=adm"], "did you mean 'adam'"),
        ([CONFIG, "--mode=eval"], "no checkpoint"),
        ([CONFIG, "--config.init_from=nowhere"], "no such file or run"),
        ([CONFIG, "--config.resume=nowhere"], "no checkpoint"),
    ],
)
def test_a_mistake_is_one_paragraph_and_status_2(arguments, message, tmp_path, capsys):
    import re

    directory = [] if any(arg.startswith("--w") for arg in arguments) else [f"--workdir={tmp_path}"]
    assert run(TinyTask, ["tiny", *arguments, *directory]) == 2
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint and "\n\n" not in complaint
    assert re.search(message, " ".join(complaint.split())), complaint


def test_train_then_eval_then_a_mode_of_the_task(tmp_path, capsys):
    common = ["tiny", CONFIG + ":wide", f"--workdir={tmp_path}", "--config.steps=4"]
    assert run(TinyTask, common) == 0
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["steps"] == 4 and saved["width"] == 2
    capsys.readouterr()
    assert run(TinyTask, [*common, "--mode=eval"]) == 0
    assert "valid: loss" in capsys.readouterr().out
    assert run(TinyTask, [*common, "--mode", "weights"]) == 0
    assert "weights (4, 2)" in capsys.readouterr().out


def test_a_misspelt_directory_is_not_made(tmp_path, capsys):
    ours = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)  # as for a user, whose programs are kept in the directory
    try:
        assert run(TinyTask, ["tiny", CONFIG, f"--workdir={tmp_path / 'runz' / 'deep'}", "--mode=eval"]) == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", ours)
        compilation_cache.reset_cache()
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runz").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path, capsys):
    class Task(TinyTask):
        def data(self, split):
            raise ImportError('reading pictures needs Pillow: pip install "deqjax[vision]"')

    assert run(Task, ["tiny", CONFIG, f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == 'Error: reading pictures needs Pillow: pip install "deqjax[vision]"\n'


def test_the_length_of_a_schedule_does_not_set_that_of_the_run():
    recipes = [load_config(str(path)) for path in sorted(CONFIGS.glob("[!_]*.py"))]
    recipes = [config for config in recipes if "max_steps" in config.optimizer]
    assert len(recipes) > 10
    for config in recipes:
        steps = config.steps
        config.optimizer.max_steps = 7
        assert config.steps == steps and config.optimizer.max_steps == 7
        config.steps = 9
        assert config.optimizer.max_steps == 7


def test_a_section_of_options_takes_any():
    flags = ["memory=6", "reverse=true", "weights=slot"]
    argv = ["x", "--config=configs/ddim_digits.py", *(f"--config.sampler.options.{flag}" for flag in flags)]
    assert parse(argv).config.sampler.options.to_dict() == {"memory": 6, "reverse": True, "weights": "slot"}
    with pytest.raises(UserError, match=r"is given as --config\.sampler\.options\.memory=VALUE"):
        parse([*argv[:2], "--config.sampler.options.memory", "6"])


def test_the_status_reaches_the_shell():
    result = subprocess.run([sys.executable, "-m", "tests.training.tiny"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("Error: --config is missing")


def test_one_mesh_axis_takes_what_is_left():
    assert dict(make_mesh({"data": -1, "model": 2}).shape) == {"data": 4, "fsdp": 1, "model": 2}
    assert dict(make_mesh(None, jax.devices()[:3]).shape) == {"data": 3, "fsdp": 1, "model": 1}
    with pytest.raises(UserError, match="must multiply"):
        make_mesh({"data": -1, "fsdp": -1})
    with pytest.raises(UserError, match="cannot have batch"):
        make_mesh({"batch": 2})
