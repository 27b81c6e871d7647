"""The corpus made of the Python manual: its rule, and that it is made once."""

import sys

import numpy as np
import pytest

from deqjax.data.errors import DataError
from deqjax.data.pydoc import BLOCK, MIN_COUNT, pydoc, split_topics
from deqjax.data.text import SPLITS, TextCorpus, unigram_perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pydoc"
    pydoc(folder)
    return folder


def test_sizes(folder):
    corpus = TextCorpus.load(folder)
    sizes = np.array([len(getattr(corpus, split)) for split in SPLITS])
    assert sizes[0] > 50_000 and np.all(sizes[1:] > 0.05 * sizes.sum()) and np.all(sizes[1:] < 0.12 * sizes.sum())
    assert corpus.vocab.counts[1:].min() >= MIN_COUNT
    assert 100 < unigram_perplexity(corpus.train, corpus.valid, len(corpus.vocab)) < 300
    unknown = corpus.vocab.tokens.index("<unk>")
    assert 0 < np.mean(corpus.valid == unknown) < 0.1


def test_held_out_text_is_not_in_train(folder):
    lines = {split: [x for x in (folder / f"{split}.txt").read_text().split("\n") if len(x) > 40] for split in SPLITS}
    for split in ("valid", "test"):
        assert np.mean([line in set(lines["train"]) for line in lines[split]]) < 0.03


def test_written_once(folder):
    before = {split: (folder / f"{split}.txt").stat().st_mtime_ns for split in SPLITS}
    pydoc(folder)
    assert before == {split: (folder / f"{split}.txt").stat().st_mtime_ns for split in SPLITS}
    assert sorted(p.name for p in folder.iterdir()) == [".deqjax", "test.txt", "train.txt", "valid.txt"]


def test_tokens():
    text = 'The "__init__" of x2\n*****\n\n+----+---+\n| 3.14 | 10_000 |\n' + "The The x2 x2 of of | | | | 3.14 3.14\n"
    lines = split_topics({"a": text})["train"]
    assert lines[0] == ["The", "<unk>", "<unk>", "<unk>", "of", "x2"]
    assert lines[1] == []
    assert lines[2] == ["|", "3.14", "|", "<unk>", "<unk>", "|"]


def test_blocks():
    topics = {f"{i:03}": f"word{i} {'w ' * BLOCK}\n\nshared line\n" for i in range(20)}
    lines = split_topics(topics)
    firsts = {split: [line for line in text if len(line) > BLOCK] for split, text in lines.items()}
    assert [len(firsts[split]) for split in SPLITS] == [16, 2, 2]
    assert sum(line == ["<unk>", "<unk>"] for text in lines.values() for line in text) == 1  # later copies are dropped
    assert split_topics(dict(reversed(topics.items()))) == lines


def test_no_manual(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data\.topics"):
        pydoc(tmp_path)


def test_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        pydoc(tmp_path / "file")


def test_files_of_somebody_else_are_left_alone(tmp_path):
    (tmp_path / "train.txt").write_text("my own words\n")
    with pytest.raises(DataError, match=r"data\.name=text"):
        pydoc(tmp_path)
    assert (tmp_path / "train.txt").read_text() == "my own words\n" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_first_use_is_completed(folder, tmp_path):
    (tmp_path / "train.txt").write_bytes((folder / "train.txt").read_bytes())
    assert len(pydoc(tmp_path).test) == len(pydoc(folder).test)
