"""Files of optical flow: `.flo` (Middlebury), `.pfm`, and KITTI's 16-bit PNG.

Flow is `[H, W, 2]`, (x, y) in pixels, x to the right and y down. Readers raise DataError naming the file and what is wrong
with it. Writers refuse numbers that are not finite, and put a file in its place only once it is whole.
"""

import io
import os
import pathlib
import re
import struct
from fractions import Fraction

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.video import pyav

FLO_MAGIC = b"PIEH"  # 202021.25 as little-endian float32
# A vector with a larger component is unknown: so it is written in `.flo`.
UNKNOWN_FLOW = 1e9
_LARGEST_SIDE = 100_000
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


# .flo ----------------------------------------------------------------------------------------------------------------


def read_flo(path: str | os.PathLike) -> np.ndarray:
    """Flow `[H, W, 2]`, float32. Unknown vectors are left as they are, see `UNKNOWN_FLOW`."""
    data = _bytes(path)
    if data[:4] != FLO_MAGIC:
        swapped = " It is big-endian; the format is little-endian." if data[:4] == FLO_MAGIC[::-1] else ""
        raise DataError(f"{path} is no .flo file: it begins with {data[:4]!r} and not with {FLO_MAGIC!r}.{swapped}")
    if len(data) < 12:
        raise DataError(f"{path} is truncated: it ends within its header of 12 bytes, after {len(data)}.")
    W, H = struct.unpack("<ii", data[4:12])
    _check_size(path, H, W)
    _check_length(path, len(data), 12 + 8 * H * W, f"{W} x {H} vectors")
    return np.frombuffer(data, "<f4", offset=12).reshape(H, W, 2).astype(np.float32)


def write_flo(path: str | os.PathLike, flow: np.ndarray) -> None:
    """Writes flow `[H, W, 2]`, as float32."""
    _check_flow(path, flow)
    H, W, _ = flow.shape
    write_whole(path, FLO_MAGIC + struct.pack("<ii", W, H) + np.ascontiguousarray(flow, "<f4").tobytes())


# .pfm ----------------------------------------------------------------------------------------------------------------


def read_pfm(path: str | os.PathLike) -> np.ndarray:
    """The numbers in a `.pfm` file, float32: `[H, W, 3]`, or `[H, W]` if it is grey; the top row first."""
    data = _bytes(path)
    header = re.match(rb"(PF|Pf)\s*\n(\d+)\s(\d+)\s*?\n([-+.\deE]+)\s*?\n", data)
    if header is None:
        raise DataError(f"{path} is no .pfm file: it begins with {data[:20]!r} and not with PF or Pf, its size and its scale.")
    kind, W, H, scale = header.groups()
    H, W, channels = int(H), int(W), 3 if kind == b"PF" else 1
    _check_size(path, H, W)
    try:
        # The sign tells the order of bytes; the magnitude means nothing.
        order = "<" if float(scale) < 0 else ">"
    except ValueError as error:
        raise DataError(f"{path}: its scale is {scale!r}, which is no number.") from error
    _check_length(path, len(data), header.end() + 4 * H * W * channels, f"{W} x {H} pixels of {channels} channels")
    array = np.frombuffer(data, f"{order}f4", offset=header.end()).astype(np.float32)
    return array.reshape((H, W) if channels == 1 else (H, W, channels))[::-1]


def read_pfm_flow(path: str | os.PathLike) -> np.ndarray:
    """Flow `[H, W, 2]`: the first two of a `.pfm` file's three channels."""
    array = read_pfm(path)
    if array.ndim != 3:
        raise DataError(f"{path} is grey: a .pfm file of flow has three channels.")
    return array[..., :2]


