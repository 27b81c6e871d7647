"""Compiled programs are kept, so that a restart does not compile them again."""

import contextlib
import importlib.util
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compiled"
# Anything quicker is not worth a file.
SECONDS = 0.1


@contextlib.contextmanager
def kept_in(workdir):
    """JAX's persistent compilation cache in `workdir/compiled`, unless `JAX_COMPILATION_CACHE_DIR` says where, or that is "".

    A directory that cannot be written is left alone: programs are then compiled anew.
    """
    workdir = Path(workdir).absolute()
    folder, new = workdir / FOLDER, [path for path in (workdir, *workdir.parents) if not path.exists()]
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn(folder)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        if folder.is_dir():
            _use(str(folder), SECONDS)
        yield
    finally:
        _use(None, seconds)
        # A command that compiled nothing, such as one with a misspelt --workdir, leaves no empty directory.
        with contextlib.suppress(OSError):
            folder.rmdir()
            for path in new:
                path.rmdir()


def _drop_torn(folder: Path) -> None:
    """Removes the newest program if a kill in the middle of writing cut it short: JAX would not write it again."""
    newest = max(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None and not _is_whole(newest.read_bytes()):
        newest.unlink()


def _is_whole(program: bytes) -> bool:
    """JAX compresses with zstandard where that is installed, and else with zlib."""
    decompress, damaged = zlib.decompress, zlib.error
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        decompress, damaged = zstandard.ZstdDecompressor().decompress, zstandard.ZstdError
    try:
        decompress(program)
    except damaged:
        return False
    return True


def _use(folder, seconds):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    # The directory in use is looked up once; forget it.
    compilation_cache.reset_cache()
