"""The README's snippet runs as it stands, and its commands name what exists."""

import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    with jax.enable_x64(False):
        exec(snippet, {})
    assert "4 of 4 samples converged" in capsys.readouterr().out


def test_every_config_and_module_named_exists():
    for config in re.findall(r"configs/\w+\.py", TEXT):
        assert (ROOT / config).is_file(), config
    for module in re.findall(r"experiments\.(\w+)", TEXT):
        assert (ROOT / "experiments" / f"{module}.py").is_file(), module
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for link in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / link).exists(), link