def write_pfm(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes `[H, W, 3]`, `[H, W]`, or flow `[H, W, 2]` with a third channel of zeros; little-endian."""
    if array.ndim == 3 and array.shape[-1] == 2:
        array = np.concatenate([array, np.zeros_like(array[..., :1])], axis=-1)
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)) or not np.all(np.isfinite(array)):
        raise DataError(f"{path} is not written: {array.shape} must be [H, W], [H, W, 2] or [H, W, 3], all of it finite.")
    H, W = array.shape[:2]
    header = f"{'Pf' if array.ndim == 2 else 'PF'}\n{W} {H}\n-1.0\n".encode()
    write_whole(path, header + np.ascontiguousarray(array[::-1], "<f4").tobytes())


# KITTI ---------------------------------------------------------------------------------------------------------------


def read_kitti(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow `[H, W, 2]` and validity `[H, W]`, 0 or 1, from a 16-bit RGB PNG (KITTI 2015 and HD1K).

    Where a vector is not valid it is what the file's zeros decode to, (-512, -512).
    """
    array = read_png16(path)
    if array.ndim != 3:
        raise DataError(f"{path} is grey: flow is in a PNG of three channels, of 16 bits each.")
    valid = array[..., 2]
    if valid.max(initial=0) > 1:
        found = ", ".join(map(str, np.unique(valid)[-3:]))
        raise DataError(f"{path}: its third channel, which says where the flow is valid, must be 0 or 1; it has {found}.")
    return ((array[..., :2].astype(np.float32) - 2**15) / 64), valid.astype(np.float32)


def write_kitti(path: str | os.PathLike, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Writes flow `[H, W, 2]` as KITTI's PNG, rounded down to steps of 1/64 pixel, as the originals do.

    Vectors beyond the format's range, -512 to 511.98 pixels, are set to its ends; the originals let them wrap around.
    """
    _check_flow(path, flow)
    encoded = np.clip(64.0 * np.asarray(flow, np.float64) + 2**15, 0, 2**16 - 1).astype(np.uint16)
    valid = np.ones(flow.shape[:2], np.uint16) if valid is None else (valid > 0).astype(np.uint16)
    write_png16(path, np.concatenate([encoded, valid[..., None]], axis=-1))


def read_kitti_disparity(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow `[H, W, 2]` from a left to a right picture, and validity `[H, W]`, from KITTI's 16-bit grey disparities."""
    array = read_png16(path)
    if array.ndim != 2:
        raise DataError(f"{path} has colours: disparities are in a grey PNG of 16 bits.")
    disparity = array / np.float32(256)
    return np.stack([-disparity, np.zeros_like(disparity)], axis=-1), (array > 0).astype(np.float32)


# PNG of 16 bits, which Pillow cannot read in colour -------------------------------------------------------------------


def read_png16(path: str | os.PathLike) -> np.ndarray:
    """A 16-bit PNG, `[H, W, 3]` or `[H, W]`."""
    data = _bytes(path)
    if data[:8] != _PNG_MAGIC or len(data) < 33:
        raise DataError(f"{path} is no PNG file: it begins with {data[:8]!r}.")
    W, H, depth, colour = struct.unpack(">IIBB", data[16:26])
    _check_size(path, H, W)
    if depth != 16 or colour not in (0, 2):
        raise DataError(f"{path} has {depth} bits and colour type {colour}: it must be grey or RGB, of 16 bits a channel.")
    av = pyav()
    try:
        with av.open(io.BytesIO(data), format="png_pipe") as container:
            frame = next(container.decode(video=0))
            array = frame.to_ndarray(format="gray16le" if colour == 0 else "rgb48le")
    except (av.error.FFmpegError, StopIteration, ValueError) as error:
        raise DataError(f"{path} is damaged: its pixels cannot be decoded ({error or 'there are none'}).") from error
    # A picture that ends early is filled up by the decoder.
    if not data.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):
        raise DataError(f"{path} is truncated: it does not end as a PNG file does.")
    return array


def write_png16(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes 16-bit unsigned integers `[H, W, 3]`."""
    av = pyav()
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = array.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb48be", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array, np.uint16), format="rgb48le").reformat(format="rgb48be")
    write_whole(path, b"".join(bytes(packet) for part in (frame, None) for packet in encoder.encode(part)))


# What they share -----------------------------------------------------------------------------------------------------


def _bytes(path) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file under another name and renames it, so that it is whole whenever it is there, whoever else writes it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


def _check_size(path, H, W):
    if not (0 < H <= _LARGEST_SIDE and 0 < W <= _LARGEST_SIDE):
        raise DataError(f"{path} is damaged: its header says that it is {W} pixels wide and {H} high.")


def _check_length(path, found, expected, of_what):
    if found < expected:
        raise DataError(f"{path} is truncated: {of_what} take {expected} bytes, it has {found}.")
    if found > expected:
        raise DataError(f"{path} is damaged: {of_what} take {expected} bytes, it has {found}.")


def _check_flow(path, flow):
    if flow.ndim != 3 or flow.shape[-1] != 2:
        raise DataError(f"{path} is not written: flow must be [H, W, 2], not {flow.shape}.")
    if bad := int(np.sum(~np.isfinite(flow).all(axis=-1))):
        raise DataError(f"{path} is not written: {bad} of {flow.shape[0] * flow.shape[1]} vectors are not finite.")
