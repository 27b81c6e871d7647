"""Readers of sound, video, sets of pictures and shapes."""

import tracemalloc

import numpy as np
import pytest
from scipy.io import wavfile

from deqjax.data.audio import melody, read_audio, write_audio
from deqjax.data.coordinates import coordinates, size
from deqjax.data.errors import DataError
from deqjax.data.image_sets import image_set
from deqjax.data.meshes import Mesh, level_set, write_mesh
from deqjax.data.photographs import faces, photograph
from deqjax.data.point_clouds import read_points
from deqjax.data.solids import SHAPES, gradient, signed_distance, surface
from deqjax.data.video import clip, read_video, waves, write_video

# Coordinates ---------------------------------------------------------------------------------------------------------


def test_coordinates_of_pictures_are_column_and_row_and_those_of_videos_in_the_order_of_axes():
    picture = coordinates(np.arange(6), (2, 3), "xy").reshape(2, 3, 2)
    np.testing.assert_array_equal(picture[0, :, 0], [-1, 0, 1])
    np.testing.assert_array_equal(picture[:, 0, 1], [-1, 1])
    video = coordinates(np.arange(12), (2, 2, 3)).reshape(2, 2, 3, 3)
    np.testing.assert_array_equal(video[:, 0, 0, 0], [-1, 1])
    np.testing.assert_array_equal(video[0, 0, :, 2], [-1, 0, 1])
    assert size((2, 2, 3)) == 12 and coordinates(np.arange(1), (1,)).item() == 0
    with pytest.raises(ValueError, match="order='yx'"):
        coordinates(np.arange(4), (2, 2), "yx")


# Sound ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float32])
def test_samples_of_every_type_become_amplitudes_up_to_one(tmp_path, dtype):
    wave = np.array([0.0, 0.25, -0.5, 0.125])
    scale, middle = (1, 0) if dtype == np.float32 else (64, 128) if dtype == np.uint8 else (np.iinfo(dtype).max // 4, 0)
    wavfile.write(tmp_path / "a.wav", 100, (wave * scale + middle).astype(dtype))
    samples, rate = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, 2 * wave, atol=1e-3)
    assert rate == 100 and samples.dtype == np.float32


def test_channels_are_averaged_and_silence_stays_silent(tmp_path):
    wavfile.write(tmp_path / "stereo.wav", 100, np.array([[1, 0], [-0.5, 0.5]], np.float32))
    np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav")[0], [1, 0])
    wavfile.write(tmp_path / "silence.wav", 100, np.zeros(5, np.int16))
    np.testing.assert_array_equal(read_audio(tmp_path / "silence.wav")[0], np.zeros(5))


