"""Eight virtual devices and float64 for every test, and the package's annotations checked at every call.

What is compiled is kept for the session: many tests run the same programs, some in processes of their own.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and little of it is spent in what was compiled.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older of its two code generators takes half the time. Later versions do not have it, and stop at the flag.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="deqjax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 (the hook names it)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
install_import_hook("deqjax", "tests.typechecker.typechecker")


def pytest_addoption(parser):
    parser.addoption("--goldens", default=None, help="directory tree of golden cases (JSON and npz) to run")


@pytest.fixture(scope="module", autouse=True)
def released():
    """Lets go of a file's programs: each is mapped into memory, and a process may have 65,530 mappings on Linux."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Compiles as users' programs do: for tests that compute more than they compile."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
