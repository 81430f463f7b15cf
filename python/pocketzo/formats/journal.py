"""The journal of a run: a header that names its start, and one entry per step; enough to rebuild the weights.

All numbers are little-endian. A journal is

======  ==============================================================================================
bytes   content
======  ==============================================================================================
4       ``PZOJ``
u32     length of the header in bytes
..      the header, a JSON object in UTF-8
u32     CRC-32 of the header
..      the entries
======  ==============================================================================================

and an entry is

======  ==============================================================================================
u32     number of directions n, 1 to 2^20
f32     learning rate
n times u64 draw, f32 coefficient: coefficient * direction was subtracted from the weights
u32     CRC-32 of the entry up to here, continued from the CRC-32 of the entry before (of the header, for the first)
======  ==============================================================================================

The CRC-32 is chained, so an entry is valid only at its own position. A step that was undone (a loss was not finite) has
coefficients and learning rate 0. ``docs/formats.md`` specifies this for readers in other languages.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketzo.errors import JournalError
from pocketzo.formats import strict_json
from pocketzo.formats.files import append, cut, named
from pocketzo.formats.staging import staged_file
from pocketzo.kernels import SPEC_VERSION

try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Entry", "Journal", "Position", "pack_entry", "unpack_entries"]

_MAGIC = b"PZOJ"
_FORMAT = 2
_WORD = struct.Struct("<I")
_HEAD = struct.Struct("<If")
_DIRECTION = struct.Struct("<Qf")
_MOST_DIRECTIONS = 1 << 20
_BEFORE_HEADER = len(_MAGIC) + _WORD.size
_SEARCHED = 1 << 20  # offsets per block, in the search for entries after damage
_MOST_EFFORT, _EFFORT_OF_ONE = 1 << 30, 1 << 10  # limit of that search, in checksummed bytes; fixed cost of an offset


class Entry(NamedTuple):
    """The update of one step.

    Attributes
    ----------
    lr : float
        The learning rate, a float32; 0 if the step was undone.
    coefficients : mapping of int to float
        A float32 coefficient for each draw (64-bit), in the order of the update. The step subtracted coefficient *
        direction.
    """

    lr: float
    coefficients: Mapping[int, float]


class Position(NamedTuple):
    """A position between two steps of a journal. It is unique to that journal, even among those with equal headers.

    Attributes
    ----------
    run : str
        SHA-256 of the header's bytes.
    step : int
        The number of entries before it.
    crc32 : int
        The CRC-32 at the end of the previous entry; that of the header at step 0.
    """

    run: str
    step: int
    crc32: int


class Journal:
    """An open journal, for reading and appending.

    Attributes
    ----------
    path : Path
        The file.
    header : dict
        The header passed to :meth:`create`, with the versions ``format`` and ``spec`` added.
    entries : list of Entry
        The entries in the file when it was opened.
    notice : str or None
        A description of the incomplete end of the file that was dropped; None if there was none.
    """

    def __init__(self, path: Path, file: FileIO, contents: _Contents) -> None:
        self.path = path
        self.header = contents.header
        self.entries = contents.entries
        self.notice = contents.notice
        self._file = file
        self._run = contents.run
        self._ends = contents.ends  # end offset of the header, and of each entry
        self._crcs = contents.crcs  # likewise

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Journal:
        """Create a journal; raise :class:`JournalError` if the file exists."""
        text = strict_json.dump({"format": _FORMAT, "spec": SPEC_VERSION, **header})
        with _locked(path.parent):  # of two processes, the second finds the journal of the first
            if path.exists():
                raise JournalError(f"{path} is there already: resume that run, or choose another folder")
            with staged_file(path) as file:
                file.write(_MAGIC + _WORD.pack(len(text)) + text + _WORD.pack(zlib.crc32(text)))
            return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, write: bool = True) -> Journal:
        """Open a journal and check every byte of it.

        A damaged or incomplete end, for example after a power failure, is dropped with a notice. With ``write``, the
        file is truncated too, and stays open and locked against other processes. Without ``write``, the file is closed.

        Raises
        ------
        JournalError
            The file is missing, not a journal, of another version, damaged before its end, or in use.
        """
        try:
            file = path.open("r+b" if write else "rb", buffering=0)
        except FileNotFoundError:
            raise JournalError(f"{path}: there is no journal here; is {path.parent} a run?") from None
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            if write and fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise JournalError(f"{path}: another process is writing to this run") from None
                except OSError as error:
                    raise JournalError(f"{path}: cannot be locked: {error.strerror}") from None
            with named(path):
                data = file.read()
            contents = _read(path, data)
            if write and contents.notice:
                cut(file, contents.ends[-1], path)
            if not write:
                file.close()
            return cls(path, file, contents)
        except BaseException:
            file.close()
            raise

    @property
    def count(self) -> int:
        """The current number of entries in the file."""
        return len(self._ends) - 1

    def position(self, step: int) -> Position:
        """Return the position after ``step`` entries."""
        return Position(self._run, step, self._crcs[step])

    def append(self, entry: Entry) -> None:
        """Append an entry in one write, so that a killed process leaves complete entries.

        Raises
        ------
        ValueError
            The entry cannot be written exactly: its number of directions, or a number in it, is out of range.
        """
        body = pack_entry(entry)
        crc = zlib.crc32(body, self._crcs[-1])
        body += _WORD.pack(crc)
        append(self._file, body, self._ends[-1], self.path)
        self._ends.append(self._ends[-1] + len(body))
        self._crcs.append(crc)

    def truncate(self, count: int) -> None:
        """Drop the entries after the first ``count``."""
        self.entries = self.entries[:count]
        cut(self._file, self._ends[count], self.path)
        del self._ends[count + 1 :], self._crcs[count + 1 :]

    def sync(self) -> None:
        """Flush the file to storage (fsync)."""
        with named(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the block for this folder, where the system has such locks."""
    with ExitStack() as stack:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def pack_entry(entry: Entry) -> bytes:
    """Return the bytes of an entry without its CRC; raise a ValueError if they do not hold it exactly."""
    lr, coefficients = entry
    if not 1 <= len(coefficients) <= _MOST_DIRECTIONS:
        raise ValueError(f"an entry has 1 to {_MOST_DIRECTIONS} directions, got {len(coefficients)}")
    try:
        body = _HEAD.pack(len(coefficients), lr)
        body += b"".join(_DIRECTION.pack(*item) for item in coefficients.items())
    except (struct.error, OverflowError):
        body = b""
    if not body or not _is_finite(entry) or _unpack(body) != (lr, dict(coefficients)):
        raise ValueError(
            f"an entry has draws of 64 bits, and numbers that are finite and exact in float32; got lr={lr} and "
            f"{reprlib.repr(dict(coefficients))}"
        )
    return body


