"""A segment of an activation cache: values at the cut of a graph, by example.

====================  ==================================================================================================
8 bytes               ``PZACTIVE``
uint32                length of the description
JSON                  ``format``, ``version``, ``front`` (what the values depend on besides the example, in hex),
                      ``dtype``, ``count``, and ``values``: the name, dtype and axes of each
40 bytes an entry     key of the example (16 bytes), offset in the file and length (uint64), tokens and CRC-32 (uint32)
uint32                CRC-32 of all before it
entries               each at a multiple of 64 bytes: the elements of one value after the other
====================  ==================================================================================================

All numbers are little-endian. Elements are stored as they are where ``dtype`` is fp32. With fp16 they are float16. With
int8 there are a float32 scale for each 64 elements of a value, or for what is left at its end, and then the elements as
int8, to be multiplied by it.

A segment is written beside its place and renamed, so that there is no part of one. ``docs/formats.md`` specifies this
for readers in other languages.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import CacheError
from pocketzo.formats import strict_json
from pocketzo.formats.staging import staged_file

MAGIC: Final = b"PZACTIVE"
FORMAT: Final = "pocketzo-activations"
VERSION: Final = 1
SUFFIX: Final = ".pza"
ALIGNMENT: Final = 64
BLOCK: Final = 64
"""Elements that share a scale, with int8."""

Dtype: TypeAlias = Literal["fp32", "fp16", "int8"]
"""How elements are stored."""

_ENTRY: Final = struct.Struct("<16sQQII")
_LENGTH: Final = struct.Struct("<I")
_MOST: Final = 1 << 24  # bytes of a description


class StoredValue(NamedTuple):
    """A value at the cut.

    Attributes
    ----------
    name : str
    dtype : {"float32", "float16"}
    axes : tuple of int or None
        The shape for one example; None is its number of tokens.
    """

    name: str
    dtype: str
    axes: tuple[int | None, ...]

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Return the shape for an example of so many tokens."""
        return tuple(tokens if axis is None else axis for axis in self.axes)


@dataclass(frozen=True)
class Layout:
    """What the segments of one cut have in common.

    Attributes
    ----------
    front : bytes
        Identifies all that the values depend on besides the example, 32 bytes.
    dtype : {"fp32", "fp16", "int8"}
    values : tuple of StoredValue
    """

    front: bytes
    dtype: Dtype
    values: tuple[StoredValue, ...]

    def nbytes(self, tokens: int) -> int:
        """Return the size of an entry of an example of so many tokens."""
        return sum(self._size(value, math.prod(value.shape(tokens))) for value in self.values)

    def encode(self, arrays: Sequence[NDArray[Any]]) -> bytes:
        """Return the bytes of an entry.

        Raises
        ------
        CacheError
            An element is not finite, or too large for float16, and would be another number when it is read.
        """
        return b"".join(self._encoded(*pair) for pair in zip(self.values, arrays, strict=True))

    def decode(self, data: memoryview, tokens: int) -> list[NDArray[Any]]:
        """Return the arrays of an entry of :meth:`nbytes` bytes."""
        arrays, at = [], 0
        for value in self.values:
            shape = value.shape(tokens)
            size = self._size(value, math.prod(shape))
            arrays.append(self._decoded(value, data[at : at + size], shape))
            at += size
        return arrays

    def _size(self, value: StoredValue, count: int) -> int:
        if self.dtype == "int8":
            return 4 * -(-count // BLOCK) + count
        return count * (2 if self.dtype == "fp16" else np.dtype(value.dtype).itemsize)

    def _encoded(self, value: StoredValue, array: NDArray[Any]) -> bytes:
        if self.dtype == "fp32":
            data: bytes = np.ascontiguousarray(array, np.dtype(value.dtype).newbyteorder("<")).tobytes()
            return data
        flat = array.astype(np.float32).reshape(-1)
        largest = float(np.abs(flat).max(initial=0))
        if not math.isfinite(largest) or (self.dtype == "fp16" and largest > float(np.finfo(np.float16).max)):
            raise CacheError(
                f"{value.name} has the element {largest:.6g}, which {self.dtype} cannot keep: give --cache-dtype fp32"
            )
        if self.dtype == "fp16":
            halves: bytes = flat.astype("<f2").tobytes()
            return halves
        blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
        scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float32)
        numbers = np.rint(blocks / np.where(scales == 0, 1, scales)).astype(np.int8).reshape(-1)[: len(flat)]
        return bytes(scales.astype("<f4").tobytes() + numbers.tobytes())

    def _decoded(self, value: StoredValue, data: memoryview, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(value.dtype)
        if self.dtype == "fp32":
            array: NDArray[Any] = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)
            return array
        if self.dtype == "fp16":
            return np.frombuffer(data, "<f2").reshape(shape).astype(dtype)
        count = math.prod(shape)
        scales = np.frombuffer(data[: len(data) - count], "<f4")
        numbers = np.frombuffer(data[len(data) - count :], np.int8).astype(np.float32)
        numbers *= np.repeat(scales, BLOCK)[:count]
        return numbers.reshape(shape).astype(dtype)

    def described(self, count: int) -> bytes:
        """Return the description of a segment with so many entries."""
        values = [{"name": value.name, "dtype": value.dtype, "axes": value.axes} for value in self.values]
        fields = {"format": FORMAT, "version": VERSION, "front": self.front.hex(), "dtype": self.dtype}
        return json.dumps(fields | {"count": count, "values": values}, ensure_ascii=False).encode()


