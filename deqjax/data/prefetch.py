"""Batches by number: which items they hold, and threads that prepare them ahead of their use."""

import concurrent.futures
import functools
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Job = Callable[[], Any]


def rows_of_batch(seed: int, step: int, n_items: int, batch_size: int) -> np.ndarray:
    """Which of the items are in training batch `step`, `[batch_size]`.

    Every epoch has an order of its own; what is left at its end of less than a batch is dropped.
    """
    epoch, part = divmod(step, n_items // batch_size)
    return _order(seed, epoch, n_items)[part * batch_size : (part + 1) * batch_size]


@functools.lru_cache(maxsize=2)  # batches are prepared across the end of an epoch
def _order(seed, epoch, n_items):
    order = np.random.default_rng((seed, epoch)).permutation(n_items)
    order.flags.writeable = False  # it is shared
    return order


def _cores() -> int:
    """How many this process may use; macOS and Windows do not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Prefetch:
    """A stream whose batches are made in background threads.

    What a batch holds depends on its number alone, never on the threads: whoever makes the jobs gives each a random
    generator of its own, e.g. `np.random.default_rng((seed, step, row))`.

    Args:
      jobs: the jobs of batch `step`, such as one per sample, or one for a whole batch of arrays in memory.
      collate: their results, in order, as a batch.
      threads: how many; 0 prepares every batch when it is asked for. Reading and decoding files release Python's lock.
      ahead: how many batches are kept ready or in the making.
    """

    def __init__(
        self,
        jobs: Callable[[int], Sequence[Job]],
        collate: Callable[[list], dict[str, np.ndarray]],
        *,
        threads: int | None = None,
        ahead: int = 2,
    ):
        threads = _cores() if threads is None else threads
        if threads < 0 or ahead < 1:
            raise ValueError(f"threads={threads} must be 0 or more, and ahead={ahead} 1 or more.")
        self._jobs, self._collate, self._ahead = jobs, collate, ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "input") if threads else None
        self._pending: dict[int, list[concurrent.futures.Future]] = {}
        if self._pool is not None:
            # Without this the interpreter would wait for what nobody wants any more.
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch `step`; those after it are begun. Raises what one of its jobs has raised."""
        if self._pool is None:
            return self._collate([job() for job in self._jobs(step)])
        wanted = range(step, step + 1 + self._ahead)
        for other in [s for s in self._pending if s not in wanted]:
            _cancel(self._pending.pop(other))
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = [self._pool.submit(job) for job in self._jobs(s)]
        futures = self._pending.pop(step)
        try:
            return self._collate([future.result() for future in futures])
        finally:
            # If one has failed, nobody wants the others.
            _cancel(futures)

    def cancel(self) -> None:
        """Gives up what has been begun ahead of its use: a program waits at its end for all that is queued."""
        for step in list(self._pending):
            _cancel(self._pending.pop(step))

    def rate(self, seconds: float = 2.0, most: int = 16) -> float:
        """Batches per second of the pipeline alone, measured over so many seconds (or batches), the first one left out."""
        self.batch(0)
        start, done = time.monotonic(), 0
        while done < most and (done == 0 or time.monotonic() - start < seconds):
            done += 1
            self.batch(done)
        return done / max(time.monotonic() - start, 1e-9)


def _cancel(futures):
    for future in futures:
        future.cancel()


def stacked(samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Samples as a batch, each array with a leading axis."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
