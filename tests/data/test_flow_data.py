"""Files, sets and augmentation of optical flow."""

import os
import struct

import numpy as np
import pytest

from deqjax.data import flow_sets
from deqjax.data.errors import DataError
from deqjax.data.flow_augment import FlowAugmentor
from deqjax.data.flow_colors import color_wheel, flow_to_image
from deqjax.data.flow_files import (
    read_flo,
    read_kitti,
    read_pfm,
    read_pfm_flow,
    write_flo,
    write_kitti,
    write_pfm,
    write_png16,
)
from deqjax.data.flow_sets import FlowSet, Pair, Sample, flying_chairs, flying_things, hd1k, kitti, sintel
from deqjax.data.images import pillow
from deqjax.data.warped_photos import smooth_field, warped_pair, warped_photos

RANDOM = np.random.default_rng(0)
FLOW = RANDOM.normal(0, 5, (5, 7, 2)).astype(np.float32)


def frame(path, size=(5, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow().fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    write_flo(tmp_path / "a.flo", FLOW)
    np.testing.assert_array_equal(read_flo(tmp_path / "a.flo"), FLOW)
    write_pfm(tmp_path / "a.pfm", FLOW)
    np.testing.assert_array_equal(read_pfm_flow(tmp_path / "a.pfm"), FLOW)
    write_pfm(tmp_path / "grey.pfm", FLOW[..., 0])
    np.testing.assert_array_equal(read_pfm(tmp_path / "grey.pfm"), FLOW[..., 0])
    valid = (RANDOM.random((5, 7)) < 0.5).astype(np.float32)
    write_kitti(tmp_path / "a.png", FLOW, valid)
    flow, known = read_kitti(tmp_path / "a.png")
    np.testing.assert_allclose(flow, FLOW, atol=1 / 64)
    np.testing.assert_array_equal(known, valid)


def test_vectors_too_long_for_kitti_stop_at_the_end_of_its_range(tmp_path):
    write_kitti(tmp_path / "a.png", np.full((2, 3, 2), 1e4))
    np.testing.assert_allclose(read_kitti(tmp_path / "a.png")[0], 511.98, atol=0.01)


def damaged_flo(folder):
    write_flo(folder / "whole.flo", FLOW)
    whole = (folder / "whole.flo").read_bytes()
    yield "truncated", whole[:-3]
    yield "truncated", whole[:9]
    yield "damaged", whole + b"more"
    yield "begins with", b"abcd" + whole[4:]
    yield "big-endian", whole[3::-1] + whole[4:]
    yield "damaged", whole[:4] + struct.pack("<ii", -7, 5) + whole[12:]
    yield "begins with", b""


def test_damaged_flo_files_are_named(tmp_path):
    for what, data in damaged_flo(tmp_path):
        (tmp_path / "bad.flo").write_bytes(data)
        with pytest.raises(DataError, match=rf"bad.flo.*{what}"):
            read_flo(tmp_path / "bad.flo")
    with pytest.raises(DataError, match="no such file"):
        read_flo(tmp_path / "absent.flo")


def test_damaged_pfm_and_png_files_are_named(tmp_path):
    path = tmp_path / "bad.pfm"
    for what, data in (("no .pfm", b"P6\n7 5\n255\n"), ("truncated", b"PF\n7 5\n-1\n1234"), ("no number", b"PF\n7 5\n-\n")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=what):
            read_pfm(path)
    write_pfm(path, FLOW[..., 0])
    with pytest.raises(DataError, match="grey"):
        read_pfm_flow(path)

    png = tmp_path / "bad.png"
    encoded = np.full((5, 7, 3), 2**15, np.uint16)
    encoded[..., 2] = 7
    write_png16(png, encoded)
    with pytest.raises(DataError, match=r"third channel.*0 or 1"):
        read_kitti(png)
    whole = png.read_bytes()
    png.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"damaged|truncated"):
        read_kitti(png)
    with pytest.raises(DataError, match="8 bits"):
        read_kitti(frame(png))
    png.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="no PNG"):
        read_kitti(png)


