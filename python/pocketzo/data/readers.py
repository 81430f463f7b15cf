"""Readers of JSONL, TSV and CSV files."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

from pocketzo.errors import DataError

Record: TypeAlias = "dict[str, Any] | str | None"  # values by column; or an error message; None for an empty line
Row: TypeAlias = "list[str] | str"  # fields, none for an empty line; or an error message

_LONGEST_FIELD: Final = 2**31 - 1
_ENCODINGS: Final = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKED: Final = {
    b"\x1f\x8b": "compressed by gzip: unpack it by gunzip",
    b"PK\x03\x04": "a zip archive, as spreadsheets (.xlsx) are: unpack it, or save the sheet as .csv",
}


def not_unicode(text: str) -> str | None:
    """Return the reason why a text is not valid Unicode, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # A byte that is not UTF-8 was read as U+DC00 + byte ("surrogateescape"); JSON can escape any surrogate.
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"not a character: U+{code:X}"
    return None


class _Lines:
    r"""The lines of a text file with their ends, and the first error in them since it was last asked for.

    Parameters
    ----------
    path : Path
    newline : {"", "\n"}
        As in :func:`open`: whether CR ends a line beside LF. It does in a file that has no LF.

    Raises
    ------
    DataError
        The file is packed.
    """

    def __init__(self, path: Path, newline: str) -> None:
        with path.open("rb") as file:
            start = file.read(64)
        if packed := next((reason for magic, reason in _PACKED.items() if start.startswith(magic)), None):
            raise DataError(f"{path}: {packed}")
        if len(start) >= 8 and {any(start[::2]), any(start[1::2])} == {True, False}:
            raise DataError(
                f"{path}: every second byte is zero, as in UTF-16, and there is no byte order mark: save "
                "the file as UTF-8"
            )
        self._path = path
        self._encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8-sig")
        self._newline = newline
        self._offset = len(codecs.BOM_UTF8) * start.startswith(codecs.BOM_UTF8)
        self._reason: str | None = None

    def __iter__(self) -> Iterator[str]:
        errors = "surrogateescape" if self._encoding == "utf-8-sig" else "strict"
        newline = self._newline
        if newline == "\n":
            with self._path.open(encoding=self._encoding, errors=errors, newline="") as file:
                if not any("\n" in chunk for chunk in iter(lambda: file.read(1 << 16), "")):
                    newline = "\r"
        with self._path.open(encoding=self._encoding, errors=errors, newline=newline) as file:
            for line in file:
                self._note(line)
                yield line

    def take_reason(self) -> str | None:
        """Return why the lines since the last call are no text, or None."""
        reason, self._reason = self._reason, None
        return reason

    def _note(self, line: str) -> None:
        raw = line.encode(errors="surrogateescape")
        if self._reason is None and (reason := not_unicode(line)):
            at = next(index for index, character in enumerate(line) if "\udc80" <= character <= "\udcff")
            at = self._offset + len(line[:at].encode())
            self._reason = f"{reason} at offset {at} of the file: save the file as UTF-8"
        self._offset += len(raw)


def _read_lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number, the text and the encoding error, if any, of each line."""
    lines = _Lines(path, "\n")
    for number, line in enumerate(lines, 1):
        end = "\r\n" if line.endswith("\r\n") else line[-1] if line[-1] in "\r\n" else ""
        yield number, line.removesuffix(end), lines.take_reason()


def read_txt(path: Path) -> list[str]:
    """Return the lines of a plain text file, each but the last with a line feed."""
    lines = []
    for number, line, reason in _read_lines(path):
        if reason:
            raise DataError(f"{path}, line {number}: {reason}")
        lines.append(f"{line}\n")
    return lines


def read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the number and the record of each line of a JSONL file."""
    for number, line, reason in _read_lines(path):
        if reason or not line.strip():
            yield number, reason
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested brackets
            yield number, f"not JSON that can be read: {error}"
        else:
            yield number, record if isinstance(record, dict) else f"not a JSON object: {type(record).__name__}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return made


def read_tsv(path: Path, delimiter: str = "\t") -> Iterator[tuple[int, Row]]:
    """Yield the number and the fields of each line of a TSV file."""
    for number, line, reason in _read_lines(path):
        pieces = [piece for piece in line.split("\r") if piece]
        if not reason and len(pieces) > 1 and all(delimiter in piece for piece in pieces):
            reason = "several rows, separated by carriage returns, in a file of other line ends: use one kind of them"
        yield number, reason or (line.split(delimiter) if line else [])


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    """Yield the number and the fields of each row of a CSV file."""
    lines = _Lines(path, "")
    rows = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        number = rows.line_num + 1  # the first line of the row
        try:
            row = _next_row(rows)
        except StopIteration:
            return
        except csv.Error as error:
            hint = ": a double quote is not closed" if "end of data" in str(error) else ""
            if number == 1 and not hint:
                hint = f"; if {delimiter!r} is not what separates the columns, name the character by --delimiter"
            yield number, lines.take_reason() or f"not CSV: {error}{hint}"
        else:
            yield number, lines.take_reason() or row


def _next_row(rows: Iterator[list[str]]) -> list[str]:
    """Read a row without the limit of 131,072 characters, which the module csv keeps for the whole process."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return next(rows)
    finally:
        csv.field_size_limit(limit)