def test_sound_that_cannot_be_used_is_named(tmp_path):
    wavfile.write(tmp_path / "empty.wav", 100, np.zeros(0, np.float32))
    wavfile.write(tmp_path / "nan.wav", 100, np.array([0, np.nan, 1], np.float32))
    (tmp_path / "none.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "nan.wav").read_bytes()[:30])
    for name, words in {"empty": "no samples", "nan": "1 samples that", "none": "no WAV", "text": "no WAV"}.items():
        with pytest.raises(DataError, match=words):
            read_audio(tmp_path / f"{name}.wav")
    with pytest.raises(DataError):
        read_audio(tmp_path / "cut.wav")
    wavfile.write(tmp_path / "whole.wav", 100, np.ones(50, np.int16))
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:100])
    with pytest.raises(DataError, match="cut off"):
        read_audio(tmp_path / "cut.wav")
    (tmp_path / "cut.wav").write_bytes(whole[:22] + b"\0\0" + whole[24:])  # no channels
    with pytest.raises(DataError, match="no WAV"):
        read_audio(tmp_path / "cut.wav")
    # Who writes into a pipe cannot know how many there will be.
    (tmp_path / "piped.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:40] + b"\xff" * 4 + whole[44:])
    assert read_audio(tmp_path / "piped.wav")[0].shape == (50,)
    with pytest.raises(DataError, match="no such file"):
        read_audio(tmp_path / "absent.wav")


def test_the_melody_is_sound_and_survives_a_file(tmp_path):
    sound = melody(0.5, 4000, seed=1)
    assert sound.shape == (2000,) and np.max(np.abs(sound)) == 1 and np.std(sound) > 0.05
    write_audio(tmp_path / "m.wav", sound, 4000)
    np.testing.assert_allclose(read_audio(tmp_path / "m.wav")[0], sound, atol=1e-6)
    with pytest.raises(DataError, match="no samples"):
        melody(0.0)


# Video ---------------------------------------------------------------------------------------------------------------


def test_a_video_survives_a_file_nearly(tmp_path):
    frames = waves(6, 64)
    write_video(tmp_path / "v.mp4", frames / 255, 10)
    read, rate = read_video(tmp_path / "v.mp4")
    assert read.shape == frames.shape and rate == 10
    # Colours are stored at half the resolution, brightness is not.
    assert np.mean(np.abs(np.mean(read.astype(float) - frames, axis=-1))) < 4
    assert len(read_video(tmp_path / "v.mp4", 2)[0]) == 2
    with pytest.raises(DataError, match="no such file"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="no video"):
        read_video(tmp_path / "bad.mp4")
    with pytest.raises(DataError, match="are no video"):
        waves(0)
    with pytest.raises(DataError, match="not 64 x 1"):
        write_video(tmp_path / "line.mp4", frames[:, :, :1] / 255, 10)


def test_a_video_stands_upright_whatever_the_camera_did(tmp_path):
    write_video(tmp_path / "v.mp4", waves(2, 64)[:, :, :32] / 255, 10)
    plain, content = read_video(tmp_path / "v.mp4")[0], (tmp_path / "v.mp4").read_bytes()
    # The header of the track ends with a matrix and two sizes.
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = np.array([0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30], ">i4").tobytes()
    (tmp_path / "turned.mp4").write_bytes(content[:matrix] + quarter + content[matrix + 36 :])
    turned = read_video(tmp_path / "turned.mp4")[0]
    np.testing.assert_array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))


def test_a_clip_that_comes_in_a_wheel():
    frames, rate = clip("bikes", 3)
    assert frames.shape == (3, 272, 640, 3) and rate == 25
    tracemalloc.start()
    few = clip("bikes", 12, step=9)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(few[:3], frames[:, ::9, ::9])
    assert peak < 6 * frames[0].nbytes  # what is left out of a picture is not kept
    with pytest.raises(DataError, match="bikes"):
        clip("cars")


# Pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_in_wheels():
    assert photograph("camera").shape == (512, 512, 1) and photograph("astronaut").shape == (512, 512, 3)
    assert faces(7).shape == (7, 25, 25, 1) and faces(7).dtype == np.uint8 and faces(7).max() > 200
    for call in (lambda: photograph("dog"), lambda: faces(1000)):
        with pytest.raises(DataError):
            call()


