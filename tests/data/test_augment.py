"""Augmentations of images."""

import numpy as np

from deqjax.data import augment


def random_images(n, size, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


def test_a_window_of_a_padded_image_shows_the_image_moved():
    images = random_images(64, 8)
    out = augment.pad_crop_flip(images, np.random.default_rng(0), pad=2)
    assert out.shape == images.shape
    shown = 0
    for image, moved in zip(images, out, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        windows = [padded[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        shown += any(np.array_equal(moved, w) or np.array_equal(moved, w[:, ::-1]) for w in windows)
    assert shown == 64
    still = augment.pad_crop_flip(images, np.random.default_rng(0), pad=0, flip=False)
    np.testing.assert_array_equal(still, images)


def test_a_resized_crop_keeps_to_its_area_and_aspect():
    # Coordinates as colours tell which part of the image a crop shows.
    y, x = np.mgrid[:200, :240]
    image = np.stack([y, x, 0 * y], axis=-1).astype(np.uint8)
    shares, aspects = [], []
    for seed in range(200):
        crop = augment.random_resized_crop(image, np.random.default_rng(seed), 32, (0.1, 0.3), (0.5, 3.0)).astype(float)
        assert crop.shape == (32, 32, 3)
        # Between the outermost pixel centres lie 31 of 32 parts.
        h, w = (np.ptp(crop[..., c]) * 32 / 31 for c in (0, 1))
        shares.append(h * w / (200 * 240))
        aspects.append(w / h)
    assert 0.08 < min(shares) < 0.12 and 0.27 < max(shares) < 0.33
    # Width over height; half of them are below the mean of the two in logarithms.
    assert 0.45 < min(aspects) < 0.6 and 2.6 < max(aspects) < 3.3 and 1.05 < np.median(aspects) < 1.4
    # Nothing of that shape fits: the largest central part.
    strip = augment.random_resized_crop(image[:10], np.random.default_rng(0), 16, (0.9, 1.0), (1.0, 1.0))
    assert strip[..., 1].min() >= 114 and strip[..., 1].max() <= 125
    # Where the middle falls between two pixels, it is the first of them.
    middle = augment.random_resized_crop(image[:1, :4], np.random.default_rng(0), 1, (9.0, 9.0), (1.0, 1.0))
    np.testing.assert_array_equal(middle, image[:1, 1:2])


def test_the_centre_of_a_resized_image():
    image = random_images(1, 40)[0][:, :20]
    out = augment.resize_and_center(image, 20, 16)
    np.testing.assert_array_equal(out, image[12:28, 2:18])
    assert augment.resize_and_center(image, 10, 12).shape == (12, 12, 3)
    for height, width in ((5, 7), (7, 5), (300, 257), (1, 9)):
        assert augment.resize_and_center(np.zeros((height, width, 1), np.uint8), 4, 4).shape == (4, 4, 1)
    # 4 * 11 / 6 = 7.33 and 4 * 10 / 6 = 6.67 pixels are 7 and 6; 1.5 and 1 are left out on the left, as torchvision has it.
    for width, resized_width, left in ((11, 7, 2), (10, 6, 1)):
        image = random_images(1, width)[0][:6]
        whole = augment.resize(image, 4, resized_width)
        np.testing.assert_array_equal(augment.resize_and_center(image, 4, 4), whole[:, left : left + 4])


def test_scaled_windows_keep_image_and_labels_together():
    """Where the image says which label a pixel has, it still does after the augmentation."""
    labels = np.zeros((32, 64), np.uint8)
    labels[8:24, 16:48] = 1
    image = np.repeat(200 * labels[..., None] + 20, 3, axis=-1)
    filled = 0
    for seed in range(30):
        window, moved = augment.scale_and_crop(image, labels, np.random.default_rng(seed), (24, 48), base=64)
        assert window.shape == (24, 48, 3) and moved.shape == (24, 48)
        missing = moved == 255
        filled += missing.any()
        assert np.all(window[missing] == 0)
        inside = ~missing & (np.abs(window[..., 0].astype(int) - 120) > 90)
        np.testing.assert_array_equal(window[inside][:, 0] > 120, moved[inside] == 1)
    assert 0 < filled < 30
    flat = [
        augment.scale_and_crop(image[:2], labels[:2], np.random.default_rng(seed), (24, 48), base=10) for seed in range(150)
    ]
    assert flat[0][0].shape == (24, 48, 3)
    # From 0.5 to 2.1 times the base, in tenths.
    assert {np.count_nonzero(moved[0] != 255) for _, moved in flat} == {*range(5, 22)}
