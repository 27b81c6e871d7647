"""The input pipeline of the ImageNet recipes alone: images/s by the clock, and processor time of an image.

    python -m benchmarks.image_pipeline

The pictures are JPEGs of 500 x 375 pixels, ImageNet's most usual size, cut out of the two photographs that scikit-learn
carries; `--quality` decides how heavy they are, and with it the work of decoding.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from deqjax.cli import load_config
from deqjax.data.images import pillow
from deqjax.data.photographs import SKLEARN, photograph
from experiments.mdeq_classify import ClassificationTask

SIZE = (375, 500)


def write_pictures(root: Path, n: int, quality: int) -> float:
    """So many JPEGs in train/<class>/ and val/<class>/, a class for each photograph; their mean size in kB."""
    random, Image, sizes = np.random.default_rng(0), pillow(), []
    for split in ("train", "val"):
        for name in SKLEARN:
            folder, image = root / split / name, photograph(name)
            folder.mkdir(parents=True)
            for k in range(n // len(SKLEARN)):
                top, left = random.integers(0, np.subtract(image.shape[:2], SIZE) + 1)
                path = folder / f"{k}.JPEG"
                Image.fromarray(image[top : top + SIZE[0], left : left + SIZE[1]]).save(path, quality=quality)
                sizes.append(path.stat().st_size / 1000)
    return float(np.mean(sizes))


def timed(batches) -> tuple[float, float]:
    """Images per second of the clock, and milliseconds of all cores for an image."""
    clock, cpu = time.perf_counter(), time.process_time()
    n = sum(len(batch["images"]) for batch in batches)
    return n / (time.perf_counter() - clock), 1e3 * (time.process_time() - cpu) / n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=["configs/mdeq_imagenet.py:small", "configs/mdeq_imagenet.py:small_ift"])
    parser.add_argument("--images", type=int, default=512, help="JPEGs of a split")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--batches", type=int, default=8, help="to measure")
    parser.add_argument("--threads", type=int, help="default one per core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_pictures(Path(folder), options.images, options.quality)
        print(f"JPEGs of {SIZE[1]} x {SIZE[0]}, {size:.0f} kB on average")
        for name in options.config:
            config = load_config(name)
            config.data.dir, config.model.n_classes, config.data.threads = folder, len(SKLEARN), options.threads
            config.data.batch_size = config.data.eval_batch_size = 64
            task = ClassificationTask(config)
            stream = task.data("train")
            stream.batch(0)  # from here on two are always in the making
            training = timed(stream.batch(step) for step in range(1, options.batches + 1))
            evaluation = timed(task.evaluation("test"))
            for kind, (rate, cpu) in (("training", training), ("evaluation", evaluation)):
                print(f"{name}, {kind}: {rate:,.0f} images/s, {cpu:.2f} ms of all cores for an image", flush=True)


if __name__ == "__main__":
    main()
