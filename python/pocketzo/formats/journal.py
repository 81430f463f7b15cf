"""The record of a run: what it started from, and one line of 20 bytes for every direction that was drawn.

A journal is the magic ``PZOJ``, the length of the header (u32), the header (JSON), its CRC-32 (u32), and then records
of draw (u64), coefficient (f32), learning rate (f32) and CRC-32 (u32); all little-endian. The CRC of a record covers
the header's CRC, the record's number and its content, so that no record passes for another one.

A step that moved nothing (a loss that was not finite) has coefficient and learning rate 0.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import JournalError
from pocketzo.formats.files import atomic_file
from pocketzo.kernels import SPEC_VERSION

try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None  # type: ignore[assignment]

RECORD = np.dtype([("draw", "<u8"), ("coefficient", "<f4"), ("lr", "<f4"), ("crc", "<u4")])
"""A record as it stands in the file: ``coefficient`` is what the update multiplied the direction by, up to sign."""
_MAGIC = b"PZOJ"
_FORMAT = 1
_BODY = struct.Struct("<Qff")


class Journal:
    """An open journal, to read and to append to.

    Attributes
    ----------
    header : dict
        What was given to :meth:`create`, and ``format`` and ``spec``, the versions.
    records : ndarray
        dtype :data:`RECORD`; those that the file held when it was opened.
    notice : str or None
        What was wrong at the end of the file and has been cut off.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        header: dict[str, Any],
        crc: int,
        records: NDArray[np.void],
        notice: str | None,
    ) -> None:
        self.path = path
        self.header = header
        self.records = records
        self.notice = notice
        self._file = file
        self._crc = crc
        self._count = len(records)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Begin a journal; a :class:`JournalError` where one is there."""
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
            It is no journal, of another version, damaged before its end, or in use.
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
            data = file.read()
            header, crc, start = _read_header(path, data)
            records, notice = _read_records(path, data, start, crc)
            if write and notice:
                file.truncate(start + records.nbytes)
                file.seek(0, os.SEEK_END)
            if not write:
                file.close()
            return cls(path, file, header, crc, records, notice)
        except BaseException:
            file.close()
            raise

    def append(self, records: Sequence[tuple[int, float, float]]) -> None:
        """Append the (draw, coefficient, lr) of one step, in one write: a killed process leaves whole records."""
        data = bytearray()
        for number, (draw, coefficient, lr) in enumerate(records, self._count):
            body = _BODY.pack(draw, coefficient, lr)
            data += body + struct.pack("<I", _checksum(self._crc, number, body))
        start = self._file.tell()
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except BaseException:  # a full disk takes a part
            self._file.truncate(start)
            self._file.seek(start)
            raise
        self._count += len(records)

    def truncate(self, count: int) -> None:
        """Drop the records after the first ``count``."""
        self.records = self.records[:count]
        end = self._file.seek(0, os.SEEK_END) - (self._count - count) * RECORD.itemsize
        self._file.truncate(end)
        self._file.seek(end)
        self._count = count

    def sync(self) -> None:
        """Have the system write it to storage."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()


def _checksum(header_crc: int, number: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<Q", number), header_crc))


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
    header = json.loads(text)
    if header["format"] != _FORMAT:
        raise JournalError(f"{path}: format version {header['format']}; this PocketZO reads version {_FORMAT}")
    if header["spec"] != SPEC_VERSION:
        raise JournalError(
            f"{path}: recorded with version {header['spec']} of the noise specification; this PocketZO has version "
            f"{SPEC_VERSION} and would compute other weights"
        )
    return header, crc, 12 + length


def _read_records(path: Path, data: bytes, start: int, header_crc: int) -> tuple[NDArray[np.void], str | None]:
    count, rest = divmod(len(data) - start, RECORD.itemsize)
    records = np.frombuffer(data, RECORD, count, start)
    body = memoryview(data)
    good = [
        _checksum(header_crc, i, body[at : at + _BODY.size]) == crc
        for i, (at, crc) in enumerate(
            zip(range(start, start + count * RECORD.itemsize, RECORD.itemsize), records["crc"].tolist(), strict=True)
        )
    ]
    whole = count
    while whole and not good[whole - 1]:
        whole -= 1
    if not all(good[:whole]):
        bad = good.index(False)
        raise JournalError(
            f"{path}: record {bad} (of {count}, at byte {start + bad * RECORD.itemsize}) is damaged, and there are "
            f"good ones after it: its checksum does not match its content"
        )
    notice = None
    if whole < count or rest:
        dropped = len(data) - start - whole * RECORD.itemsize
        notice = (
            f"{path}: the last {dropped} bytes are an incomplete record and have been dropped; {whole} records are good"
        )
    return records[:whole].copy(), notice
