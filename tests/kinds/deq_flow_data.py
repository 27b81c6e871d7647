"""Golden kinds of optical flow's files, pictures, augmentation and evaluation."""

import itertools
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np

from deqjax.data import flow_files
from deqjax.data.flow_augment import FlowAugmentor, Jitter, jittered, resized_sparse
from deqjax.data.flow_colors import color_wheel, flow_to_image, vectors_to_colors
from deqjax.data.flow_sets import Sample, kitti, read_frame, sintel
from deqjax.data.images import pillow
from deqjax.models.flow import Estimate, State, forward_interpolate, pad, padding_of, unpad
from experiments.flow_evaluation import evaluate_set, submit
from tests.golden import Case, close

# Files ---------------------------------------------------------------------------------------------------------------


def check_flow_files(case: Case, sub=None, *, folder):
    def given(name):
        path = folder / name
        path.write_bytes(case[f"file/{name}"].tobytes())
        return path

    np.testing.assert_array_equal(flow_files.read_flo(given("flow.flo")), case["out/flo_read"])
    flow_files.write_flo(folder / "own.flo", case["in/flo_uv"])
    assert (folder / "own.flo").read_bytes() == case["file/flow.flo"].tobytes()
    for order in ("le", "be"):
        np.testing.assert_array_equal(flow_files.read_pfm_flow(given(f"{order}.pfm")), case[f"out/pfm_{order}"])
    np.testing.assert_array_equal(flow_files.read_pfm(given("grey.pfm")), case["out/pfm_grey"])

    flow_files.write_kitti(folder / "own.png", case["in/kitti_uv"])
    for path in (given("kitti_written.png"), folder / "own.png"):
        flow, valid = flow_files.read_kitti(path)
        np.testing.assert_array_equal(flow, case["out/kitti_read_flow"])
        np.testing.assert_array_equal(valid, case["out/kitti_read_valid"])
    flow, valid = flow_files.read_kitti(given("kitti_sparse.png"))
    np.testing.assert_array_equal(flow, case["out/kitti_sparse_flow"])
    np.testing.assert_array_equal(valid, case["out/kitti_sparse_valid"])
    flow, valid = flow_files.read_kitti_disparity(given("disp.png"))
    np.testing.assert_array_equal(flow, case["out/disp_flow"])
    np.testing.assert_array_equal(valid, case["out/disp_valid"])
    np.testing.assert_array_equal(read_frame(given("image.ppm")), case["out/ppm_rgb"])


def check_color_wheel(case: Case, sub=None, *, folder):
    np.testing.assert_array_equal(color_wheel(), case["out/colorwheel"])
    flow = case["in/flow"]
    for name, options in {"rgb": {}, "bgr": {"bgr": True}, "clip5": {"clip": 5}}.items():
        np.testing.assert_array_equal(flow_to_image(flow, **options), case[f"out/image_{name}"])
    np.testing.assert_array_equal(flow_to_image(np.zeros((3, 4, 2))), case["out/image_zero_flow"])
    np.testing.assert_array_equal(vectors_to_colors(case["in/uv_unnormalised"]), case["out/uv_to_colors_unnormalised"])
    single = flow_to_image(flow.astype(np.float32)).astype(int)
    assert np.max(np.abs(single - case["out/image_float32_input"])) <= 1


def check_padding_interpolate(case: Case, sub=None, *, folder):
    for row in case.meta["pads"]:
        padding = padding_of(row["H"], row["W"], row["mode"])
        assert list(padding) == row["pad_left_right_top_bottom"]
        name = f"{row['H']}x{row['W']}"
        if f"in/x_{name}" in case:
            x = jnp.asarray(np.moveaxis(case[f"in/x_{name}"], 1, -1))
            padded = pad(x, padding)
            np.testing.assert_array_equal(np.moveaxis(padded, -1, 1), case[f"out/pad_{name}_{row['mode']}"])
            np.testing.assert_array_equal(unpad(padded, padding), x)
    for name in [key for key in case.group("in") if key.startswith("interp")]:
        flow = jnp.asarray(np.moveaxis(case[f"in/{name}"], 0, -1))[None]
        want = np.nan_to_num(case[f"out/{name}"])
        np.testing.assert_array_equal(np.moveaxis(np.asarray(forward_interpolate(flow)[0]), -1, 0), want)


