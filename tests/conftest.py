"""Eight virtual devices and float64 for every test, and the package's annotations checked at every call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 (the hook names it)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
install_import_hook("deqjax", "tests.typechecker.typechecker")


def pytest_addoption(parser):
    parser.addoption("--goldens", default=None, help="directory tree of golden cases (JSON and npz) to run")
