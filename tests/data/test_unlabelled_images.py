"""Images for generative models: batches, and the readers of each layout."""

import io

import numpy as np
import pytest

from deqjax.data.celeba import celeba
from deqjax.data.errors import DataError
from deqjax.data.image_lmdb import ffhq, lsun
from deqjax.data.unlabelled_images import ImageBatches, folder, padded_digits, split, take

lmdb = pytest.importorskip("lmdb")
Image = pytest.importorskip("PIL.Image")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def database(path, entries):
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)


def test_batches_are_epochs_of_every_image_and_shares_of_one_batch():
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    batches = ImageBatches(images, 4, seed=3)
    epoch = np.concatenate([batches.batch(step)["image"][:, 0, 0, 0] for step in (0, 1)])
    assert len(set(epoch.tolist())) == 8
    np.testing.assert_array_equal(batches.batch(5)["image"], ImageBatches(images, 4, seed=3).batch(5)["image"])
    assert not np.array_equal(batches.batch(2)["image"], batches.batch(0)["image"])
    parts = [ImageBatches(images, 4, seed=3, shard=k, shards=2).batch(1)["image"] for k in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), batches.batch(1)["image"])
    with pytest.raises(DataError, match="10 images, fewer than the 11"):
        ImageBatches(images, 11)
    with pytest.raises(DataError, match="float64 numbers: they must have 8 bits"):
        ImageBatches(images / 255, 4)
    with pytest.raises(DataError, match="2 processes cannot share a batch of 5 images evenly"):
        ImageBatches(images, 5, shards=2)


def test_mirroring_is_of_half_the_images():
    images = np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None], (64, 3, 4, 1)).copy()
    mirrored = ImageBatches(images, 64, flip=True).batch(0)["image"][:, 0, 0, 0] == 3
    assert 16 < mirrored.sum() < 48


def test_digits_are_in_the_middle_and_a_tenth_is_held_out():
    train, test = padded_digits(16)
    assert train.shape == (1618, 16, 16, 1) and test.shape == (179, 16, 16, 1) and train.max() == 255
    assert not train[:, :4].any() and not train[:, 12:].any() and train[:, 4:12, 4:12].any(axis=(0, 3)).mean() > 0.9
    with pytest.raises(DataError, match="8x8"):
        padded_digits(7)


def test_any_folder_is_scaled_and_cut_to_the_centre(tmp_path):
    left, middle = np.zeros((8, 20, 3), np.uint8), np.zeros((8, 20, 3), np.uint8)
    left[:, :4], middle[:, 8:12] = 255, 255
    for name, image in (("a.png", left), ("below/b.png", middle)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    images = folder(tmp_path, 4)
    assert len(images) == 2 and images[0].max() < 20 and images[1].mean() > 80
    assert take(images, [1, 0, 1]).shape == (3, 4, 4, 3)
    assert folder(tmp_path, 4, channels=1)[1].shape == (4, 4, 1)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"c\.png is no picture"):
        take(folder(tmp_path, 4), range(3))
    train, test = split(folder(tmp_path, 4), 0.34)
    assert (len(train), len(test)) == (2, 1)


def test_celeba_is_split_as_published_and_cut_to_the_face(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    image = np.zeros((218, 178, 3), np.uint8)
    image[57:185, 25:153] = 255
    for number, part in ((1, 0), (2, 0), (3, 1), (4, 2)):
        Image.fromarray(image).save(tmp_path / "img_align_celeba" / f"{number:06d}.png")
        with open(tmp_path / "list_eval_partition.txt", "a") as file:
            file.write(f"{number:06d}.png {part}\n")
    splits = celeba(tmp_path, 64)
    assert {name: len(files) for name, files in splits.items()} == {"train": 2, "valid": 1, "test": 1}
    assert splits["test"][0].shape == (64, 64, 3) and splits["test"][0].min() == 255
    Image.fromarray(image[:50]).save(tmp_path / "img_align_celeba" / "000004.png")
    with pytest.raises(DataError, match="178x218"):
        splits["test"][0]
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(DataError, match="line 1"):
        celeba(tmp_path)
    with pytest.raises(DataError, match="img_align_celeba"):
        celeba(tmp_path / "elsewhere")


def test_lsun_is_read_from_its_database(tmp_path):
    images = [picture(12, 20, n) for n in range(3)]
    database(tmp_path / "bedroom_train_lmdb", {f"key{n}".encode(): encoded(image) for n, image in enumerate(images)})
    bedroom = lsun(tmp_path, "bedroom", 12)
    assert len(bedroom) == 3
    np.testing.assert_array_equal(bedroom[2], images[2][:, 4:16])
    assert take(bedroom, [0, 1, 2, 0]).shape == (4, 12, 12, 3)
    database(tmp_path / "cat_train_lmdb", {b"damaged": b"no picture"})
    with pytest.raises(DataError, match=r"'damaged'.*no picture"):
        lsun(tmp_path, "cat", 12)[0]
    with pytest.raises(DataError, match=r"church_outdoor_val_lmdb/data\.mdb"):
        lsun(tmp_path, "church_outdoor", split="val")
    (tmp_path / "cat_val_lmdb").mkdir()
    (tmp_path / "cat_val_lmdb" / "data.mdb").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="no LMDB database"):
        lsun(tmp_path, "cat", split="val")


def test_ffhq_is_read_at_the_resolution_asked_for(tmp_path):
    entries = {f"8-{n:05d}".encode(): encoded(picture(8, 8, n)) for n in range(10)}
    database(tmp_path, entries | {b"length": b"10"})
    train, test = ffhq(tmp_path, 8)
    assert (len(train), len(test)) == (9, 1)
    order = np.random.RandomState(2019).permutation(10)
    np.testing.assert_array_equal(test[0], picture(8, 8, int(order[9])))
    with pytest.raises(DataError, match="'16-0000"):
        ffhq(tmp_path, 16)[0][0]
    with pytest.raises(DataError, match=r"data\.mdb"):
        ffhq(tmp_path / "elsewhere")
