"""The pages of the user's guide run as they stand, and name what exists."""

import pathlib
import re
import shlex

import jax
import pytest

from deqjax.cli import parse

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


PAGES = sorted((ROOT / "docs").glob("*.md"))
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@by_name
def test_the_snippets_of_a_page_run(page, capsys):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for snippet in snippets:
        with jax.enable_x64(False):
            exec(snippet, {})
        assert capsys.readouterr().out


@by_name
def test_the_commands_of_a_page_parse(page):
    for command in re.findall(r"`(python -m experiments\.\w+ --config [^`]+)`", page.read_text()):
        if "..." not in command:
            modes = ["train", *re.findall(r"--mode[ =](\w+)", command)]
            assert parse(shlex.split(command)[2:], modes).config.steps > 0, command


@by_name
def test_what_a_page_names_exists(page):
    text = page.read_text()
    named = {f"{folder}/{module}.py" for folder, module in re.findall(r"\b(experiments|benchmarks)\.(\w+)", text)}
    named |= set(re.findall(r"\b(?:configs|deqjax)/[\w/]+\.py", text))
    named |= {f"docs/{name}" for name in re.findall(r"\]\((\w+\.(?:png|md))\)", text)}
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing
