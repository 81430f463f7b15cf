"""The journal of a run: what it started from, and one entry a step, from which the weights can be rebuilt.

All numbers are little-endian. A journal is

======  ==============================================================================================
bytes   content
======  ==============================================================================================
4       ``PZOJ``
u32     length of the header in bytes
..      the header, JSON in UTF-8
u32     CRC-32 of the header
..      the entries
======  ==============================================================================================

and an entry is

======  ==============================================================================================
u32     number of directions n, at least 1
f32     learning rate
n times u64 draw, f32 coefficient: what times the direction was subtracted from the weights
u32     CRC-32 of the entry up to here, continued from the CRC-32 of the entry before (of the header, for the first)
======  ==============================================================================================

so that no entry passes for another one. A step that was undone (a loss was not finite) has coefficients and learning
rate 0. ``docs/formats.md`` specifies this for readers in other languages.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pocketzo.errors import JournalError
from pocketzo.formats.files import atomic_file
from pocketzo.kernels import SPEC_VERSION

try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Entry", "Journal"]

_MAGIC = b"PZOJ"
_FORMAT = 2
_HEAD = struct.Struct("<If")
_DIRECTION = struct.Struct("<Qf")
_CRC = struct.Struct("<I")
_PAIR = struct.Struct("<II")
_MOST_DIRECTIONS = 1 << 20
_MOST_SCANNED = 1 << 10  # in a search after damage, where nearly every offset is none of an entry


class Entry(NamedTuple):
    """What one step did.

    Attributes
    ----------
    lr : float
        The learning rate, a float32; 0 if the step was undone.
    coefficients : mapping of int to float
        By draw (64-bit), in the order of the update: what times the direction was subtracted, a float32.
    """

    lr: float
    coefficients: Mapping[int, float]


class Journal:
    """An open journal, to read and to append to.

    Attributes
    ----------
    path : Path
        The file.
    header : dict
        What was given to :meth:`create`, and ``format`` and ``spec``, the versions.
    entries : list of Entry
        Those that the file held when it was opened.
    notice : str or None
        What was wrong at the end of the file and has been dropped.
    """

    def __init__(self, path: Path, file: BinaryIO, contents: _Contents) -> None:
        self.path = path
        self.header = contents.header
        self.entries = contents.entries
        self.notice = contents.notice
        self._file = file
        self._ends = contents.ends  # offset behind the header, and behind each entry
        self._crcs = contents.crcs  # likewise

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Journal:
        """Begin a journal; a :class:`JournalError` if the file exists."""
        if path.exists():
            raise JournalError(f"{path} is there already: resume that run, or choose another folder")
        with atomic_file(path) as file:
            text = json.dumps({"format": _FORMAT, "spec": SPEC_VERSION, **header}).encode()
            file.write(_MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text)))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, write: bool = True) -> Journal:
        """Open a journal and check every byte of it.

        A damaged or incomplete end, as a power cut leaves it, is dropped with a notice. With ``write`` it is dropped
        from the file, too, which stays open and locked against other processes; without, the file is closed again.

        Raises
        ------
        JournalError
            The file is no journal, of another version, damaged before its end, or in use.
        """
        try:
            file = path.open("r+b" if write else "rb", buffering=0)
        except FileNotFoundError:
            raise JournalError(f"{path}: there is no journal here; is {path.parent} a run?") from None
        try:
            if write and fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise JournalError(f"{path}: another process is writing to this run") from None
            contents = _read(path, file.read())
            if write and contents.notice:
                file.truncate(contents.ends[-1])
                file.seek(0, os.SEEK_END)
            if not write:
                file.close()
            return cls(path, file, contents)
        except BaseException:
            file.close()
            raise

    @property
    def count(self) -> int:
        """Entries in the file now."""
        return len(self._ends) - 1

    def append(self, entry: Entry) -> None:
        """Append a step in one write: a killed process leaves whole entries."""
        body = _HEAD.pack(len(entry.coefficients), entry.lr)
        body += b"".join(_DIRECTION.pack(*item) for item in entry.coefficients.items())
        crc = zlib.crc32(body, self._crcs[-1])
        left = memoryview(body + _CRC.pack(crc))
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except BaseException:  # a full disk takes a part
            self._cut(self._ends[-1])
            raise
        self._ends.append(self._ends[-1] + size)
        self._crcs.append(crc)

    def truncate(self, count: int) -> None:
        """Drop the entries after the first ``count``."""
        self.entries = self.entries[:count]
        self._cut(self._ends[count])
        del self._ends[count + 1 :], self._crcs[count + 1 :]

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)

    def sync(self) -> None:
        """Have the system write the file to storage."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()


