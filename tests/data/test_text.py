"""Vocabulary, corpus and batches: properties, and every error. The exact values are in the goldens."""

import hashlib
import io
import os
import subprocess
import sys
import urllib.error
import warnings
import zipfile

import numpy as np
import pytest

from deqjax.data import text, wikitext
from deqjax.data.errors import DataError
from deqjax.data.text import OrderedBatches, TextCorpus, Vocabulary, unigram_perplexity, varlen_lengths

TRAIN = " b a a \n \n <unk> c b a\n"


@pytest.fixture
def folder(tmp_path):
    for split, content in {"train": TRAIN, "valid": " a <unk>\n", "test": " c \n"}.items():
        (tmp_path / f"{split}.txt").write_text(content)
    return tmp_path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_no_jax():
    code = "import sys, deqjax.data.text, deqjax.data.wikitext, deqjax.data.pydoc; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestVocabulary:
    def test_order(self, folder):
        vocab = Vocabulary.build(folder / "train.txt")
        assert vocab.tokens == ["<eos>", "a", "b", "<unk>", "c"]  # by count, then by first appearance
        assert vocab.counts.tolist() == [0, 3, 2, 1, 1]
        assert vocab.encode_file(folder / "train.txt").tolist() == [2, 1, 1, 0, 0, 3, 4, 2, 1, 0]

    def test_whitespace(self, tmp_path):
        path = write(tmp_path / "x", "a\u00a0b\u2028c\u0085d\u3000e\x1cf\rg\r\nh\n\ni")
        vocab = Vocabulary.build(path)
        lines = vocab.decode(vocab.encode_file(path)).split("<eos>")
        assert [line.split() for line in lines] == [list("abcdef"), ["g"], ["h"], [], ["i"], []]

    def test_literal_eos(self, tmp_path):
        path = write(tmp_path / "x", "a <eos> b\n")
        vocab = Vocabulary.build(path)
        assert vocab.tokens == ["<eos>", "a", "b"] and vocab.counts.tolist() == [1, 1, 1]
        assert vocab.encode_file(path).tolist() == [1, 0, 2, 0]

    def test_encode_decode(self):
        vocab = Vocabulary(["<eos>", "a", "<unk>"])
        assert vocab.encode("a  zebra <eos>").tolist() == [1, 2, 0]
        assert vocab.encode(["a", "a"]).dtype == np.int32
        assert vocab.encode("").shape == (0,)
        assert vocab.decode(np.array([1, 0, 2])) == "a <eos> <unk>"
        for ids in ([3], [-1]):
            with pytest.raises(DataError, match="outside the vocabulary"):
                vocab.decode(ids)
        with pytest.raises(DataError, match=r"'zebra'.*no <unk>"):
            Vocabulary(["<eos>", "a"]).encode(["zebra"])

    def test_save_load(self, tmp_path):
        vocab = Vocabulary(["<eos>", "日本", "a"])
        vocab.save(tmp_path / "v.txt")
        loaded = Vocabulary.load(tmp_path / "v.txt")
        assert loaded.tokens == vocab.tokens and loaded.fingerprint() == vocab.fingerprint() and loaded.counts is None
        assert [p.name for p in tmp_path.iterdir()] == ["v.txt"]
        assert Vocabulary(["<eos>", "a", "日本"]).fingerprint() != vocab.fingerprint()

    @pytest.mark.parametrize(
        "content, match", [("a\n", "starts with"), ("<eos>\na\na\n", "repeated"), ("<eos>\n\n", "one word")]
    )
    def test_wrong_file(self, tmp_path, content, match):
        with pytest.raises(DataError, match=match):
            Vocabulary.load(write(tmp_path / "v.txt", content))

    def test_wrong_counts(self):
        with pytest.raises(DataError, match="counts"):
            Vocabulary(["<eos>", "a"], np.zeros(3))


