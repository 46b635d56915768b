"""Whether the header of a GGUF file can be true, before a library makes room for what it says.

A header is counts and lengths; a damaged or malicious one asks for more memory than there is. Here
each of them is held against the bytes that the file has left, and nothing is kept. The format is
that of github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 and 3, little-endian.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Bytes of a value by the number of its type; a string or an array takes at least its own length.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 8: 8, 9: 12, 10: 8, 11: 8, 12: 8}
_MOST_AXES = 4


class HeaderError(Exception):
    """What cannot be true in a header."""


def check_header(path: Path) -> None:
    """Reads through the header of a file.

    Raises:
      HeaderError: it is no such header, or says what the file is too short for.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _Header(file).check()


class _Header:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def check(self) -> None:
        if self._file.read(4) != _MAGIC:
            raise HeaderError("it does not begin with GGUF")
        (version,) = self._numbers("I")
        if version not in (2, 3):
            raise HeaderError(f"its version is {version}, 2 and 3 are known")
        tensors, fields = self._numbers("QQ")
        self._fits(tensors * (8 + 4 + 4 + 8) + fields * (8 + 4 + 1))
        for _ in range(fields):
            self._skip_string()
            (kind,) = self._numbers("I")
            self._skip_values(kind, 1)
        for _ in range(tensors):
            self._skip_string()
            (axes,) = self._numbers("I")
            if axes > _MOST_AXES:
                raise HeaderError(f"a tensor has {axes} axes")
            shape = self._numbers("Q" * axes)
            if math.prod(shape) > 8 * self._size:  # no element takes less than a bit
                raise HeaderError("a tensor is larger than the file")
            self._numbers("IQ")  # type and place; whether it ends in the file is the reader's

    def _skip_values(self, kind: int, count: int, depth: int = 0) -> None:
        if kind not in _SIZES:
            raise HeaderError(f"a field has the unknown type {kind}")
        self._fits(count * _SIZES[kind])
        if kind == _STRING:
            for _ in range(count):
                self._skip_string()
        elif kind == _ARRAY:
            if depth > 1:
                raise HeaderError("a field is a list of lists of lists")
            for _ in range(count):
                inner, length = self._numbers("IQ")
                self._skip_values(inner, length, depth + 1)
        else:
            self._skip(count * _SIZES[kind])

    def _skip_string(self) -> None:
        (length,) = self._numbers("Q")
        self._skip(length)

    def _numbers(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(f"<{form}")
        data = self._file.read(size)
        if len(data) < size:
            raise HeaderError("it ends inside its header")
        return struct.unpack(f"<{form}", data)

    def _skip(self, size: int) -> None:
        self._fits(size)
        self._file.seek(size, os.SEEK_CUR)

    def _fits(self, size: int) -> None:
        if size > self._size - self._file.tell():
            raise HeaderError("it ends inside its header")
