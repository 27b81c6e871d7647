"""Word-level text: a vocabulary, the encoded streams of a corpus, and ordered batches for models with a memory.

The format is that of WikiText: UTF-8 files of words that are already separated by whitespace, one line per paragraph.
"""

import array
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from deqjax.data.errors import DataError

EOS = "<eos>"
UNK = "<unk>"
SPLITS = ("train", "valid", "test")
CACHE_VERSION = 2  # raise it when the encoding changes, so that older caches are not used


def _lines(path):
    """The lines of a text file, each split into words.

    Only `\\n`, `\\r` and `\\r\\n` end a line; the other line separators of Unicode (where `str.splitlines` ends it) part words.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # without the mark that some editors put in front
            for line in file:
                yield line.split()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8 ({error.reason}).") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


class Vocabulary:
    """Words and their ids. Id 0 is `<eos>`, the end of a line; the others follow by descending count in the training text.

    Attributes:
      tokens: the words in id order, a list of V strings.
      counts: how often each occurred in training, int64 [V] (0 for `<eos>`, which is not counted), or None if unknown.
    """

    def __init__(self, tokens: Sequence[str], counts: np.ndarray | None = None):
        """Takes the words in id order; raises DataError unless they start with `<eos>`, differ, and are as many as counts."""
        self.tokens, self.counts = list(tokens), None if counts is None else np.asarray(counts, np.int64)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or self.tokens[0] != EOS:
            raise DataError(f"a vocabulary starts with {EOS}, this one with {self.tokens[:1]}.")
        if len(self._ids) != len(self.tokens):
            raise DataError(f"{len(self.tokens) - len(self._ids)} words of the vocabulary are repeated.")
        if self.counts is not None and self.counts.shape != (len(self.tokens),):
            raise DataError(f"{len(self.tokens)} words but counts of shape {self.counts.shape}.")

    @classmethod
    def build(cls, path: str | os.PathLike) -> "Vocabulary":
        """Counts the words of a training file; words of equal count keep the order of their first appearance.

        Raises:
          DataError: the file cannot be read, is not UTF-8, or holds no words.
        """
        counter = Counter()
        for words in _lines(path):
            counter.update(words)
        if not counter:
            raise DataError(f"{path} is empty: it holds no words.")
        marked = counter.pop(EOS, 0)  # a literal `<eos>` in the text is the same word
        ranked = counter.most_common()  # a stable sort of a dict in order of first appearance
        return cls([EOS, *(word for word, _ in ranked)], np.array([marked, *(n for _, n in ranked)]))

    def encode_file(self, path: str | os.PathLike) -> np.ndarray:
        """Encodes a file as one stream, int32 [T]: the ids of each line followed by 0, blank lines included.

        Raises:
          DataError: a word is not in the vocabulary, or the file cannot be read, is not UTF-8, or holds no words.
        """
        ids, lookup = array.array("i"), self._ids.__getitem__  # compact: the largest corpora have 1e8 words
        try:
            for number, words in enumerate(_lines(path), 1):  # noqa: B007 (the error below names the line)
                ids.extend(map(lookup, words))
                ids.append(0)
        except KeyError as error:
            where = f"{error.args[0]!r} in line {number} of {path}"
            raise DataError(f"{where} is not in the training text; such words are written {UNK} in this format.") from None
        stream = np.frombuffer(ids, np.intc).astype(np.int32, copy=False) if ids else np.zeros(0, np.int32)
        if not stream.any():
            raise DataError(f"{path} is empty: it holds no words.")
        return stream

    def encode(self, words: str | Iterable[str]) -> np.ndarray:
        """Encodes words (or a text, which is split at whitespace) for a prompt: int32 [T], without a final `<eos>`.

        Raises:
          DataError: a word is unknown and the vocabulary has no `<unk>` to take its place.
        """
        unknown, ids = self._ids.get(UNK), []
        for word in words.split() if isinstance(words, str) else words:
            index = self._ids.get(word, unknown)
            if index is None:
                raise DataError(f"{word!r} is not in the vocabulary ({len(self)} words), which has no {UNK} to stand for it.")
            ids.append(index)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The words of `ids` [T], separated by spaces; `encode` inverts it. Raises DataError on ids outside the vocabulary."""
        ids = np.asarray(list(ids), np.int64)
        wrong = ids[(ids < 0) | (ids >= len(self))]
        if wrong.size:
            raise DataError(f"id {wrong[0]} is outside the vocabulary of {len(self)} words.")
        return " ".join(self.tokens[i] for i in ids)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the words as UTF-8 text, one per line in id order (counts are not kept), replacing the file at once."""
        temporary = pathlib.Path(f"{os.fspath(path)}.{os.getpid()}")
        temporary.write_bytes("".join(f"{token}\n" for token in self.tokens).encode())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Vocabulary":
        """Reads what `save` wrote; raises DataError if the file cannot be read or is no vocabulary."""
        lines = list(_lines(path))
        if any(len(words) != 1 for words in lines):
            raise DataError(f"{path} is not a vocabulary: one word per line is expected.")
        return cls([word for (word,) in lines])

    def fingerprint(self) -> str:
        """A short hash of the words in order: equal fingerprints mean that ids mean the same."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()[:12]

    def __len__(self):
        return len(self.tokens)