def test_flow_that_is_not_finite_is_not_written(tmp_path):
    bad = FLOW.copy()
    bad[0, 0, 0] = np.nan
    for write, name in ((write_flo, "a.flo"), (write_kitti, "a.png"), (write_pfm, "a.pfm")):
        with pytest.raises(DataError, match="finite"):
            write(tmp_path / name, bad)
        assert not list(tmp_path.iterdir())
    assert not np.any(flow_to_image(bad)[0, 0])


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    path, flow, replace = tmp_path / "a.flo", np.ones((3, 4, 2), np.float32), os.replace

    def after_the_other_process(*names):
        monkeypatch.setattr(os, "replace", replace)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 0)
            write_flo(path, flow)
        replace(*names)

    monkeypatch.setattr(os, "replace", after_the_other_process)
    write_flo(path, flow)
    np.testing.assert_array_equal(read_flo(path), flow)
    assert list(tmp_path.iterdir()) == [path]


def test_opposite_directions_have_different_colours_and_stillness_is_white():
    assert color_wheel().shape == (55, 3)
    flow = np.zeros((1, 3, 2))
    flow[0, 0, 0], flow[0, 2, 0] = 1, -1
    image = flow_to_image(flow)
    np.testing.assert_array_equal(image[0, 1], 255)
    assert np.abs(image[0, 0].astype(int) - image[0, 2]).max() > 100
    with pytest.raises(ValueError, match="H, W, 2"):
        flow_to_image(np.zeros((3, 4)))


# Sets ----------------------------------------------------------------------------------------------------------------


def test_sintel_and_kitti_are_listed_by_scene_and_their_missing_files_named(tmp_path):
    for rendering in ("clean", "final"):
        for scene, n in (("b", 3), ("a", 2)):
            for k in range(n):
                frame(tmp_path / f"Sintel/training/{rendering}/{scene}/frame_{k + 1:04d}.png")
    for scene, n in (("b", 2), ("a", 1)):
        for k in range(n):
            path = tmp_path / f"Sintel/training/flow/{scene}/frame_{k + 1:04d}.flo"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_flo(path, FLOW)
    pairs = sintel(tmp_path, "final")
    assert [pair.name for pair in pairs.pairs] == ["a/frame0001", "b/frame0001", "b/frame0002"]
    assert [pair.begins for pair in pairs.pairs] == [True, True, False]
    np.testing.assert_array_equal(pairs.read(1).flow, FLOW)
    path.unlink()
    with pytest.raises(DataError, match=r"2 frames.*0 fields"):
        sintel(tmp_path, "final")
    write_flo(path, FLOW)
    # Without its frame a field would be taken for the next one's.
    (tmp_path / "Sintel/training/clean/b/frame_0002.png").unlink()
    with pytest.raises(DataError, match=r"b lacks number 2 of its \*.png"):
        sintel(tmp_path, "clean")
    with pytest.raises(DataError, match="flow_warped_photos"):
        sintel(tmp_path, "clean", "test")

    frame(tmp_path / "KITTI/testing/image_2/000000_10.png")
    with pytest.raises(DataError, match=r"000000_11.png is missing"):
        kitti(tmp_path, "testing")
    frame(tmp_path / "KITTI/testing/image_2/000000_11.png", (6, 7))
    pairs = kitti(tmp_path, "testing")
    assert pairs.sparse and pairs.pairs[0].flow is None
    with pytest.raises(DataError, match="same size"):
        pairs.frames(0)
    with pytest.raises(DataError, match="not published"):
        pairs.read(0)


def test_things_are_listed_in_both_directions_of_time(tmp_path):
    base = tmp_path / "FlyingThings3D"
    for k in range(3):
        frame(base / f"frames_cleanpass/TRAIN/A/0000/left/{k:04d}.png")
        for direction in ("into_future", "into_past"):
            name = f"OpticalFlowInto{direction[5:].title()}_{k:04d}_L.pfm"
            path = base / f"optical_flow/TRAIN/A/0000/{direction}/left" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pfm(path, FLOW + k)
    pairs = flying_things(tmp_path, "clean")
    found = [(p.image1.stem, p.image2.stem, p.flow.stem, p.begins) for p in pairs.pairs]
    assert found == [
        ("0000", "0001", "OpticalFlowIntoFuture_0000_L", True),
        ("0001", "0002", "OpticalFlowIntoFuture_0001_L", False),
        ("0001", "0000", "OpticalFlowIntoPast_0001_L", True),
        ("0002", "0001", "OpticalFlowIntoPast_0002_L", True),
    ]
    np.testing.assert_allclose(pairs.read(3).flow, FLOW + 2, rtol=1e-6)
    path.with_name("OpticalFlowIntoPast_0001_L.pfm").unlink()
    with pytest.raises(DataError, match="into_past/left lacks number 1"):
        flying_things(tmp_path, "clean")


