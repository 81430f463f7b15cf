"""Readers of JSONL, TSV and CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pocketzo.data.columns import Columns, find_column, missing_column

if TYPE_CHECKING:
    from pocketzo.tasks.base import Task

Record: TypeAlias = "dict[str, Any] | str | None"  # values by column; or an error message; None for an empty line
Row: TypeAlias = "list[str] | str"  # fields, none for an empty line; or an error message


def not_unicode(text: str) -> str | None:
    """Return the reason why a text is not valid Unicode, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # A byte that is not UTF-8 was read as U+DC00 + byte ("surrogateescape"); JSON can escape any surrogate.
        return f"not UTF-8: byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"not a character: U+{code:X}"
    return None


def _read_lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number, the text and the encoding error, if any, of each line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n").removesuffix("\r"), not_unicode(line)


def read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the number and the record of each line of a JSONL file."""
    for number, line, reason in _read_lines(path):
        if reason or not line.strip():
            yield number, reason
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested brackets
            yield number, f"not JSON that can be read: {error}"
        else:
            yield number, record if isinstance(record, dict) else f"not a JSON object: {type(record).__name__}"


def read_tsv(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the number and the fields of each line of a TSV file."""
    for number, line, reason in _read_lines(path):
        yield number, reason or (line.split("\t") if line else [])


def read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the number and the fields of each row of a CSV file."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        while True:
            number = rows.line_num + 1  # the first line of the row
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"not CSV: {error}"
            else:
                yield number, not_unicode("".join(row)) or row


def with_columns(rows: Iterator[tuple[int, Row]], columns: Columns, task: Task) -> Iterator[tuple[int, Record]]:
    """Convert rows to records by the header, or by the task's column order if there is no header."""
    header: tuple[str, ...] | None = None
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        if not row:
            yield number, None
            continue
        if header is None:
            if columns != Columns() or _is_header(row, task):
                header = tuple(row)
                if reason := _bad_header(header, columns, task):
                    yield number, reason
                    return
                continue
            if len(row) not in task.headerless:
                names = task.headerless.get(2) or [names[0] for names in task.columns.values()]
                yield number, f"{len(row)} columns and no header that names {' and '.join(names)}"
                return
            header = task.headerless[len(row)]
        if len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        else:
            yield number, f"found {len(row)} of {len(header)} fields ({', '.join(header)})"


def _is_header(row: list[str], task: Task) -> bool:
    named = [find_column(row, None, names) is not None for names in task.columns.values()]
    return named[0] and (len(row) == 1 or any(named[1:]))


def _bad_header(header: tuple[str, ...], columns: Columns, task: Task) -> str | None:
    if repeated := {column for column in header if header.count(column) > 1}:
        return f"the header names {', '.join(map(repr, sorted(repeated)))} more than once"
    for index, (role, names) in enumerate(task.columns.items()):
        given = getattr(columns, role)
        if (index == 0 or given) and find_column(header, given, names) is None:
            return missing_column(header, given, names)
    return None
