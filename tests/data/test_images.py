"""Pictures of every kind become one array form, and bad files a sentence."""

import numpy as np
import pytest
from PIL import Image

from deqjax.data.errors import DataError
from deqjax.data.images import image_files, read_image, unit, write_image

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_what_is_written_is_read(tmp_path):
    write_image(tmp_path / "a.png", unit(COLOUR))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLOUR)
    write_image(tmp_path / "b.png", unit(COLOUR[..., :1]))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png", channels=1), COLOUR[..., :1])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_the_channels_asked_for(tmp_path, mode, channels):
    image = Image.fromarray(COLOUR)
    image = Image.fromarray(257 * COLOUR[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    read = read_image(saved(tmp_path, image, "a.jpg" if mode == "CMYK" else "a.png"), channels)
    assert read.shape == (5, 7, channels)
    assert read.dtype == (np.uint16 if mode == "I;16" else np.uint8)


def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path):
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(np.concatenate([COLOUR, alpha], axis=-1)))
    np.testing.assert_array_equal(read_image(path), COLOUR)
    palette = Image.fromarray(COLOUR).quantize(64)
    np.testing.assert_array_equal(read_image(saved(tmp_path, palette)), np.asarray(palette.convert("RGB")))


def test_pictures_stand_upright_whatever_the_camera_did(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the first row is the picture's right side
    turned = Image.fromarray(np.rot90(COLOUR))
    np.testing.assert_array_equal(read_image(saved(tmp_path, turned, exif=exif), upright=True), COLOUR)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("1", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_a_picture_may_keep_its_channels(tmp_path, mode, channels):
    image = Image.fromarray(COLOUR)
    image = Image.fromarray(257 * COLOUR[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    assert read_image(saved(tmp_path, image), channels=None).shape == (5, 7, channels)


def test_sixteen_bits_keep_their_depth(tmp_path):
    grey = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    read = read_image(saved(tmp_path, Image.fromarray(grey)), channels=1)
    np.testing.assert_array_equal(read[..., 0], grey)
    np.testing.assert_allclose(unit(read)[..., 0], grey / 65535, rtol=1e-6)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    whole = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "real.tiff")
    for name in ("empty.png", "text.png", "cut.jpg", "real.tiff", "absent.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_a_folder_is_listed_in_order(tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        image_files(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "deep/c.jpg", "a.jpeg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_files(tmp_path)] == ["a.jpeg", "b.PNG", "c.jpg"]
    with pytest.raises(DataError, match="no such folder"):
        image_files(tmp_path / "absent")