def unpack_entries(data: bytes, count: int) -> list[Entry]:
    """Return a number of entries without CRCs that follow each other, as of :func:`pack_entry`.

    Raises
    ------
    ValueError
        The bytes are not such entries, or there are more bytes or fewer; gives the offset and the reason.
    """
    entries: list[Entry] = []
    at = 0
    for number in range(count):
        where = f"entry {number} of {count}, at byte {at},"
        if len(data) - at < _HEAD.size:
            raise ValueError(f"{where} ends after {len(data) - at} bytes")
        directions, _ = _HEAD.unpack_from(data, at)
        end = at + _size(directions) - _WORD.size
        if not 1 <= directions <= _MOST_DIRECTIONS or end > len(data):
            raise ValueError(f"{where} has {directions} directions, and {len(data) - at} bytes are left")
        entry = _unpack(memoryview(data)[at:end])
        if not _is_finite(entry) or len(entry.coefficients) != directions:
            raise ValueError(f"{where} cannot be of a step: a number is not finite, or a draw occurs twice")
        entries.append(entry)
        at = end
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes follow {count} entries")
    return entries


def _unpack(body: bytes | memoryview) -> Entry:
    _, lr = _HEAD.unpack_from(body)
    return Entry(lr, dict(_DIRECTION.iter_unpack(memoryview(body)[_HEAD.size :])))


def _is_finite(entry: Entry) -> bool:
    return math.isfinite(entry.lr) and all(map(math.isfinite, entry.coefficients.values()))


class _Contents(NamedTuple):
    run: str
    header: dict[str, Any]
    entries: list[Entry]
    notice: str | None
    ends: list[int]
    crcs: list[int]


def _read(path: Path, data: bytes) -> _Contents:
    text = _header_text(path, data)
    header = _parse_header(path, text)
    entries: list[Entry] = []
    ends, crcs = [_BEFORE_HEADER + len(text) + _WORD.size], [zlib.crc32(text)]
    notice = None
    while ends[-1] < len(data):
        start = ends[-1]
        where = f"entry {len(entries)}, at byte {start}"
        found = _check(data, start, crcs[-1])
        if found.fault and (follows := _search(data, start, found)):
            raise JournalError(f"{path}: {where}, is damaged, and {follows}: {found.fault}")
        if found.fault:
            notice = (
                f"{path}: the last {len(data) - start} bytes are an incomplete entry and were dropped: {where}: "
                f"{found.fault}"
            )
            break
        entry = _unpack(memoryview(data)[start : found.end - _WORD.size])
        if not _is_finite(entry) or _size(len(entry.coefficients)) != found.end - start:
            raise JournalError(f"{path}: {where}, cannot be of a step: a number is not finite, or a draw occurs twice")
        entries.append(entry)
        ends.append(found.end)
        crcs.append(found.crc)
    return _Contents(hashlib.sha256(text).hexdigest(), header, entries, notice, ends, crcs)