# Augmentation --------------------------------------------------------------------------------------------------------


class Replay:
    """A generator that gives out what the reference drew, and checks that it is asked for the same."""

    def __init__(self, draws):
        self.draws = list(draws)

    def _next(self, kind, *bounds):
        found, *rest = self.draws.pop(0)
        assert found == kind, f"{kind} was drawn instead of {found}"
        if bounds:
            np.testing.assert_allclose(rest[0], bounds)
        return rest[-1]

    def random(self):
        return self._next("rand")

    def uniform(self, low, high):
        return self._next("uniform", low, high)

    def integers(self, low, high):
        return self._next("randint", low, high)


def check_augmentation(case: Case, sub=None, *, folder):
    sample = Sample(*(case[f"in/{name}"] for name in ("image1", "image2", "flow", "valid")))
    whole = sample._replace(valid=np.ones(sample.valid.shape, np.float32))

    def differ(got, want, levels):
        assert np.max(np.abs(got.astype(int) - want)) <= levels

    for name, draws in case.meta["draws"].items():
        if name.startswith("jitter"):
            got = jittered(sample.image1, Jitter(**{**draws, "order": tuple(draws["order"])}))
            differ(got, case[f"out/{name}"], 2)
            continue
        replay, kind = Replay(draws), name.partition("_")[0]
        if kind == "eraser":
            augmentor = FlowAugmentor(crop=(1, 1), min_scale=0, max_scale=0, eraser=(8, 16))
            np.testing.assert_array_equal(augmentor.erased(sample.image2, replay), case[f"out/{name}_image2"])
        else:
            settings, sparse = case.meta[kind], kind == "sparse"
            scales = {key: settings[key] for key in ("min_scale", "max_scale")}
            augmentor = FlowAugmentor(crop=tuple(case.meta["crop"]), flip=settings["do_flip"], sparse=sparse, **scales)
            got = augmentor.moved(sample if sparse else whole, replay)
            known = case[f"out/{name}_valid"] if sparse else np.ones(got.valid.shape)
            # Where nothing is known the original keeps whatever it finds.
            close(got.flow, case[f"out/{name}_flow"] * known[..., None], atol=1e-4, what=name)
            frame = "image2" if sparse else "image1"
            differ(getattr(got, frame), case[f"out/{name}_{frame}"], 1)
            if sparse:
                np.testing.assert_array_equal(got.valid, case[f"out/{name}_valid"])
        assert not replay.draws, f"{name}: {len(replay.draws)} draws are left"
    plain = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.35, "hue": -0.12}
    for operation, value in plain.items():
        change = Jitter(**(dict.fromkeys(plain, 1.0) | {operation: value}), order=(operation,))
        differ(jittered(sample.image1, change), case[f"out/only_{operation}"], 2)
    # The factors are not stored; among those of two digits that give this size, one must give these fields.
    size, found = case["out/resize_sparse_valid"].shape, []
    for fx, fy in itertools.product(np.arange(0.3, 3, 0.01).round(2), repeat=2):
        if tuple(round(n * f) for n, f in zip(sample.valid.shape, (fy, fx), strict=True)) == size:
            flow, valid = resized_sparse(sample.flow, sample.valid, fx, fy)
            error = np.max(np.abs(flow - case["out/resize_sparse_flow"]))
            found.append(error <= 1e-4 and np.array_equal(valid, case["out/resize_sparse_valid"]))
    assert any(found)


# Evaluation ----------------------------------------------------------------------------------------------------------


