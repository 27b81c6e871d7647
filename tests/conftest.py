"""Eight virtual devices and float64 for every test; both must be set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


def pytest_addoption(parser):
    parser.addoption("--goldens", default=None, help="directory tree of golden cases (JSON and npz) to run")
