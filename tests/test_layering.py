"""Imports run one way only."""

import ast
import pathlib
import subprocess
import sys

import pytest

import deqjax

ROOT = pathlib.Path(__file__).parents[1]

# Layer -> what of this project it may import.
ALLOWED = {
    "deqjax.core": {"deqjax.core"},
    "deqjax.nn": {"deqjax.core", "deqjax.nn"},
    "deqjax.models": {"deqjax.core", "deqjax.nn", "deqjax.models"},
    "deqjax.interop": {"deqjax.core", "deqjax.nn", "deqjax.models", "deqjax.interop", "deqjax.data.errors"},
    "deqjax.viz": {"deqjax.core"},
    "deqjax.data": {"deqjax.data"},
    "deqjax.optim": {"deqjax.core", "deqjax.optim", "deqjax.training.errors"},
    "deqjax.training": {"deqjax.core", "deqjax.nn.variables", "deqjax.optim", "deqjax.training", "deqjax.data.errors"},
    "deqjax.cli": {"deqjax.core", "deqjax.training", "deqjax.data.errors"},
    "configs": {"configs"},
}
FORBIDDEN = {"deqjax.core": {"flax"}, "deqjax.data": {"jax", "flax"}, "configs": {"jax", "flax", "numpy"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_lies_below(layer):
    path = ROOT / layer.replace(".", "/")
    files = sorted(path.rglob("*.py")) or [path.with_suffix(".py")]
    assert files
    for path in files:
        for name in imports(path):
            if name.split(".")[0] in ("deqjax", "configs", "experiments", "tests"):
                assert any(name == a or name.startswith(a + ".") for a in ALLOWED[layer]), f"{path} imports {name}"
            assert name.split(".")[0] not in FORBIDDEN.get(layer, ()), f"{path} imports {name}"


def test_type_checkers_see_the_public_names():
    stub = ast.parse((ROOT / "deqjax" / "__init__.pyi").read_text())
    seen = {alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == deqjax._PUBLIC and (ROOT / "deqjax" / "py.typed").is_file()


def test_importing_the_package_loads_nothing_optional():
    code = (
        "import sys, deqjax\nassert 'jax' not in sys.modules\n"
        "deqjax.fixed_point, deqjax.DEQ\n"
        "extra = {'torch', 'orbax.checkpoint', 'ml_collections', 'tensorboardX', 'safetensors', 'matplotlib'}\n"
        "flax_brings = {'orbax.checkpoint'}\n"
        "assert not (extra - flax_brings) & set(sys.modules), (extra - flax_brings) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
