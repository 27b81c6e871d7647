"""Checkpoint files and state dicts that do not fit."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from flax import nnx

from deqjax.interop.state_dict import StateDictError
from deqjax.interop.torch_file import CheckpointFileError, read_checkpoint, write_checkpoint
from deqjax.interop.transformer import export_transformer, load_transformer
from deqjax.models.transformer import DEQTransformer, TransformerConfig
from deqjax.nn.config import DEQConfig


def model(seed=0, **settings):
    config = {"n_tokens": 20, "d_model": 4, "n_head": 2, "d_head": 2, "d_inner": 6, "n_layer": 2, "cutoffs": (8,), "div_val": 2}
    return DEQTransformer(TransformerConfig(**{**config, **settings}), DEQConfig(f_max_iter=0, grad=2), nnx.Rngs(seed))


def test_a_model_survives_the_round_trip_through_safetensors(tmp_path):
    one, other = model(0), model(1)
    write_checkpoint(tmp_path / "lm.safetensors", export_transformer(one))
    load_transformer(other, read_checkpoint(tmp_path / "lm.safetensors"))
    for key, value in export_transformer(one).items():
        np.testing.assert_array_equal(export_transformer(other)[key], value)


def test_every_key_that_does_not_fit_is_named():
    state = export_transformer(model())
    state["extra.weight"] = np.zeros(3)
    del state["injection.bias"]
    state["crit.cluster_bias"] = np.zeros((7,))
    state["crit.out_layers.0.weight"] = state["crit.out_layers.0.weight"] + 1
    with pytest.raises(StateDictError) as error:
        load_transformer(model(), state)
    for part in (
        "missing: injection.bias",
        "unexpected: extra.weight",
        "wrong shape: crit.cluster_bias is (7,)",
        "tied weights",
    ):
        assert part in str(error.value)


def archive(path, payload, **storages):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", payload)
        for key, raw in storages.items():
            file.writestr(f"archive/data/{key.removeprefix('s')}", raw)

    def __init__(self, module, name):
        self.target = (module, name)


def torch_pickle(size, stride=(1,), offset=0, module="torch._utils", name="_rebuild_tensor_v2"):
    """The pickle of {"w": tensor} as PyTorch writes it, put together by hand."""
    out = io.BytesIO()
    write = out.write
    write(b"\x80\x02}X\x01\x00\x00\x00w")
    write(f"c{module}\n{name}\n".encode())
    write(b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ")
    write(b"K" + bytes([offset]) + b"(" + b"".join(b"K" + bytes([n]) for n in size) + b"t")
    write(b"(" + b"".join(b"K" + bytes([n]) for n in stride) + b"t\x89N" + b"tRs.")
    return out.getvalue()


def test_a_pytorch_file_is_read_without_pytorch(tmp_path):
    data = np.arange(6, dtype=np.float32)
    archive(tmp_path / "w.pth", torch_pickle((3, 2), (1, 3)), s0=data.tobytes())
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "w.pth")["w"], data.reshape(2, 3).T)


def older_file(*content, storages):
    """What PyTorch wrote before 1.6: five pickles, then the storages."""
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    sizes = (np.int64(x.size).tobytes() + x.tobytes() for x in storages.values())
    return head + b"".join(content) + pickle.dumps(list(storages), 2) + b"".join(sizes)


def test_older_pytorch_files_are_read_too(tmp_path):
    data, path = np.arange(6, dtype=np.float32), tmp_path / "w.ckpt"
    whole = older_file(torch_pickle((3, 2), (1, 3)), storages={"0": data})
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_checkpoint(path)["w"], data.reshape(2, 3).T)
    for wrong in (whole[:-1], whole[:-30], older_file(torch_pickle((7,)), storages={"0": data})):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointFileError, match=r"truncated|outside its storage|damaged"):
            read_checkpoint(path)


def test_of_a_list_of_states_the_last_is_read(tmp_path):
    payload = torch_pickle((2,))
    # [{"w": ...}, 3, {"w": ...}]: protocol and stop are taken off each, and the parts put into a list.
    item = payload[2:-1]
    archive(tmp_path / "list.pth", b"\x80\x02](" + item + b"K\x03" + item + b"e.", s0=np.arange(2, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "list.pth")["w"], [0, 1])


def test_code_in_a_file_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    archive(tmp_path / "evil.pth", pickle.dumps({"w": Evil()}))
    with pytest.raises(CheckpointFileError, match="nothing was run"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not marker.exists()


def test_files_that_are_no_checkpoints_are_explained(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    archive(tmp_path / "outside.pth", torch_pickle((7,)), s0=np.zeros(6, np.float32).tobytes())
    for name, message in (
        ("absent.pth", "no checkpoint file"),
        ("text.pth", "not a PyTorch checkpoint"),
        ("text.safetensors", "not a readable"),
        ("outside.pth", "outside its storage"),
    ):
        with pytest.raises(CheckpointFileError, match=message):
            read_checkpoint(tmp_path / name)


def test_a_damaged_file_is_an_error_of_ours_whatever_is_damaged(tmp_path):
    good, path = tmp_path / "good.pth", tmp_path / "bad.pth"
    archive(good, torch_pickle((4,)), s0=np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(read_checkpoint(good)["w"], np.arange(4))
    content, random = good.read_bytes(), np.random.default_rng(0)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointFileError):
        read_checkpoint(path)
    for _ in range(300):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] = random.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_checkpoint(path)
        except CheckpointFileError:
            continue
