"""Golden kind of the language model's data: vocabulary, streams, batches per rank, varying lengths."""

import pathlib
import tempfile

import numpy as np

from deqjax.data.text import SPLITS, OrderedBatches, TextCorpus, Vocabulary, varlen_lengths


def same(got, want, what):
    np.testing.assert_array_equal(np.asarray(got), want, err_msg=what)


def check_corpus(case, corpus):
    """Everything that the files alone determine. Returns the names of the arrays that were compared."""
    assert "\n".join(corpus.vocab.tokens).encode() == case["out/vocab_utf8_nl"].tobytes()
    same(corpus.vocab.counts, case["out/counts"], "counts")
    for split in SPLITS:
        ids = getattr(corpus, split)
        assert ids.dtype == np.int32
        same(ids, case[f"out/{split}_ids"], f"{split}_ids")
    return {"out/vocab_utf8_nl", "out/counts", *(f"out/{split}_ids" for split in SPLITS)}


def check_rank(case, corpus, world, rank):
    prefix, config = f"out/w{world}r{rank}", case.meta["config"]
    data = OrderedBatches(corpus.train, config["bsz"], config["bptt"], shard=rank, shards=world)
    batches = [data.batch(step) for step in range(data.n_segments)]
    want = {
        "stream": data.streams.T,
        "n_batch": data.n_segments,
        "seq_lens": [batch["tokens"].shape[1] for batch in batches],
        "first_data": batches[0]["tokens"].T,
        "first_target": batches[0]["targets"].T,
        "last_data": batches[-1]["tokens"].T,
        "last_target": batches[-1]["targets"].T,
    }
    for name, got in want.items():
        same(got, case[f"{prefix}/{name}"], f"{prefix}/{name}")
    # Together, the batches are the stream.
    same(np.concatenate([batch["tokens"] for batch in batches], axis=1), data.streams[:, :-1], "tokens")
    same(np.concatenate([batch["targets"] for batch in batches], axis=1), data.streams[:, 1:], "targets")
    assert [batch["reset"] for batch in batches] == [True] + [False] * (len(batches) - 1)
    return {f"{prefix}/{name}" for name in want}


def check_varlen(case, corpus):
    config = case.meta["config"]
    varlen = config["varlen"]
    bptt, seed = varlen["bptt"], varlen["numpy_global_seed"]
    n_step = len(corpus.train) // config["bsz"]
    limits = {name: varlen[name] for name in ("std", "min_len", "max_deviation")}
    same(varlen_lengths(n_step, bptt, seed, **limits), case["out/varlen_seq_lens"], "varlen_seq_lens")
    if limits == {"std": 5, "min_len": 5, "max_deviation": 3}:  # those that the batches use, as the original did
        data = OrderedBatches(corpus.train, config["bsz"], bptt, varlen_seed=seed)
        batches = [data.batch(step) for step in range(data.n_segments)]
        same([batch["tokens"].shape[1] for batch in batches], case["out/varlen_seq_lens"], "varlen lengths")
        same(batches[-1]["targets"].T, case["out/varlen_last_target"], "varlen_last_target")
    return {"out/varlen_seq_lens", "out/varlen_last_target"}


def check_data(case, sub):
    """Writes the files, loads them (twice where the case asks for it) and compares every array."""
    config = case.meta["config"]
    assert config["dataset"] == "wt103", f"unknown data set {config['dataset']!r}"
    with tempfile.TemporaryDirectory() as directory:
        for split in SPLITS:
            pathlib.Path(directory, f"{split}.txt").write_bytes(case[f"in/{split}_utf8"].tobytes())
        corpus = TextCorpus.load(directory)
        compared = check_corpus(case, corpus)
        if config.get("verify_reload"):
            corpus = TextCorpus.load(directory)  # from the cache
            check_corpus(case, corpus)
        vocab_file = pathlib.Path(directory, "saved.txt")
        corpus.vocab.save(vocab_file)
        assert Vocabulary.load(vocab_file).fingerprint() == corpus.vocab.fingerprint()

    for world in config["worlds"]:
        for rank in range(world):
            compared |= check_rank(case, corpus, world, rank)
    if "out/valid_stream" in case:
        streams = case["out/valid_stream"].shape[1]
        same(OrderedBatches(corpus.valid, streams, config["bptt"]).streams.T, case["out/valid_stream"], "valid_stream")
        compared.add("out/valid_stream")
    if config.get("varlen"):
        compared |= check_varlen(case, corpus)
    left = {name for name in case.arrays if name.startswith("out/")} - compared
    assert not left, f"not compared: {sorted(left)}"
