"""Archives that are downloaded on first use, checked, and unpacked file by file."""

import hashlib
import http.client
import os
import pathlib
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence

from deqjax.data.errors import DataError


def fetch(
    directory: str | os.PathLike, archive: str, url: str, files: Sequence[str], checksum: str, otherwise: str
) -> pathlib.Path:
    """The directory, with the files in it: they are there, or in an archive that is there, or the archive is downloaded.

    Args:
      directory: where they belong.
      archive: name of the archive in the directory and on the server; a zip.
      url: where it is downloaded from.
      files: names of the wanted files, wherever they lie inside the archive.
      checksum: of the archive, "sha256:..." or "md5:...".
      otherwise: what to do without a network.

    Raises:
      DataError: the files are absent and cannot be downloaded, or the archive lacks one, is damaged or is another one.
    """
    directory = pathlib.Path(directory)
    missing = [name for name in files if not (directory / name).is_file()]
    if not missing:
        return directory
    if (directory / archive).is_file():
        mend = f"Remove it to have it downloaded again from {url}."
        _unpack(directory / archive, directory, missing, checksum, f"{directory / archive}", mend)
        return directory
    # Some servers refuse the agent that urllib names by default.
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".download-", suffix=".zip") as file:
                shutil.copyfileobj(response, file, 1 << 20)
                file.flush()
                mend = f"Try again, or put {archive} or its files into {directory}. {otherwise}"
                _unpack(pathlib.Path(file.name), directory, missing, checksum, f"What came from {url}", mend)
    except (OSError, http.client.HTTPException) as error:  # no network, a refusal, a timeout, a full disk
        raise DataError(
            f"{directory} lacks {', '.join(missing)}, and {url} could not be downloaded ({error}). Put {archive} or its files "
            f"there. {otherwise}"
        ) from error
    return directory


def _unpack(path, directory, missing, checksum, what, mend):
    """Checks the archive and writes the missing files, each at once; files that exist are left alone."""
    try:
        with zipfile.ZipFile(path) as contents:
            places = {pathlib.PurePosixPath(name).name: name for name in contents.namelist()}
    except zipfile.BadZipFile as error:
        raise DataError(f"{what} is damaged: it is no zip archive. {mend}") from error
    if absent := [name for name in missing if name not in places]:
        raise DataError(f"{what} lacks {', '.join(absent)}; it holds {', '.join(sorted(filter(None, places)))}. {mend}")
    algorithm, _, expected = checksum.partition(":")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if digest != expected:
        raise DataError(f"{what} is damaged or another archive: {algorithm} {digest}, expected {expected}. {mend}")
    with zipfile.ZipFile(path) as contents:
        for name in missing:
            temporary = directory / f".{name}.{os.getpid()}"
            try:
                with contents.open(places[name]) as source, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(temporary, directory / name)
            finally:
                temporary.unlink(missing_ok=True)