class TestCorpus:
    def test_load(self, folder):
        corpus = TextCorpus.load(folder)
        assert corpus.train.dtype == corpus.valid.dtype == corpus.test.dtype == np.int32
        assert corpus.valid.tolist() == [1, 3, 0] and corpus.test.tolist() == [4, 0]

    def test_wikitext_names(self, folder):
        for split in ("train", "valid", "test"):
            (folder / f"{split}.txt").rename(folder / f"wiki.{split}.tokens")
        assert len(TextCorpus.load(folder).vocab) == 5

    def test_cache(self, folder, monkeypatch):
        first = TextCorpus.load(folder)
        with monkeypatch.context() as patch:
            patch.setattr(Vocabulary, "build", None)  # the cache does not need it
            second = TextCorpus.load(folder)
        for split in ("train", "valid", "test"):
            np.testing.assert_array_equal(getattr(first, split), getattr(second, split))
        assert second.vocab.tokens == first.vocab.tokens and second.vocab.counts.tolist() == first.vocab.counts.tolist()

        write(folder / "test.txt", "a b\n")
        assert TextCorpus.load(folder).test.tolist() == [1, 2, 0]
        assert len(list((folder / ".deqjax").iterdir())) == 1  # the outdated one is gone

        os.utime(folder / "test.txt", ns=(1, 1))  # a new time is enough, whatever the content
        assert TextCorpus.load(folder).test.tolist() == [1, 2, 0]

    @pytest.mark.parametrize("damage", [b"", b"nonsense", None])
    def test_damaged_cache(self, folder, damage):
        first = TextCorpus.load(folder)
        (path,) = (folder / ".deqjax").glob("*/valid.npy")
        path.unlink() if damage is None else path.write_bytes(damage)
        assert TextCorpus.load(folder).valid.tolist() == first.valid.tolist()
        assert np.load(path).tolist() == first.valid.tolist()  # repaired

    def test_ids_outside(self, folder):
        first = TextCorpus.load(folder)
        (path,) = (folder / ".deqjax").glob("*/valid.npy")
        np.save(path, np.array([99], np.int32))
        assert TextCorpus.load(folder).valid.tolist() == first.valid.tolist()

    def test_cache_cannot_be_written(self, folder, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError

        monkeypatch.setattr(text.os, "replace", refuse)
        assert TextCorpus.load(folder).test.tolist() == [4, 0]
        assert list((folder / ".deqjax").iterdir()) == []
        (folder / ".deqjax").rmdir()
        write(folder / ".deqjax", "in the way")
        assert TextCorpus.load(folder).test.tolist() == [4, 0]

    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"no folder(.|\n)*train\.txt(.|\n)*configs/pydoc\.py"):
            TextCorpus.load(tmp_path / "nowhere")

    def test_missing_file(self, folder):
        (folder / "valid.txt").unlink()
        with pytest.raises(DataError, match=r"^valid\.txt not found.*Expected.*configs/pydoc\.py"):
            TextCorpus.load(folder)

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    @pytest.mark.parametrize("content, match", [("", "empty"), (" \n\n", "empty"), (b"a \xff\n", "UTF-8")])
    def test_bad_file(self, folder, split, content, match):
        write(folder / f"{split}.txt", content)
        with pytest.raises(DataError, match=rf"{split}\.txt.*{match}"):
            TextCorpus.load(folder)

    def test_a_mark_of_the_encoding_is_no_part_of_the_first_word(self, folder):
        expected = TextCorpus.load(folder).vocab.tokens
        text = (folder / "train.txt").read_text()
        write(folder / "train.txt", f"\ufeff{text}".encode())
        assert TextCorpus.load(folder).vocab.tokens == expected

    def test_unknown_word(self, folder):
        write(folder / "test.txt", "a\n\nb zebra\n")
        with pytest.raises(DataError, match=r"'zebra' in line 3 of .*test\.txt"):
            TextCorpus.load(folder)

    def test_unreadable(self, tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            Vocabulary.build(tmp_path)


class TestBatches:
    @pytest.mark.parametrize("seed", [None, 0, 1, 2])
    @pytest.mark.parametrize("size, batch, length", [(100, 4, 6), (101, 2, 7), (10, 5, 3), (9, 4, 1), (64, 1, 200)])
    def test_covers_the_stream(self, size, batch, length, seed):
        ids = np.arange(size)
        data = OrderedBatches(ids, batch, length, varlen_seed=seed)
        batches = [data.batch(step) for step in range(data.n_segments)]
        tokens, targets = (np.concatenate([b[name] for b in batches], axis=1) for name in ("tokens", "targets"))
        np.testing.assert_array_equal(targets, tokens + 1)
        n_step = size // batch
        np.testing.assert_array_equal(tokens, ids[: n_step * batch].reshape(batch, n_step)[:, : data.n_predicted])
        assert data.n_predicted == tokens.shape[1]
        assert data.n_predicted == n_step - 1 or (seed is not None and data.n_predicted == n_step - 2)
        assert all(b["tokens"].dtype == b["targets"].dtype == np.int32 and b["tokens"].size for b in batches)

    def test_epochs(self):
        data = OrderedBatches(np.arange(50), 2, 7)
        assert [data.batch(step)["reset"] for step in range(8)] == [True, False, False, False] * 2
        assert type(data.batch(0)["reset"]) is bool
        late = data.batch(10**9 * data.n_segments + 3)
        np.testing.assert_array_equal(late["tokens"], data.batch(3)["tokens"])

    def test_shards(self):
        whole = OrderedBatches(np.arange(200), 6, 5)
        parts = [OrderedBatches(np.arange(200), 6, 5, shard=i, shards=3) for i in range(3)]
        for step in range(whole.n_segments + 1):
            joined = np.concatenate([part.batch(step)["tokens"] for part in parts])
            np.testing.assert_array_equal(joined, whole.batch(step)["tokens"])

    def test_a_batch_is_a_copy(self):
        data = OrderedBatches(np.arange(20, dtype=np.int32), 2, 5)
        data.batch(0)["tokens"][:] = -1
        assert data.batch(0)["tokens"].min() == 0

    def test_varlen(self):
        lengths = varlen_lengths(100_000, 100, seed=3)
        assert lengths[:-1].max() <= 115 and lengths[:-1].min() >= 5
        assert 0.02 < np.mean(lengths < 75) < 0.08  # about half as long, once in twenty
        np.testing.assert_array_equal(lengths, varlen_lengths(100_000, 100, seed=3))
        assert varlen_lengths(100_000, 100, seed=4)[:10].tolist() != lengths[:10].tolist()

    def test_too_short(self):
        OrderedBatches(np.arange(8), 4, 3)
        with pytest.raises(DataError, match="7 tokens are too few for a batch of 4"):
            OrderedBatches(np.arange(7), 4, 3)

    @pytest.mark.parametrize(
        "ids, batch, length, options",
        [
            (np.zeros((4, 4)), 2, 2, {}),
            (np.arange(9), 0, 2, {}),
            (np.arange(9), 2, 0, {}),
            (np.arange(9), 3, 2, {"shards": 2}),
            (np.arange(9), 2, 2, {"shard": 2, "shards": 2}),
        ],
    )
    def test_wrong_sizes(self, ids, batch, length, options):
        with pytest.raises(ValueError):
            OrderedBatches(ids, batch, length, **options)

    def test_negative_step(self):
        with pytest.raises(ValueError, match="negative"):
            OrderedBatches(np.arange(9), 2, 2).batch(-1)


def test_unigram_perplexity():
    assert unigram_perplexity(np.array([0, 1, 2, 3]), np.array([0, 3, 3]), 4) == pytest.approx(4)
    assert unigram_perplexity(np.array([0, 0]), np.array([1]), 2) == pytest.approx(4)  # unseen: (0 + 1) / (2 + 2)


class TestWikitext:
    @pytest.fixture
    def archive(self, monkeypatch):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            for split in ("train", "valid", "test"):
                file.writestr(f"wikitext-103/wiki.{split}.tokens", TRAIN)
        monkeypatch.setattr(wikitext, "MD5", hashlib.md5(content.getvalue()).hexdigest())
        return content.getvalue()

    def serve(self, monkeypatch, answer):
        def urlopen(request, timeout):
            assert "Mozilla" in request.get_header("User-agent") and timeout == 20
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    def test_download(self, tmp_path, monkeypatch, archive):
        self.serve(monkeypatch, archive)
        with pytest.warns(UserWarning, match="not the usual WikiText-103"):
            corpus = wikitext.wikitext103(tmp_path / "new")
        assert len(corpus.train) == 10
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
            ".deqjax",
            *(f"wiki.{split}.tokens" for split in ("test", "train", "valid")),
        ]

    def test_local_archive(self, tmp_path, monkeypatch, archive):
        self.serve(monkeypatch, urllib.error.URLError("no network"))
        write(tmp_path / "wikitext-103-v1.zip", archive)
        write(tmp_path / "test.txt", "a\n")
        with pytest.warns(UserWarning):
            corpus = wikitext.wikitext103(tmp_path)
        assert len(corpus.train) == 10 and len(corpus.test) == 2  # what exists is left alone

    def test_local_files(self, folder, monkeypatch):
        corpus = TextCorpus.load(folder)
        sizes = {split: len(getattr(corpus, split)) for split in text.SPLITS}
        monkeypatch.setattr(wikitext, "SIZES", sizes | {"vocabulary": len(corpus.vocab)})
        self.serve(monkeypatch, AssertionError("nothing to download"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wikitext.wikitext103(folder)

    def test_no_network(self, tmp_path, monkeypatch):
        self.serve(monkeypatch, urllib.error.URLError("no network"))
        with pytest.raises(DataError, match=r"lacks wiki\.train\.tokens.*smerity.*no network.*train\.txt.*configs/pydoc\.py"):
            wikitext.wikitext103(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_wrong_archive(self, tmp_path, monkeypatch):
        other = io.BytesIO()
        with zipfile.ZipFile(other, "w") as archive:
            for split in text.SPLITS:
                archive.writestr(f"wikitext-103/wiki.{split}.tokens", "another text")
        for served, message in ((b"<html>", "no zip archive"), (other.getvalue(), "another archive: md5")):
            self.serve(monkeypatch, served)
            with pytest.raises(DataError, match=message):
                wikitext.wikitext103(tmp_path)
        assert list(tmp_path.iterdir()) == []
