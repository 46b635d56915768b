"""The header of a GGUF file: its fields, and where its tensors lie.

A header is counts and lengths; a damaged or malicious one asks for more memory than there is. Here
each of them is held against the bytes that the file has left before anything is kept, and what is
kept is of the size of the header. The format is that of
github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 and 3, little-endian.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# How the value of a type lies in the file, by the type's number.
_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1")  # the last: a truth
_FORMS = dict(enumerate(_NUMBERS)) | {10: "<u8", 11: "<i8", 12: "<f8"}
_TRUTH = 7
# Bytes that a string or an array takes at least: its own length.
_LEAST = {_STRING: 8, _ARRAY: 12}
_MOST_AXES = 4
_ALIGNMENT = "general.alignment"


class HeaderError(Exception):
    """What cannot be true in a header."""


class TensorInfo(NamedTuple):
    """One tensor.

    Attributes:
      shape: the last axis is the one whose elements lie side by side.
      kind: number of its type in ggml.
      start: of its bytes, counted from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
      fields: numbers, truths, strings as bytes; of arrays of numbers a numpy array, of strings a
        list; None for an array of arrays, of which nothing is kept.
      tensors: in the file's order.
    """

    fields: dict[str, Any]
    tensors: list[TensorInfo]


def read_header(path: Path) -> Header:
    """Reads the header of a file.

    Raises:
      HeaderError: it is no such header, or says what the file is too short for.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return _Reader(file).read()


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size

    def read(self) -> Header:
        size = self._left
        if self._take(4) != _MAGIC:
            raise HeaderError("it does not begin with GGUF")
        (version,) = self._numbers("I")
        if version not in (2, 3):
            raise HeaderError(f"its version is {version}, 2 and 3 are known")
        num_tensors, num_fields = self._numbers("QQ")
        self._fits(num_tensors * (8 + 4 + 4 + 8) + num_fields * (8 + 4 + 1))
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._name()
            if name in fields:
                raise HeaderError(f"the field {name} is there twice")
            (kind,) = self._numbers("I")
            fields[name] = self._value(kind)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._name()
            if name in tensors:
                raise HeaderError(f"tensor {name} is there twice")
            (axes,) = self._numbers("I")
            if axes > _MOST_AXES:
                raise HeaderError(f"a tensor has {axes} axes")
            shape = self._numbers("Q" * axes)[::-1]
            if math.prod(shape) > 8 * size:  # no element takes less than a bit
                raise HeaderError("a tensor is larger than the file")
            tensors[name] = TensorInfo(name, shape, *self._numbers("IQ"))
        alignment = fields.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= size:
            raise HeaderError(f"its alignment is {alignment!r}")
        begin = -(-(size - self._left) // alignment) * alignment
        return Header(fields, [t._replace(start=begin + t.start) for t in tensors.values()])

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._numbers("IQ")
            return self._array(inner, length, depth=1)
        values = self._array(kind, 1, depth=0)
        return bool(values[0]) if kind == _TRUTH else values[0].item()

    def _array(self, kind: int, length: int, *, depth: int) -> Any:
        if kind in _FORMS:
            form = np.dtype(_FORMS[kind])
            return np.frombuffer(self._take(length * form.itemsize), form)
        if kind not in _LEAST:
            raise HeaderError(f"a field has the unknown type {kind}")
        self._fits(length * _LEAST[kind])
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        if depth > 1:
            raise HeaderError("a field is a list of lists of lists")
        for _ in range(length):
            inner, count = self._numbers("IQ")
            self._array(inner, count, depth=depth + 1)
        return None

    def _name(self) -> str:
        try:
            return self._string().decode()
        except UnicodeDecodeError:
            raise HeaderError("a name in it is no UTF-8") from None

    def _string(self) -> bytes:
        (length,) = self._numbers("Q")
        return self._take(length)

    def _numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, size: int) -> bytes:
        self._fits(size)
        self._left -= size
        data = self._file.read(size)
        if len(data) < size:
            raise HeaderError("it ends inside its header")
        return data

    def _fits(self, size: int) -> None:
        if size > self._left:
            raise HeaderError("it ends inside its header")
