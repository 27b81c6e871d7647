"""MXNet's RecordIO: many images in one file, with an index of byte offsets. The form of ImageNet that TorchDEQ's recipe reads.

A record is a magic number, its length (with a flag in the top three bits for records split where they contain the magic
number), the payload, and zeros up to a multiple of four bytes. An image's payload has a header of 24 bytes with the label,
then the file of the image.
"""

import os
import pathlib
import re
import struct
from collections.abc import Sequence

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import decode_image

_MAGIC = 0xCED7230A
_HEADER = struct.Struct("<IfQQ")


class RecordImages:
    """The images of a `.rec` file, at the offsets of its `.idx` file. Threads may read at the same time."""

    def __init__(self, path: pathlib.Path, offsets: np.ndarray, classes: Sequence[str]):
        self.path, self._offsets, self.classes = path, offsets, classes
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self):
        return len(self._offsets)

    def __getitem__(self, i):
        name = f"record {i} of {self.path}"
        label, data = _unpack(self._payload(int(self._offsets[i]), name), name)
        if not (label.is_integer() and 0 <= label < len(self.classes)):
            raise DataError(f"{name}: label {label:g} is not one of 0 to {len(self.classes) - 1}.")
        return decode_image(data, name), int(label)

    def _payload(self, offset: int, name: str) -> bytes:
        parts, more = [], True
        while more:
            head = os.pread(self._file, 8, offset)
            magic, length = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
            if magic != _MAGIC:
                raise DataError(
                    f"{name}: no record begins at byte {offset}. The index belongs to another file, or it is damaged."
                )
            flag, length = length >> 29, length & (1 << 29) - 1
            data = os.pread(self._file, length, offset + 8)
            if len(data) < length:
                raise DataError(f"{name}: the file ends inside the record.")
            parts.append(data)
            # 0 is a whole record; 1, 2 and 3 are the first, a middle and the last part of one.
            more = flag in (1, 2)
            offset += 8 + length + -length % 4
        # The magic number between two parts was left out in writing.
        return struct.pack("<I", _MAGIC).join(parts)


def _unpack(payload: bytes, name: str) -> tuple[float, bytes]:
    """The label and the image's file."""
    if len(payload) < _HEADER.size:
        raise DataError(f"{name}: {len(payload)} bytes are too few for an image's header.")
    count, label, _, _ = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * count
    if count and len(payload) >= start:
        label = struct.unpack_from("<f", payload, _HEADER.size)[0]
    return label, payload[start:]


def record_images(path: str | os.PathLike, n_classes: int) -> RecordImages:
    """The images of `NAME.rec`, whose index is `NAME.idx` with lines of a key, a tab and a byte offset.

    Raises:
      DataError: one of the files is missing, or the index damaged.
    """
    path = pathlib.Path(path)
    index = path.with_suffix(".idx")
    for file in (path, index):
        if not file.is_file():
            raise DataError(f"{file}: there is no such file. Expected are train.rec, train.idx, val.rec and val.idx (MXNet).")
    offsets = []
    for number, line in enumerate(index.read_text(errors="replace").splitlines(), start=1):
        found = re.fullmatch(r"[^\t]*\t *([0-9]{1,18}) *", line)
        if not found:
            raise DataError(f"{index}, line {number}: expected a key, a tab and a byte offset, found {line[:60]!r}.")
        offsets.append(int(found[1]))
    if not offsets:
        raise DataError(f"{index} is empty.")
    return RecordImages(path, np.asarray(offsets, np.int64), tuple(map(str, range(n_classes))))