class _Found(NamedTuple):
    """A checked entry: its fault or "", its end offset and the CRC-32 of its content; 0, 0 if it is incomplete."""

    fault: str
    end: int
    crc: int


def _size(directions: int) -> int:
    return _HEAD.size + directions * _DIRECTION.size + _WORD.size


def _check(data: bytes, start: int, before: int) -> _Found:
    if len(data) - start < _WORD.size:
        return _Found(f"it ends after {len(data) - start} bytes", 0, 0)
    (count,) = _WORD.unpack_from(data, start)
    if not 1 <= count <= _MOST_DIRECTIONS:
        return _Found(f"its number of directions is {count}, expected 1 to {_MOST_DIRECTIONS}", 0, 0)
    end = start + _size(count)
    if end > len(data):
        return _Found(f"it ends after {len(data) - start} bytes, expected {end - start}", 0, 0)
    crc = zlib.crc32(memoryview(data)[start : end - _WORD.size], before)
    (stored,) = _WORD.unpack_from(data, end - _WORD.size)
    return _Found("" if crc == stored else f"its checksum is {crc:08x}, expected {stored:08x}", end, crc)


def _search(data: bytes, start: int, bad: _Found) -> str:
    """Return a message if good entries follow a bad one, so that the damage is not at the end; else an empty string.

    An entry can be checked on its own, because the previous entry's CRC-32 precedes it. Every offset is tried, because
    bytes may be missing. A crafted file could take hours, so the effort is limited.
    """
    good = "there are good ones after it"
    if bad.end and not _check(data, bad.end, bad.crc).fault:  # only the stored CRC of the bad entry is damaged
        return good
    effort = 0
    for first in range(start + _WORD.size, len(data) - _size(1) + 1, _SEARCHED):
        offsets = min(_SEARCHED, len(data) - _size(1) + 1 - first)
        counts = np.ndarray(offsets, "<u4", data, first, strides=(1,))  # a word at every byte
        for offset in np.flatnonzero((counts >= 1) & (counts <= _MOST_DIRECTIONS)).tolist():
            (before,) = _WORD.unpack_from(data, first + offset - _WORD.size)
            found = _check(data, first + offset, before)
            if not found.fault:
                return good
            effort += max(found.end - first - offset, 0) + _EFFORT_OF_ONE
            if effort > _MOST_EFFORT:
                return "there may be good ones after it: the search for them was given up"
    return ""


def _header_text(path: Path, data: bytes) -> bytes:
    if data[: len(_MAGIC)] != _MAGIC:
        raise JournalError(f"{path}: not a PocketZO journal, which begins with {_MAGIC!r}; got {data[:4]!r}")
    length = int.from_bytes(data[len(_MAGIC) : _BEFORE_HEADER], "little")
    expected = _BEFORE_HEADER + length + _WORD.size
    if len(data) < max(expected, _BEFORE_HEADER + _WORD.size):
        raise JournalError(
            f"{path}: the header is incomplete: the file ends after {len(data)} bytes, expected at least {expected}; "
            f"nothing can be read without it"
        )
    text = data[_BEFORE_HEADER : expected - _WORD.size]
    crc, (stored,) = zlib.crc32(text), _WORD.unpack_from(data, expected - _WORD.size)
    if crc != stored:
        raise JournalError(
            f"{path}: the header, at byte {_BEFORE_HEADER}, is damaged: its checksum is {crc:08x}, expected "
            f"{stored:08x}"
        )
    return text


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = strict_json.parse(text)
    except ValueError as error:
        raise JournalError(f"{path}: the header is not that of a journal: {error}") from None
    if (version := _version(path, header, "format")) != _FORMAT:
        raise JournalError(f"{path}: format version {version}; this PocketZO reads version {_FORMAT}")
    if (version := _version(path, header, "spec")) != SPEC_VERSION:
        raise JournalError(
            f"{path}: recorded with version {version} of the noise specification; this PocketZO has version "
            f"{SPEC_VERSION} and would compute other weights"
        )
    return header


def _version(path: Path, header: Mapping[str, Any], name: str) -> int:
    version = header.get(name)
    if type(version) is not int:
        raise JournalError(f"{path}: the header is not that of a journal: {name!r} is {version!r}, expected an integer")
    return version