class Entry(NamedTuple):
    """An example in a segment: where it is, and what its bytes must sum up to."""

    start: int
    length: int
    tokens: int
    crc: int


class New(NamedTuple):
    """An entry to write."""

    tokens: int
    data: bytes


def write_segment(path: Path, layout: Layout, entries: Mapping[bytes, New]) -> None:
    """Write a segment, readable by its owner only, beside its place and rename it.

    Parameters
    ----------
    path : Path
    layout : Layout
    entries : mapping of bytes to New
        By key, 16 bytes.
    """
    described = layout.described(len(entries))
    at = len(MAGIC) + _LENGTH.size + len(described) + _ENTRY.size * len(entries) + 4
    table, offsets = [], []
    for key, (tokens, data) in entries.items():
        at = -(-at // ALIGNMENT) * ALIGNMENT
        offsets.append(at)
        table.append(_ENTRY.pack(key, at, len(data), tokens, zlib.crc32(data)))
        at += len(data)
    head = MAGIC + _LENGTH.pack(len(described)) + described + b"".join(table)
    with staged_file(path) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o600)  # before there is anything in it
        file.write(head + _LENGTH.pack(zlib.crc32(head)))
        for offset, (_, data) in zip(offsets, entries.values(), strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(data)


class Segment:
    """An open segment, mapped into memory.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
    layout : Layout
    entries : dict of bytes to Entry
        By key.
    nbytes : int
        Size of the file.

    Raises
    ------
    CacheError
        The file is damaged, or no segment; names file, offset and reason.
    OSError
        It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise CacheError(f"{path}: offset 0: the file is empty")
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.nbytes = size
        self.layout, self.entries = _parse(path, self._data)
        self._checked: set[bytes] = set()

    def read(self, key: bytes) -> list[NDArray[Any]]:
        """Return the values of an example, which are checked when they are read for the first time.

        Raises
        ------
        CacheError
            Its bytes are damaged.
        """
        entry = self.entries[key]
        data = self._data[entry.start : entry.start + entry.length]
        if key not in self._checked:
            if zlib.crc32(data) != entry.crc:
                raise CacheError(f"{self.path}: offset {entry.start}: the checksum of an entry does not match")
            self._checked.add(key)
        return self.layout.decode(data, entry.tokens)


def _parse(path: Path, data: memoryview) -> tuple[Layout, dict[bytes, Entry]]:
    def damaged(at: int, reason: str) -> CacheError:
        return CacheError(f"{path}: offset {at}: {reason}")

    begin = len(MAGIC) + _LENGTH.size
    if len(data) < begin or bytes(data[: len(MAGIC)]) != MAGIC:
        raise damaged(0, f"no {MAGIC.decode()} at the beginning: not a segment of an activation cache")
    (length,) = _LENGTH.unpack(data[len(MAGIC) : begin])
    if length > min(_MOST, len(data) - begin):
        raise damaged(len(MAGIC), f"a description of {length} bytes does not fit into {len(data)}")
    try:
        fields = strict_json.parse(bytes(data[begin : begin + length]))
        layout, count = _layout(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(begin, f"the description cannot be used: {error}") from None
    at = begin + length
    end = at + _ENTRY.size * count
    if end + 4 > len(data):
        raise damaged(at, f"{count} entries do not fit into {len(data)} bytes")
    if _LENGTH.unpack(data[end : end + 4]) != (zlib.crc32(data[:end]),):
        raise damaged(end, "the checksum of the description does not match")
    entries = {}
    for key, entry in _entries(data[at:end]):
        if entry.start < end + 4 or entry.start + entry.length > len(data):
            raise damaged(entry.start, "an entry is not within the file")
        if not entry.tokens or entry.length != layout.nbytes(entry.tokens):
            raise damaged(entry.start, f"an entry of {entry.tokens} tokens has {entry.length} bytes")
        entries[key] = entry
    return layout, entries


def _entries(table: memoryview) -> Iterator[tuple[bytes, Entry]]:
    for key, *fields in _ENTRY.iter_unpack(table):
        yield key, Entry(*fields)


def _layout(fields: Any) -> tuple[Layout, int]:
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise ValueError(f"expected {FORMAT} version {VERSION}, got {fields['format']!r} {fields['version']!r}")
    count, dtype = fields["count"], fields["dtype"]
    if type(count) is not int or count < 0:
        raise ValueError(f"'count' is {count!r}")
    if dtype not in ("fp32", "fp16", "int8"):
        raise ValueError(f"'dtype' is {dtype!r}")
    values = []
    for value in fields["values"]:
        axes = tuple(value["axes"])
        if value["dtype"] not in ("float32", "float16") or not isinstance(value["name"], str):
            raise ValueError(f"a value is {value!r}")
        if any(axis is not None and (type(axis) is not int or not 0 < axis < 1 << 31) for axis in axes):
            raise ValueError(f"the axes of a value are {axes}")
        values.append(StoredValue(value["name"], value["dtype"], axes))
    return Layout(bytes.fromhex(fields["front"]), dtype, tuple(values)), count
