"""Batches made by background threads."""

import contextlib
import functools
import os
import threading

import numpy as np
import pytest

from deqjax.data.errors import DataError
from deqjax.data.prefetch import Prefetch, rows_of_batch, stacked


def numbered(step):
    def job(row):
        return {"x": np.random.default_rng((step, row)).normal(size=3), "n": np.int32(step)}

    return [lambda row=row: job(row) for row in range(4)]


def test_an_epoch_holds_every_item_once_in_an_order_of_its_own():
    epochs = [np.concatenate([rows_of_batch(3, 2 * epoch + part, 9, 4) for part in (0, 1)]) for epoch in (0, 1)]
    assert all(len(set(rows)) == 8 and set(rows) <= set(range(9)) for rows in epochs)
    assert not np.array_equal(*epochs) and not np.array_equal(rows_of_batch(4, 0, 9, 4), rows_of_batch(3, 0, 9, 4))


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_batches_depend_on_their_number_alone(threads):
    stream = Prefetch(numbered, stacked, threads=threads)
    for step in (0, 1, 2, 7, 3, 3):
        batch = stream.batch(step)
        expected = stacked([job() for job in numbered(step)])
        np.testing.assert_array_equal(batch["x"], expected["x"])
        assert np.all(batch["n"] == step)
    assert stream.rate(seconds=0.01) > 0


def test_the_next_batches_are_made_meanwhile_and_no_more():
    begun, ready = [], threading.Event()

    def jobs(step):
        def job():
            begun.append(step)
            if len(set(begun)) == 3:
                ready.set()
            return {"x": np.zeros(1)}

        return [job]

    stream = Prefetch(jobs, stacked, threads=2, ahead=2)
    stream.batch(0)
    assert ready.wait(10) and sorted(set(begun)) == [0, 1, 2]


def test_threads_do_without_what_only_linux_tells(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert len(Prefetch(numbered, stacked).batch(1)["x"]) == len(numbered(1))


def test_what_a_thread_raises_reaches_the_caller():
    def jobs(step):
        def job():
            raise DataError("no such image")

        return [job]

    with pytest.raises(DataError, match="no such image"):
        Prefetch(jobs, stacked).batch(0)
    with pytest.raises(ValueError, match="ahead=0"):
        Prefetch(jobs, stacked, ahead=0)


@pytest.mark.parametrize("fails", [True, False])
def test_what_is_queued_when_a_stream_ends_is_not_done(fails):
    """A program waits at its end for every job that a thread pool has."""
    done, free = [], threading.Event()

    def job(step, row):
        if (step, row) == (0, 4) and fails:
            raise DataError("torn file")
        if step or (row > 4):
            free.wait()
        done.append((step, row))
        return {"x": np.zeros(1)}

    stream = Prefetch(lambda step: [functools.partial(job, step, row) for row in range(10 if fails else 5)], stacked, threads=1)
    with pytest.raises(DataError, match="torn file") if fails else contextlib.nullcontext():
        stream.batch(0)
    stream.cancel()
    free.set()
    stream._pool.shutdown()
    # One more may have been under way.
    assert len(done) <= (5 if fails else 6)