def test_hd1k_is_listed_by_sequence(tmp_path):
    for sequence, n in ((0, 3), (1, 2)):
        for k in range(n):
            frame(tmp_path / f"HD1k/hd1k_input/image_2/{sequence:06d}_{k:04d}.png")
            write_kitti(tmp_path / f"HD1k/hd1k_flow_gt/flow_occ/{sequence:06d}_{k:04d}.png", FLOW)
    assert [pair.name for pair in hd1k(tmp_path).pairs] == ["000000_0000", "000000_0001", "000001_0000"]


def test_vectors_that_are_not_known_are_not_valid(tmp_path):
    flow = FLOW.copy()
    flow[0, 0], flow[1, 1, 0] = np.nan, 1e10
    path = tmp_path / "a.flo"
    path.write_bytes(b"PIEH" + struct.pack("<ii", 7, 5) + flow.tobytes())
    frames = [frame(tmp_path / f"{k}.png") for k in range(2)]
    sample = FlowSet("own", [Pair(*frames, path, "a")]).read(0)
    assert sample.valid.sum() == 33 and np.all(np.isfinite(sample.flow))
    path.write_bytes(b"PIEH" + struct.pack("<ii", 7, 5) + (np.nan * flow).tobytes())
    with pytest.raises(DataError, match="none of its vectors is valid"):
        FlowSet("own", [Pair(*frames, path, "a")]).read(0)


# Warped photographs and augmentation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return warped_photos(tmp_path_factory.mktemp("photos"), n_train=3, n_valid=2, size=(48, 64), motion=4.0)


def unexplained(sample: Sample, flow):
    """Mean difference of the frames along a flow, to the nearest pixel, where the truth is known."""
    H, W = sample.valid.shape
    y, x = np.meshgrid(np.arange(H), np.arange(W), indexing="ij")
    at_x, at_y = (np.rint(c + flow[..., k]).astype(int) for k, c in enumerate((x, y)))
    known = (sample.valid > 0) & (at_x >= 0) & (at_x < W) & (at_y >= 0) & (at_y < H)
    differences = np.abs(sample.image1.astype(int) - sample.image2[at_y.clip(0, H - 1), at_x.clip(0, W - 1)])
    return differences[known].mean()


def test_warped_photographs_move_as_their_flow_says(photos):
    train, valid = flying_chairs(photos, "train"), flying_chairs(photos, "valid")
    assert (len(train), len(valid)) == (3, 2)
    for pairs in (train, valid):
        for number in range(len(pairs)):
            sample = pairs.read(number)
            assert sample.image1.shape == (48, 64, 3) and 0.5 < sample.valid.mean() <= 1
            assert unexplained(sample, sample.flow) < 0.5 * unexplained(sample, 0 * sample.flow)


def test_warped_photographs_are_the_same_at_every_writing_and_an_interrupted_set_is_begun_again(photos, tmp_path):
    settings = {"n_train": 3, "n_valid": 2, "size": (48, 64), "motion": 4.0}
    again = warped_photos(tmp_path, **settings)
    files = sorted(path.relative_to(photos) for path in photos.rglob("*") if path.is_file())
    assert files and all((photos / path).read_bytes() == (again / path).read_bytes() for path in files)
    next(again.glob("*.txt")).unlink()
    next(again.rglob("*.flo")).write_bytes(b"")
    assert len(flying_chairs(warped_photos(tmp_path, **settings), "train").read(0).flow) == 48
    with pytest.raises(DataError, match="motion"):
        warped_photos(tmp_path, motion=100.0)


def test_the_field_never_folds():
    field = smooth_field((48, 64), 12.0, np.random.default_rng(3))
    (uy, ux), (vy, vx) = (np.gradient(field[..., k]) for k in (0, 1))
    assert np.all((1 + ux) * (1 + vy) - uy * vx > 0)
    photo = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    still = warped_pair(photo, (20, 30), np.zeros((48, 64, 2)))
    np.testing.assert_array_equal(still[0], still[1])


