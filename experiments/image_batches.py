"""Batches of image experiments: which images, in what order, made by threads, spread over processes and devices."""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.image_set import Damaged
from deqjax.data.prefetch import Prefetch, rows_of_batch, stacked
from deqjax.training.console import say
from deqjax.training.mesh import check_divisible, make_mesh, place_whole, process_share

SPLITS = ("train", "valid", "test")


def chosen_rows(config, n_images: int, step: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Numbers of the images in this process's share of training batch `step`, and a seed for each.

    Raises:
      UserError: the batch cannot be split evenly.
    """
    B, mesh = config.data.batch_size, make_mesh(config.get("mesh"))
    share, shares = process_share(mesh)
    if B % shares:
        check_divisible(mesh, B, "The batch")
    places = np.split(np.arange(B), shares)[share]
    return rows_of_batch(config.seed, step, n_images, B)[places], [(config.seed, step, int(place)) for place in places]


def training_stream(config, jobs: Callable, in_memory: bool = False) -> Prefetch:
    """The batches, with a word on how fast they can be made.

    Args:
      jobs: see `Prefetch`; one per image, or one for the batch if the images are in memory.
    """
    stream = Prefetch(jobs, _only if in_memory else stacked, threads=config.data.threads, ahead=config.data.ahead)
    images = config.data.batch_size / process_share(make_mesh(config.get("mesh")))[1]
    say(f"Input pipeline alone: {stream.rate() * images:,.0f} images/s in this process")
    return stream


def evaluation_batches(config, n_images: int, load: Callable, in_memory: bool = False) -> Iterator[dict]:
    """All images in order, on the devices; the last batch is filled up with rows that do not count.

    Args:
      load: sample number i, with `counted`; if the images are in memory, the samples of an array of numbers.
    """
    B, mesh = config.data.eval_batch_size, make_mesh(config.get("mesh"))

    def row(i):
        sample = load(min(i, n_images - 1))
        return sample if i < n_images else sample | {"counted": np.bool_(False)}

    def whole(numbers):
        batch = load(np.minimum(numbers, n_images - 1))
        return batch | {"counted": batch["counted"] & (numbers < n_images)}

    def jobs(step):
        numbers = np.arange(step * B, (step + 1) * B)
        return [functools.partial(whole, numbers)] if in_memory else [functools.partial(row, int(i)) for i in numbers]

    n_batches = -(-n_images // B)
    stream = Prefetch(
        lambda step: jobs(step) if step < n_batches else [], _only if in_memory else stacked, threads=config.data.threads
    )
    for step in range(n_batches):
        yield place_whole(mesh, stream.batch(step))


def _only(parts):
    return parts[0]


def read_or_blank(read: Callable[[int], tuple], number: int, damaged: Damaged, blank: Callable[[], tuple]) -> tuple:
    """Item `number` and True; what `blank` makes and False for an item that cannot be read, which is noted."""
    try:
        return read(number), True
    except DataError as error:
        damaged.note(number, error)
        return blank(), False


def skipped(damaged: Damaged, n_images: int) -> dict[str, float]:
    """How many images of an evaluation did not count, as a metric; nothing if all did.

    Raises:
      DataError: none did.
    """
    if len(damaged) >= n_images:
        raise DataError(f"none of {n_images} images could be evaluated; the first: {next(iter(damaged.messages.values()))}")
    return {"skipped": float(len(damaged))} if len(damaged) else {}