def check_eval_protocol(case: Case, sub=None, *, folder):
    """Validators, submissions and pictures on a small tree, with a network of four lines in the place of the model's."""
    write_tree(case, folder)
    k = case.meta["k"]

    for name, video in {
        "cold": {},
        "warm": {"warm_start": True},
        "reuse": {"fixed_point_reuse": True},
    }.items():
        calls = []

        def estimate(image1, image2, start, mode="sintel", video=video, calls=calls):
            calls.append([start is not None and "warm_start" in video, start is not None and "fixed_point_reuse" in video])
            return stand_in(image1, image2, start, mode, k, reuse="fixed_point_reuse" in video)

        assert submit("sintel", folder, folder / f"sub_{name}", lambda mode: estimate, **video) == 6
        assert calls == case.meta["results"][f"calls_{name}"]

    plain = lambda mode: lambda image1, image2, start: stand_in(image1, image2, start, mode, k)
    submit("kitti", folder, folder / "sub_kitti", plain)
    submit("sintel", folder, folder / "viz_sintel", plain, pictures=True)
    submit("kitti", folder, folder / "viz_kitti", plain, pictures=True)
    for path in case.meta["files"]:
        own, want = folder / path, case[f"out/{path}"]
        if path.endswith(".flo"):
            assert own.stat().st_size == case.meta["files"][path]
            close(flow_files.read_flo(own), want, rtol=1e-6, what=path)
        elif "viz" in path:
            assert np.max(np.abs(read_frame(own).astype(int) - want)) <= 1, path
        else:
            close(flow_files.read_kitti(own)[0], want, atol=1 / 64, what=path)

    expected = case.meta["results"]
    for rendering, epe in expected["sintel"].items():
        scores = evaluate_set(sintel(folder, rendering), plain("sintel"))
        close(scores["epe"], epe, rtol=1e-6, what=rendering)
        line = next(line for line in case.meta["stdout"] if rendering in line)
        for pixels in (1, 3, 5):
            assert f"{pixels}px: {scores[f'{pixels}px']:.2f}" in line
    scores = evaluate_set(kitti(folder), plain("kitti"))
    close(scores["epe"], expected["kitti"]["kitti-epe"], rtol=1e-6, what="KITTI's EPE")
    close(scores["f1"], expected["kitti"]["kitti-f1"], rtol=1e-6, what="KITTI's F1-all")


def write_tree(case: Case, folder):
    """The published layouts, with the case's pictures."""

    def save(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow().fromarray(image).save(path)

    for name, array in case.group("in").items():
        part, *rest = name.split("/")
        if part == "kitti":
            split, item = rest
            if item.startswith("flow"):
                path = folder / "KITTI" / split / "flow_occ" / f"{int(item.split('_')[1]):06d}_10.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                flow_files.write_png16(path, array)
            else:
                number, frame = item.split("_")
                save(folder / "KITTI" / split / "image_2" / f"{int(number):06d}_{frame}.png", array)
            continue
        split = "test" if part == "sintel_test" else "training"
        rendering, scene, number = rest
        base = folder / "Sintel" / split / rendering / scene / f"frame_{int(number):04d}"
        if rendering == "flow":
            flow_files.write_flo(base.with_suffix(".flo"), array)
        else:
            save(base.with_suffix(".png"), array)


def stand_in(image1, image2, start, mode, k, reuse=False):
    """The reference's stand-in network, on padded frames."""
    padding = padding_of(*image1.shape[:2], mode)
    frames = [pad(jnp.asarray(image, jnp.float64)[None], padding) for image in (image1, image2)]
    d = (frames[1] - frames[0]) / 255
    up = jnp.stack([k * d[..., 0] + 1.0, k * d[..., 1] - 0.5], axis=-1)
    if start is not None:
        nearest = jnp.repeat(jnp.repeat(start.flow, 8, axis=1), 8, axis=2)
        up = up + (0.125 * nearest + jnp.mean(start.h) if reuse else 0.25 * nearest)
    B, H, W, _ = up.shape
    low = jnp.mean(up.reshape(B, H // 8, 8, W // 8, 8, 2), axis=(2, 4)) / 8
    return Estimate(unpad(up, padding), State(0.1 * low[..., :1], low), None)


def in_a_folder(check):
    """A check that writes files, with a folder of its own."""

    def run(case: Case, sub=None):
        with tempfile.TemporaryDirectory() as folder:
            check(case, sub, folder=pathlib.Path(folder))

    return run


KINDS = {
    "flow_files": in_a_folder(check_flow_files),
    "color_wheel": in_a_folder(check_color_wheel),
    "padding_interpolate": in_a_folder(check_padding_interpolate),
    "augmentation": in_a_folder(check_augmentation),
    "eval_protocol": in_a_folder(check_eval_protocol),
}