def test_a_list_of_splits_that_does_not_fit_is_refused(tmp_path):
    data = tmp_path / "FlyingChairs_release" / "data"
    for k in (1, 2):
        frame(data / f"0000{k}_img1.ppm"), frame(data / f"0000{k}_img2.ppm")
        write_flo(data / f"0000{k}_flow.flo", FLOW)
    with pytest.raises(DataError, match=r"FlyingChairs_train_val.txt"):
        flying_chairs(tmp_path, "train")
    (tmp_path / "chairs_split.txt").write_text("1\n")
    with pytest.raises(DataError, match="1 or 2 for each of 2 pairs"):
        flying_chairs(tmp_path, "train")
    (tmp_path / "chairs_split.txt").write_text("1\n2\n")
    assert [len(flying_chairs(tmp_path, split)) for split in ("train", "valid")] == [1, 1]
    (data / "00001_img2.ppm").unlink()
    with pytest.raises(DataError, match=r"00001_img2.ppm is missing"):
        flying_chairs(tmp_path, "train")


@pytest.mark.parametrize("sparse", [False, True])
def test_augmented_frames_still_move_as_their_flow_says(photos, sparse):
    pairs = flying_chairs(photos, "train")
    augmentor = FlowAugmentor(crop=(32, 40), min_scale=-0.2, max_scale=0.4, sparse=sparse, strength=0, hue=0, eraser=())
    for number in range(len(pairs)):
        sample = augmentor(pairs.read(number), np.random.default_rng(number))
        assert sample.image1.shape == (32, 40, 3) and sample.flow.shape == (32, 40, 2)
        assert unexplained(sample, sample.flow) < 0.7 * unexplained(sample, 0 * sample.flow)


def test_augmentation_follows_from_its_seed_and_grows_what_is_too_small(photos):
    augmentor = FlowAugmentor(crop=(56, 72), min_scale=-1.0, max_scale=-0.5)
    first, again, other = (
        augmentor(flying_chairs(photos, "train").read(0), np.random.default_rng(seed)) for seed in ((0, 1), (0, 1), (0, 2))
    )
    assert first.image1.shape == (56, 72, 3)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.any(first.image1 != other.image1)


def test_a_picture_smaller_than_the_window_always_grows(photos):
    """Its border is never repeated instead, as it would be where sizes are left alone (a fifth of the time)."""
    sample, augmentor = flying_chairs(photos, "train").read(0), FlowAugmentor(crop=(64, 80), min_scale=-1.0, max_scale=-0.5)
    for seed in range(10):
        window = augmentor.moved(sample, np.random.default_rng(seed)).image1
        assert all(np.diff(window, axis=axis).any(axis=(1 - axis, 2)).all() for axis in (0, 1))


def test_a_vector_with_an_unknown_neighbour_is_not_known():
    flow, valid = np.ones((40, 40, 2), np.float32), np.ones((40, 40), np.float32)
    flow[20, 20], valid[20, 20] = 1e6, 0
    sample = Sample(*np.zeros((2, 40, 40, 3), np.uint8), flow, valid)
    for seed in range(4):
        moved = FlowAugmentor(crop=(40, 40), min_scale=0.5, max_scale=0.5).moved(sample, np.random.default_rng(seed))
        assert not np.all(moved.valid)
        np.testing.assert_allclose(np.ptp(np.abs(moved.flow[moved.valid > 0]), axis=0), 0, atol=1e-5)


def test_a_window_as_large_as_the_picture_is_the_picture(photos):
    sample = flying_chairs(photos, "train").read(0)
    augmentor = FlowAugmentor(crop=(48, 64), min_scale=0, max_scale=0, flip=False)

    class NoResize:
        random = staticmethod(lambda: 0.9)
        uniform = staticmethod(lambda low, high: 0.0)
        integers = staticmethod(lambda low, high: low)

    moved = augmentor.moved(sample, NoResize())
    np.testing.assert_array_equal(moved.image1, sample.image1)
    np.testing.assert_allclose(moved.flow, sample.flow, atol=1e-6)


def test_frames_of_16_bits_become_8(tmp_path):
    grey = np.arange(35, dtype=np.uint16).reshape(5, 7) * 257
    pillow().fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(flow_sets.read_frame(tmp_path / "grey.png")[..., 1], grey // 257)
