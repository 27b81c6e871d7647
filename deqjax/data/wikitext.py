"""WikiText-103 (Merity et al., "Pointer Sentinel Mixture Models", arXiv:1609.07843), word level."""

import hashlib
import http.client
import os
import pathlib
import shutil
import tempfile
import urllib.request
import warnings
import zipfile

from deqjax.data.errors import DataError
from deqjax.data.text import SPLITS, TextCorpus, find_split

URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
MD5 = "9ddaacaf6af0710eda8c456decff7832"
# Tokens per split, `<eos>` included, and words of the vocabulary.
SIZES = {"train": 103_227_021, "valid": 217_646, "test": 245_569, "vocabulary": 267_735}


def wikitext103(directory: str | os.PathLike) -> TextCorpus:
    """Loads WikiText-103 from `directory`; what is absent there is downloaded (190 MB) and checked first.

    A `wikitext-103-v1.zip` in the directory is used in place of the download.
    Warns if the numbers of tokens are not those of WikiText-103.

    Raises:
      DataError: the files are absent and cannot be downloaded, or the archive or the files are damaged.
    """
    directory = pathlib.Path(directory)
    missing = [split for split in SPLITS if find_split(directory, split) is None]
    if missing:
        archive = directory / "wikitext-103-v1.zip"
        if archive.is_file():
            _unpack(archive, directory, missing)
        else:
            _download(directory, missing)
    corpus = TextCorpus.load(directory)
    found = {split: len(getattr(corpus, split)) for split in SPLITS} | {"vocabulary": len(corpus.vocab)}
    for name, size in SIZES.items():
        if found[name] != size:
            warnings.warn(
                f"{directory} is not the usual WikiText-103: {name} has {found[name]:,} tokens instead of {size:,}; "
                "perplexities do not compare with published ones.",
                stacklevel=2,
            )
    return corpus


def _download(directory, missing):
    # The server refuses the agent that urllib names by default.
    request = urllib.request.Request(URL, headers={"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".wikitext-", suffix=".zip") as file:
                shutil.copyfileobj(response, file, 1 << 20)
                file.flush()
                _unpack(file.name, directory, missing)
    except (OSError, http.client.HTTPException) as error:  # no network, a refusal, a timeout, a full disk
        raise DataError(
            f"WikiText-103 is not in {directory} ({', '.join(missing)} missing) and could not be downloaded from {URL} "
            f"({error}). Put wikitext-103-v1.zip there, or its train.txt, valid.txt and test.txt (wiki.train.tokens and so on "
            "are fine too). For a corpus that needs no download: --config configs/pydoc.py"
        ) from error


def _unpack(archive, directory, missing):
    """Checks the archive and writes the missing splits, each at once; files that exist are left alone."""
    with open(archive, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != MD5:
        raise DataError(f"{archive} is damaged or not the archive of {URL}: md5 {md5}, expected {MD5}.")
    with zipfile.ZipFile(archive) as contents:
        for split in missing:
            temporary = directory / f".{split}.txt.{os.getpid()}"
            try:
                with contents.open(f"wikitext-103/wiki.{split}.tokens") as source, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(temporary, directory / f"{split}.txt")
            finally:
                temporary.unlink(missing_ok=True)