def find_split(directory: str | os.PathLike, split: str) -> pathlib.Path | None:
    """The file of a split in `directory` under either of its names, or None."""
    names = (f"{split}.txt", f"wiki.{split}.tokens")
    return next((path for name in names if (path := pathlib.Path(directory, name)).is_file()), None)


class TextCorpus:
    """The encoded streams of a corpus: `train`, `valid`, `test`, int32 [T] each, and the `vocab` of the training text."""

    def __init__(self, train: np.ndarray, valid: np.ndarray, test: np.ndarray, vocab: Vocabulary):
        self.train, self.valid, self.test, self.vocab = train, valid, test, vocab

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "TextCorpus":
        """Reads `train.txt`, `valid.txt` and `test.txt` (or `wiki.train.tokens` and so on) from `directory`.

        The result is cached in `directory/.deqjax` and used again while size and time of the files stay the same.

        Raises:
          DataError: a file is missing, empty or not UTF-8, or valid or test hold a word that train does not.
        """
        directory = pathlib.Path(directory)
        paths = [find_split(directory, split) for split in SPLITS]
        missing = [f"{split}.txt" for split, path in zip(SPLITS, paths, strict=True) if path is None]
        if missing:
            what = f"{', '.join(missing)} not found in {directory}" if directory.is_dir() else f"there is no folder {directory}"
            raise DataError(
                f"{what}. Expected: a folder with train.txt, valid.txt and test.txt (or wiki.train.tokens and so on), UTF-8, "
                "words separated by spaces. For a corpus that needs no download: --config configs/pydoc.py"
            )
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        key = hashlib.sha256(repr((CACHE_VERSION, states)).encode()).hexdigest()[:16]
        cached = cls._from_cache(directory / ".deqjax" / key)
        if cached is not None:
            return cached
        vocab = Vocabulary.build(paths[0])
        corpus = cls(*(vocab.encode_file(path) for path in paths), vocab)
        corpus._to_cache(directory / ".deqjax", key)
        return corpus

    @classmethod
    def _from_cache(cls, folder):
        try:
            vocab = Vocabulary(Vocabulary.load(folder / "vocab.txt").tokens, np.load(folder / "counts.npy", allow_pickle=False))
            streams = [np.load(folder / f"{split}.npy", allow_pickle=False) for split in SPLITS]
        except (OSError, ValueError, EOFError):  # absent or damaged: read the text again
            return None
        sound = all(s.dtype == np.int32 and s.ndim == 1 and s.size and 0 <= s.min() <= s.max() < len(vocab) for s in streams)
        return cls(*streams, vocab) if sound else None

    def _to_cache(self, folder, key):
        """Writes a complete folder under another name and renames it, so that other processes see all of it or nothing."""
        temporary = None
        try:
            folder.mkdir(exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
            temporary.chmod(0o755)  # mkdtemp keeps others out, who may share the data
            self.vocab.save(temporary / "vocab.txt")
            np.save(temporary / "counts.npy", self.vocab.counts, allow_pickle=False)
            for split in SPLITS:
                np.save(temporary / f"{split}.npy", getattr(self, split), allow_pickle=False)
            for old in folder.iterdir():
                if not old.name.startswith("unfinished-"):  # of other versions of the files, or damaged
                    shutil.rmtree(old, ignore_errors=True)
            os.replace(temporary, folder / key)
        except OSError:  # a folder that cannot be written, or another process was faster
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


class OrderedBatches:
    """Batches that walk a stream in order, so that a memory of the previous batch is the context of the next.

    The stream is cut into parallel ones of equal length; every batch is the next segment of each. All epochs are alike.

    Attributes:
      streams: the parallel streams of this shard, int32 [B, n_step].
      lengths: the length of each segment of an epoch, int [n_segments].
      n_segments: batches per epoch.
      n_predicted: positions scored per stream and epoch.
    """

    def __init__(
        self, ids: np.ndarray, batch_size: int, length: int, *, shard: int = 0, shards: int = 1, varlen_seed: int | None = None
    ):
        """Cuts the stream.

        Args:
          ids: the stream, int [T].
          batch_size: parallel streams over all shards.
          length: positions per segment; the last one of an epoch is shorter.
          shard, shards: which of how many equal parts of the batch to take (one per process).
          varlen_seed: if given, segments vary in length as in `varlen_lengths`, the same in every epoch and shard.

        Raises:
          DataError: the stream is too short for the batch.
          ValueError: a size is not positive, or the batch does not split into the shards.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or batch_size < 1 or length < 1:
            raise ValueError(f"need a flat stream and positive sizes, got shape {ids.shape}, {batch_size=}, {length=}")
        if not 0 <= shard < shards or batch_size % shards:
            raise ValueError(f"batch_size {batch_size} does not split into {shards} shards, or there is no shard {shard}")
        n_step = ids.size // batch_size
        if n_step < 2:
            raise DataError(f"{ids.size} tokens are too few for a batch of {batch_size} streams: each needs 2 or more.")
        rows = batch_size // shards
        streams = ids[: n_step * batch_size].reshape(batch_size, n_step)
        self.streams = streams[shard * rows : (shard + 1) * rows].astype(np.int32, copy=False)
        if varlen_seed is None:
            starts = np.arange(0, n_step - 1, length)
            self.lengths = np.minimum(length, n_step - 1 - starts)
        else:
            self.lengths = varlen_lengths(n_step, length, varlen_seed)
            starts = np.cumsum(self.lengths) - self.lengths
        self._starts = starts
        self.n_segments = len(self.lengths)
        self.n_predicted = int(self.lengths.sum())

    def batch(self, step: int) -> dict:
        """Batch number `step`, counted over all epochs; depends on nothing else.

        Returns:
          `tokens` and, one position further, `targets`, both int32 [B, L]; `reset`: True on the first segment of an
          epoch, where a memory has to be emptied.

        Raises:
          ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        segment = step % self.n_segments
        start, length = self._starts[segment], self.lengths[segment]
        # Copies, so that no owner of a batch can change the data.
        tokens, targets = (self.streams[:, i : i + length].copy() for i in (start, start + 1))
        return {"tokens": tokens, "targets": targets, "reset": bool(segment == 0)}


def varlen_lengths(
    n_step: int, length: int, seed: int, *, std: float = 5, min_len: int = 5, max_deviation: int = 3
) -> np.ndarray:
    """Random segment lengths of Transformer-XL's `--varlen`: normal around `length`, once in twenty around its half.

    For streams of `n_step` tokens; drawn with standard deviation `std` between `min_len` and
    `length + max_deviation * std`. Returns int [n_segments], the last being what remains. Their sum may be n_step - 2
    instead of n_step - 1: the original skips a remainder of one position.
    """
    random = np.random.RandomState(seed)  # the generator and the order of calls of the original, to repeat its lengths
    lengths, start = [], 0
    while start < n_step - 2 or not lengths:
        centre = length if random.random_sample() < 0.95 else length / 2
        drawn = min(int(length + max_deviation * std), max(min_len, int(random.normal(centre, std))))
        lengths.append(min(drawn, n_step - 1 - start))
        start += lengths[-1]
    return np.array(lengths)


def unigram_perplexity(train_ids: np.ndarray, eval_ids: np.ndarray, n_tokens: int) -> float:
    """Perplexity on `eval_ids` [T'] of the add-one smoothed frequencies in `train_ids` [T] of a vocabulary of `n_tokens`."""
    counts = np.bincount(train_ids, minlength=n_tokens) + 1
    return float(np.exp(-np.mean(np.log(counts / counts.sum())[eval_ids])))
