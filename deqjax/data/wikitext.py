"""WikiText-103 (Merity et al., "Pointer Sentinel Mixture Models", arXiv:1609.07843), word level."""

import os
import pathlib
import warnings

from deqjax.data.download import fetch
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
    missing = [f"wiki.{split}.tokens" for split in SPLITS if find_split(directory, split) is None]
    otherwise = "Files called train.txt, valid.txt and test.txt will do as well. For a corpus that needs no download: "
    fetch(directory, "wikitext-103-v1.zip", URL, missing, f"md5:{MD5}", otherwise + "--config configs/pydoc.py")
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
