"""One training process per working directory."""

import contextlib
import os
import socket
from pathlib import Path

import jax

from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.processes import agree

FILE = ".lock"


@contextlib.contextmanager
def locked(workdir):
    """Holds the lock of a working directory, which is made if need be. With several processes the first one holds it for all.

    The operating system keeps the lock and drops it when the process ends, however that happens: there is no stale lock,
    and neither host names nor clocks play a part.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    path, complaint, file = Path(workdir) / FILE, "", None
    if jax.process_index() == 0:
        try:
            file = _acquire(path)
        except UserError as error:
            complaint = str(error)
    try:
        if not agree(not complaint):
            raise UserError(complaint or f"The first process could not lock {path.parent.absolute()}: see its message.")
        yield
    finally:
        if file is not None:
            file.close()


def _acquire(path: Path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", errors="replace")
    except OSError as error:
        raise UserError(
            f"The working directory {path.parent.absolute()} cannot be written: {error.strerror}. Choose another --workdir."
        ) from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{path.parent.absolute()} is in use: {holder} trains there. Wait for it, stop it, or choose another --workdir."
        ) from error
    except (ImportError, OSError) as error:
        say(f"This file system has no locks ({error}): see to it that no other run uses {path.parent}.")
    with contextlib.suppress(OSError):  # on a full disk the note is lost, the lock is not
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file
