"""The commands in the user's guide are ones that the command line takes."""

import pathlib
import re
import shlex

import pytest

from deqjax.training.main import parse

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text()
OPTIONS = [option for option in re.findall(r"`([^`]+)`", TEXT) if option.startswith("--") and option != "--config.mesh"]


def test_the_commands_of_the_scaling_page_parse():
    (command,) = {c for c in re.findall(r"`(python -m experiments\.deq_lm [^`]+)`", TEXT) if "..." not in c}
    values = parse(shlex.split(command)[2:])
    assert values.config.mesh.data == -1 and values.workdir == "runs/lm"


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_of_the_scaling_page_parse(options):
    if options == "--workdir":
        options = "--workdir x"
    parse(["deq_lm", "--config=configs/wt103.py", *shlex.split(options.replace("PROJECT", "p"))])


def test_what_the_page_names_exists():
    for module in re.findall(r"python -m experiments\.(\w+)", TEXT):
        assert (ROOT / "experiments" / f"{module}.py").is_file(), module
    for config in re.findall(r"configs/\w+\.py", TEXT):
        assert (ROOT / config).is_file(), config