class _Contents(NamedTuple):
    header: dict[str, Any]
    entries: list[Entry]
    notice: str | None
    ends: list[int]
    crcs: list[int]


def _read(path: Path, data: bytes) -> _Contents:
    header, crc, start = _read_header(path, data)
    entries, ends, crcs = [], [start], [crc]
    while (found := _entry(data, ends[-1], crcs[-1])) is not None:
        entry, end, crc = found
        entries.append(entry)
        ends.append(end)
        crcs.append(crc)
    rest = len(data) - ends[-1]
    if rest and _goes_on(data, ends[-1], crcs[-1]):
        raise JournalError(
            f"{path}: entry {len(entries)}, at byte {ends[-1]}, is damaged, and there are good ones after it: its "
            f"checksum does not match its content"
        )
    notice = None
    if rest:
        notice = (
            f"{path}: the last {rest} bytes are an incomplete entry and were dropped; {len(entries)} entries are good"
        )
    return _Contents(header, entries, notice, ends, crcs)


def _entry(data: bytes, start: int, before: int) -> tuple[Entry, int, int] | None:
    """Return the entry at an offset, the offset behind it and its CRC; None if there is no whole and good one."""
    end = _end(data, start)
    if end is None:
        return None
    crc = zlib.crc32(memoryview(data)[start : end - _CRC.size], before)
    if _CRC.unpack_from(data, end - _CRC.size) != (crc,):
        return None
    count, lr = _HEAD.unpack_from(data, start)
    coefficients = dict(_DIRECTION.iter_unpack(memoryview(data)[start + _HEAD.size : end - _CRC.size]))
    return (Entry(lr, coefficients), end, crc) if len(coefficients) == count else None


def _end(data: bytes, start: int) -> int | None:
    """Return where an entry would end by its number of directions, if that is within the file."""
    if start + _HEAD.size > len(data):
        return None
    count, _ = _HEAD.unpack_from(data, start)
    end: int = start + _HEAD.size + count * _DIRECTION.size + _CRC.size
    return end if 1 <= count <= _MOST_DIRECTIONS and end <= len(data) else None


def _goes_on(data: bytes, start: int, before: int) -> bool:
    """Whether a good entry begins anywhere after a bad one; each can be checked by the CRC that precedes it."""
    end = _end(data, start)
    if end is not None:  # perhaps it is the CRC that is damaged
        crc = zlib.crc32(memoryview(data)[start : end - _CRC.size], before)
        if _entry(data, end, crc) is not None:
            return True
    for at in range(start + _CRC.size, len(data) - _HEAD.size, _CRC.size):
        before, count = _PAIR.unpack_from(data, at - _CRC.size)
        if 1 <= count <= _MOST_SCANNED and _entry(data, at, before) is not None:
            return True
    return False


def _read_header(path: Path, data: bytes) -> tuple[dict[str, Any], int, int]:
    if data[:4] != _MAGIC or len(data) < 8:
        raise JournalError(f"{path}: not a PocketZO journal, which begins with {_MAGIC!r}; got {data[:4]!r}")
    (length,) = struct.unpack_from("<I", data, 4)
    if len(data) < 12 + length:
        raise JournalError(f"{path}: the header is incomplete: it needs {12 + length} bytes, the file has {len(data)}")
    text = data[8 : 8 + length]
    (crc,) = struct.unpack_from("<I", data, 8 + length)
    if zlib.crc32(text) != crc:
        raise JournalError(f"{path}: the header is damaged: its checksum is {zlib.crc32(text):08x}, expected {crc:08x}")
    try:
        header = json.loads(text)
        version, spec = header["format"], header["spec"]
    except (ValueError, TypeError, KeyError) as error:
        raise JournalError(f"{path}: the header is not that of a journal: {error}") from None
    if version != _FORMAT:
        raise JournalError(f"{path}: format version {version}; this PocketZO reads version {_FORMAT}")
    if spec != SPEC_VERSION:
        raise JournalError(
            f"{path}: recorded with version {spec} of the noise specification; this PocketZO has version "
            f"{SPEC_VERSION} and would compute other weights"
        )
    return header, crc, 12 + length