def test_published_sets_are_read_or_said_to_be_missing(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3)).astype(np.float32)
    np.save(tmp_path / "celeba_128_tiny.npy", pictures.reshape(3, -1))
    np.testing.assert_array_equal(image_set("celeba", tmp_path, 2), pictures[:2])
    np.savez(tmp_path / "data_div2k.npz", test_data=pictures, train_data=pictures[:1])
    assert image_set("nature", tmp_path).shape == pictures.shape
    with pytest.raises(DataError, match=r"data_2d_text.npz is missing.*test_data"):
        image_set("text", tmp_path)
    np.savez(tmp_path / "data_2d_text.npz", other=pictures)
    with pytest.raises(DataError, match="cannot be read"):
        image_set("text", tmp_path)
    np.savez_compressed(tmp_path / "data_div2k.npz", test_data=pictures.astype(np.uint8))
    whole = (tmp_path / "data_div2k.npz").read_bytes()
    np.save(tmp_path / "array.npy", pictures)
    for content in (whole[:-100], whole[:5000] + b"damage" + whole[5006:], (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "data_div2k.npz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            image_set("nature", tmp_path)
    np.save(tmp_path / "celeba_128_tiny.npy", np.full_like(pictures, np.nan))
    with pytest.raises(DataError, match="outside 0 to 255"):
        image_set("celeba", tmp_path)
    np.save(tmp_path / "celeba_128_tiny.npy", pictures / 255)
    with pytest.raises(DataError, match="from 0 to 1"):
        image_set("celeba", tmp_path)


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_distances_are_distances(name):
    random = np.random.default_rng(0)
    points, normals = surface(name, 200, random)
    assert np.max(np.abs(signed_distance(name, points))) < 1e-3
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    # Outside, moving away from the surface by h along the gradient adds h; no point is nearer than the distance says.
    outside = random.uniform(-1, 1, (2000, 3))
    outside = outside[signed_distance(name, outside) > 0.05][:100]
    d = signed_distance(name, outside)
    moved = signed_distance(name, outside + 0.01 * gradient(name, outside))
    # Fewer where the way crosses to where another part of the surface is nearest.
    assert np.all(moved - d < 0.01 + 2e-4) and np.mean(moved - d > 0.01 - 2e-4) > 0.95
    many = surface(name, 4000, random)[0]
    nearest = np.min(np.linalg.norm(outside[:, None] - many[None], axis=-1), axis=1)
    assert np.all(nearest >= d - 1e-3) and np.mean(nearest - d) < 0.05


def test_a_point_cloud_fills_the_cube(tmp_path):
    points, normals = surface("torus", 50, np.random.default_rng(0))
    np.savetxt(tmp_path / "t.xyz", np.concatenate([5 * points + 3, 2 * normals], axis=1))
    read, directions = read_points(tmp_path / "t.xyz")
    assert read.min() == -1 and read.max() == 1
    np.testing.assert_allclose(directions, normals, atol=1e-5)
    for text in ("", "1 2 3\n", "a b c d e f\n", "1 2 3 4 5 nan\n"):
        (tmp_path / "bad.xyz").write_text(text)
        with pytest.raises(DataError):
            read_points(tmp_path / "bad.xyz")
    with pytest.raises(DataError, match="no such file"):
        read_points(tmp_path / "absent.xyz")


def test_a_surface_is_written_and_its_inside_is_that_of_the_shape(tmp_path):
    axis = np.linspace(-1, 1, 40)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    vertices, faces_ = level_set(signed_distance("sphere", grid))
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), 0.6, atol=2e-3)
    write_mesh(tmp_path / "s.ply", vertices, faces_)
    mesh, random = Mesh(tmp_path / "s.ply"), np.random.default_rng(0)
    # The mesh is scaled to fill 0 to 1.
    points = random.uniform(0, 1, (500, 3))
    radius = np.linalg.norm(2 * points - 1, axis=1)
    clear = np.abs(radius - 1) > 0.03
    np.testing.assert_array_equal(mesh.inside(points)[clear], (radius < 1)[clear])
    np.testing.assert_allclose(np.linalg.norm(2 * mesh.surface(50, random) - 1, axis=1), 1, atol=0.02)
    write_mesh(tmp_path / "open.ply", vertices, faces_[:-5])
    with pytest.raises(DataError, match="not closed"):
        Mesh(tmp_path / "open.ply")
    # Four points on a line are a closed mesh.
    write_mesh(
        tmp_path / "line.ply", np.arange(4)[:, None] * np.ones(3), np.array([[0, 1, 2], [0, 3, 1], [1, 3, 2], [0, 2, 3]])
    )
    with pytest.raises(DataError, match="no area"):
        Mesh(tmp_path / "line.ply")
    (tmp_path / "bad.ply").write_text("no mesh")
    for name in ("bad", "absent"):
        with pytest.raises(DataError, match=name):
            Mesh(tmp_path / f"{name}.ply")
    assert level_set(np.ones((3, 3, 3))) is None
