"""The Python manual as a small corpus: real English that every CPython carries in `pydoc_data.topics`.

The rule that makes it, the same for every version of Python (whose manuals differ, and so do the numbers of tokens):

* Topics in sorted order, cut into paragraphs at blank lines. A paragraph that occurred before is dropped: the topics
  quote each other at length, and held-out text must not be in the training text. So are lines of four or more
  characters that have no word in them, the underlines of headings and the rules of tables.
* Lines become words (with their case, underscores included), numbers and single other characters.
* Consecutive paragraphs gather into blocks of 500 or more tokens; of ten blocks the ninth goes to valid, the tenth to
  test, the others to train. Whole topics differ too much in length (from 100 tokens to 15,000) to be split that way.
* A blank line follows every paragraph.
* Tokens that occur fewer than 3 times in train become `<unk>` in all three.
"""

import os
import pathlib
import re
from collections import Counter

from deqjax.data.errors import DataError
from deqjax.data.text import SPLITS, UNK, TextCorpus, find_split

WORD = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?|[^\w\s]")
RULE = re.compile(r"[\W_]{4,}")
BLOCK = 500
MIN_COUNT = 3


def pydoc(directory: str | os.PathLike) -> TextCorpus:
    """Loads the corpus from `directory`, where it is written as `train.txt`, `valid.txt` and `test.txt` on first use.

    Raises:
      DataError: this Python carries no manual, the directory cannot be written, or its files are damaged.
    """
    directory = pathlib.Path(directory)
    if any(find_split(directory, split) is None for split in SPLITS):
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError(
                f"this Python has no pydoc_data.topics; copy train.txt, valid.txt, test.txt to {directory}."
            ) from error
        _write(directory, topics)
    return TextCorpus.load(directory)


def _write(directory, topics):
    """Writes the three files, each at once; whatever else has one of their names is somebody's and stays."""
    files = {
        split: "".join(f" {' '.join(words)} \n" if words else " \n" for words in lines).encode()
        for split, lines in split_topics(topics).items()
    }
    try:
        for split, content in files.items():
            path = find_split(directory, split)
            if path is not None and path.read_bytes() != content:
                raise DataError(
                    f"{path} is not the manual's, so nothing is written beside it. A corpus of your own needs train.txt, "
                    "valid.txt and test.txt, and is read with --config.data.name=text."
                )
        directory.mkdir(parents=True, exist_ok=True)
        for split, content in files.items():
            temporary = directory / f".{split}.txt.{os.getpid()}"
            temporary.write_bytes(content)
            os.replace(temporary, directory / f"{split}.txt")
    except OSError as error:
        raise DataError(f"cannot write the corpus to {directory}: {error.strerror or error}.") from error


def split_topics(topics: dict[str, str]) -> dict[str, list[list[str]]]:
    """Lines of words for train, valid and test, by the rule above; `topics` maps names to texts."""
    blocks, size, seen = [[]], 0, set()
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            content = tuple(word for line in paragraph for word in line)
            if content in seen:
                continue
            seen.add(content)
            blocks[-1] += [*paragraph, []]
            size += len(content) + len(paragraph) + 1
            if size >= BLOCK:
                blocks.append([])
                size = 0
    lines = {"train": [], "valid": [], "test": []}
    for i, block in enumerate(blocks):
        lines[{8: "valid", 9: "test"}.get(i % 10, "train")] += block
    counts = Counter(word for line in lines["train"] for word in line)
    return {
        split: [[word if counts[word] >= MIN_COUNT else UNK for word in line] for line in text] for split, text in lines.items()
    }


def _paragraphs(text):
    """Runs of lines that hold words, each line a list of words."""
    paragraph = []
    for line in [*text.split("\n"), ""]:
        if RULE.fullmatch(line.strip()):
            continue
        if words := WORD.findall(line):
            paragraph.append(words)
        elif paragraph:
            yield paragraph
            paragraph = []
