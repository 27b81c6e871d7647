"""Image data: every published form, damaged and unusual files."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from deqjax.data import augment
from deqjax.data.cifar import cifar10
from deqjax.data.cityscapes import LABEL_IDS, Cityscapes, label_ids, training_numbers
from deqjax.data.digits import digits
from deqjax.data.errors import DataError
from deqjax.data.image_set import Damaged, FromTFDS, ImageArrays, class_folders
from deqjax.data.recordio import record_images
from deqjax.data.shapes import Shapes


def random_images(n, size, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


# CIFAR ---------------------------------------------------------------------------------------------------------------


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_cifar(folder, kind):
    """A small CIFAR-10 in one of its forms; returns its images and labels by split."""
    contents, expected = {}, {"train": ([], []), "test": ([], [])}
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images, labels = random_images(3, 32, number), np.arange(3) + number
        split = "test" if name == "test_batch" else "train"
        expected[split][0].append(images)
        expected[split][1].append(labels)
        if kind.startswith("python"):
            # As Python 2 wrote them: keys of bytes.
            contents[name] = pickle.dumps({b"data": planes(images), b"labels": labels.tolist(), b"filenames": [b"x.png"]}, 2)
        else:
            contents[name + ".bin"] = np.hstack([labels[:, None].astype(np.uint8), planes(images)]).tobytes()
    inside = "cifar-10-batches-py" if kind.startswith("python") else "cifar-10-batches-bin"
    if kind.endswith("archive"):
        with tarfile.open(folder / f"cifar-10-{kind.partition(' ')[0]}.tar.gz", "w:gz") as tar:
            for name, data in reversed(contents.items()):
                info = tarfile.TarInfo(f"{inside}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        (folder / inside).mkdir()
        for name, data in contents.items():
            (folder / inside / name).write_bytes(data)
    return {split: tuple(map(np.concatenate, parts)) for split, parts in expected.items()}


@pytest.mark.parametrize("kind", ["python archive", "python folder", "binary archive", "binary folder"])
def test_every_form_of_cifar_holds_the_same(tmp_path, kind):
    expected = write_cifar(tmp_path, kind)
    for split, (images, labels) in expected.items():
        found = cifar10(tmp_path, split)
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, labels)
        assert len(found.classes) == 10


def test_cifar_that_is_absent_or_damaged_is_named(tmp_path):
    with pytest.raises(DataError, match="mdeq_digits"):
        cifar10(tmp_path, "train")
    write_cifar(tmp_path, "binary folder")
    batch = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    batch.write_bytes(batch.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"test_batch\.bin is damaged"):
        cifar10(tmp_path, "test")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        cifar10(tmp_path, "train")


def test_a_cut_archive_is_an_error_and_a_pickle_runs_nothing(tmp_path):
    write_cifar(tmp_path, "python archive")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match="is damaged"):
        cifar10(tmp_path, "train")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match="nothing was run"):
        cifar10(tmp_path, "test")


def test_prepared_sets_of_tfds_are_read_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataError, match="cannot read cifar10"):
        cifar10(tmp_path, "train")
    with tfds.testing.mock_data(num_examples=7):
        assert cifar10(tmp_path, "test").images.shape == (7, 32, 32, 3)


def test_an_example_that_tfds_cannot_decode_is_named():
    def decode(i):
        raise RuntimeError("Not a JPEG file")

    images = FromTFDS(type("Source", (), {"__getitem__": lambda self, i: decode(i)})(), ("a",), "imagenet2012, train,")
    with pytest.raises(DataError, match=r"example 3 of imagenet2012, train, cannot be read \(Not a JPEG file\)"):
        images[3]


# Folders and records -------------------------------------------------------------------------------------------------


def encoded(image, kind="JPEG", mode=None):
    file = io.BytesIO()
    picture = Image.fromarray(image) if mode is None else Image.fromarray(image).convert(mode)
    picture.save(file, kind)
    return file.getvalue()


def write_folders(root, classes=("n01", "n02"), per_class=2):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(per_class):
            (root / name / f"{k}.JPEG").write_bytes(encoded(random_images(1, 40, 10 * number + k)[0]))


def test_a_class_is_the_rank_of_its_folder(tmp_path):
    write_folders(tmp_path, ("n02", "n01", "n10"))
    found = class_folders(tmp_path)
    assert list(found.classes) == ["n01", "n02", "n10"] and list(found.labels) == [0, 0, 1, 1, 2, 2]
    image, label = found[4]
    assert image.shape == (40, 40, 3) and label == 2


def test_missing_and_empty_class_folders_are_named(tmp_path):
    write_folders(tmp_path / "train", ("a", "b", "c"))
    write_folders(tmp_path / "val", ("a", "c", "d"))
    with pytest.raises(DataError, match="lacks the class folders b, and the training set has no d"):
        class_folders(tmp_path / "val", class_folders(tmp_path / "train").classes)
    for file in (tmp_path / "train" / "b").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no images in the class folders b"):
        class_folders(tmp_path / "train")
    with pytest.raises(DataError, match="no such folder"):
        class_folders(tmp_path / "nowhere")


def test_images_of_every_mode_become_colour(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    colour = random_images(1, 24)[0]
    (folder / "cmyk.jpg").write_bytes(encoded(colour, mode="CMYK"))
    (folder / "grey.jpg").write_bytes(encoded(colour, mode="L"))
    (folder / "palette.png").write_bytes(encoded(colour, "PNG", "P"))
    Image.fromarray(np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) * 100).save(folder / "sixteen.png")
    for image, _ in map(class_folders(tmp_path).__getitem__, range(4)):
        square = augment.resize_and_center(image, 16, 12)
        assert square.shape == (12, 12, 3)
        normal = augment.normalize(square, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert normal.dtype == np.float32 and np.all(np.abs(normal) < 3)


def write_records(path, items):
    """`NAME.rec` and `NAME.idx`; a payload that contains the magic number is written in parts, as MXNet does."""
    magic, data, index = struct.pack("<I", 0xCED7230A), b"", []
    for number, (label, image) in enumerate(items):
        several = label if isinstance(label, tuple) else ()
        head = struct.pack("<IfQQ", len(several), 0.0 if several else label, number, 0)
        payload = head + struct.pack(f"<{len(several)}f", *several) + image
        parts = payload.split(magic)
        index.append(f"{number}\t{len(data)}\n")
        for k, part in enumerate(parts):
            flag = 0 if len(parts) == 1 else 1 if k == 0 else 3 if k == len(parts) - 1 else 2
            data += magic + struct.pack("<I", flag << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
    path.write_bytes(data)
    path.with_suffix(".idx").write_text("".join(index))


def test_records_are_read_whole_split_and_with_several_labels(tmp_path):
    images = random_images(3, 16)
    with_magic = encoded(images[1], "PNG") + struct.pack("<I", 0xCED7230A) + b"tail"
    write_records(
        tmp_path / "a.rec", [(3.0, encoded(images[0], "PNG")), (1.0, with_magic), ((7.0, 2.0), encoded(images[2], "PNG"))]
    )
    found = record_images(tmp_path / "a.rec", 10)
    assert len(found) == 3
    for i, label in enumerate((3, 1, 7)):
        np.testing.assert_array_equal(found[i][0], images[i])
        assert found[i][1] == label


def test_damaged_records_are_named(tmp_path):
    items = [(3.0, encoded(random_images(1, 16)[0])), (12.0, b"no picture"), (2.0, b"no picture"), (float("nan"), b"")]
    write_records(tmp_path / "a.rec", items)
    found = record_images(tmp_path / "a.rec", 10)
    with pytest.raises(DataError, match=r"record 3 of .*label nan is not one of"):
        found[3]
    with pytest.raises(DataError, match=r"record 1 of .*label 12 is not one of 0 to 9"):
        found[1]
    with pytest.raises(DataError, match=r"record 2 of .*no picture that can be read"):
        found[2]
    (tmp_path / "a.idx").write_text("0\t4\n")
    with pytest.raises(DataError, match=r"no record begins at byte 4"):
        record_images(tmp_path / "a.rec", 10)[0]
    for content in (b"0 0\n", b"0\t\xff\n", b"0\t" + b"9" * 20 + b"\n"):
        (tmp_path / "a.idx").write_bytes(content)
        with pytest.raises(DataError, match="line 1: expected a key, a tab and a byte offset"):
            record_images(tmp_path / "a.rec", 10)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(DataError, match=r"a\.idx: there is no such file"):
        record_images(tmp_path / "a.rec", 10)


def test_damaged_images_are_skipped_counted_and_told_once(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "n01" / "0.JPEG").write_bytes(b"")
    (tmp_path / "n01" / "1.JPEG").write_bytes((tmp_path / "n01" / "1.JPEG").read_bytes()[:300])
    told = []
    damaged, images = Damaged(told.append), class_folders(tmp_path)
    for _ in range(2):
        _, label = damaged.next_sound(images, 0)
        assert label == 1
    assert len(damaged) == len(told) == 2 and "n01/1.JPEG" in told[1]
    # After the last comes the first again.
    np.testing.assert_array_equal(damaged.next_sound(images, len(images))[0], images[2][0])
    with pytest.raises(DataError, match="2 damaged images in a row, from number 0 on"):
        damaged.next_sound(images, 0, most=2)


# Cityscapes ----------------------------------------------------------------------------------------------------------


def write_cityscapes(root, split="train", n=2, size=(32, 64), ids=(7, 26, 0, 33)):
    for k in range(n):
        for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            folder = root / kind / split / "town"
            folder.mkdir(parents=True, exist_ok=True)
            image = np.resize(np.asarray(ids, np.uint8), size)
            image = image if kind == "gtFine" else random_images(1, max(size), k)[0][: size[0], : size[1]]
            Image.fromarray(image).save(folder / f"town_{k}_{suffix}.png")


def test_cityscapes_from_folders_and_from_lists(tmp_path):
    write_cityscapes(tmp_path)
    found = Cityscapes(tmp_path, "train")
    image, labels = found[0]
    assert len(found) == 2 and image.shape == (32, 64, 3)
    np.testing.assert_array_equal(labels[0, :4], [0, 13, 255, 18])
    lists = tmp_path / "list" / "cityscapes"
    lists.mkdir(parents=True)
    pair = "leftImg8bit/train/town/town_1_leftImg8bit.png gtFine/train/town/town_1_gtFine_labelIds.png\n"
    (lists / "train.lst").write_text(pair)
    np.testing.assert_array_equal(Cityscapes(tmp_path, "train")[0][0], found[1][0])
    (lists / "test.lst").write_text(pair.split()[0] + "\n")
    assert np.all(Cityscapes(tmp_path, "test")[0][1] == 255)
    (lists / "train.lst").write_text(pair + pair.split()[0] + "\n")
    with pytest.raises(DataError, match=r"train\.lst, line 2: expected an image and its labels"):
        Cityscapes(tmp_path, "train")
    (lists / "train.lst").write_text(pair + "leftImg8bit/train/town/gone.png gtFine/gone.png\n")
    with pytest.raises(DataError, match=r"lacks 2 files of train, the first of them leftImg8bit/train/town/gone\.png"):
        Cityscapes(tmp_path, "train")
    with pytest.raises(DataError, match="mdeq_shapes"):
        Cityscapes(tmp_path / "nowhere", "train")


def test_label_ids_have_training_numbers_and_back(tmp_path):
    ids = np.asarray([*range(34), 255], np.uint8)[None]
    numbers = training_numbers(ids, "x")[0]
    assert [numbers[i] for i in LABEL_IDS] == list(range(19)) and np.sum(numbers == 255) == 35 - 19
    np.testing.assert_array_equal(label_ids(np.arange(19)), LABEL_IDS)
    write_cityscapes(tmp_path, ids=(7, 34, 200))
    with pytest.raises(DataError, match="label ids 34, 200 are outside 0 to 33"):
        Cityscapes(tmp_path, "train")[0]


# Offline sets --------------------------------------------------------------------------------------------------------


def test_the_offline_sets_are_what_they_say():
    sets = [digits(split) for split in ("train", "valid", "test")]
    assert [len(s) for s in sets] == [1197, 300, 300] and all(set(s.labels) == set(range(10)) for s in sets)
    shapes = Shapes("train", 100)
    for i in range(4):
        image, labels = shapes[i]
        assert image.shape == (32, 32, 3) and set(np.unique(labels)) <= {0, 1, 2, 3}
        np.testing.assert_array_equal(image, Shapes("train", 100)[i][0])
    assert not np.array_equal(shapes[0][0], Shapes("test", 100)[0][0])
    counts = np.bincount(np.concatenate([shapes[i][1].ravel() for i in range(100)]), minlength=4)
    assert np.all(counts[1:] > 0.03 * counts.sum()) and counts[0] > counts[1:].max()


def test_arrays_are_images():
    images = ImageArrays(random_images(3, 4), np.arange(3), ("a", "b", "c"))
    assert images[1][1] == 1 and len(images.subset(np.asarray([2]))) == 1
