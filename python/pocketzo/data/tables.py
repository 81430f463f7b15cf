"""The columns of TSV and CSV files: by the header, or by their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pocketzo.data.columns import Columns, LineError, find_column, missing_column, option_of

if TYPE_CHECKING:
    from pocketzo.data.readers import Record, Row
    from pocketzo.tasks.base import Task

DELIMITERS = (";", "\t", ",", "|")


def with_columns(
    rows: Iterator[tuple[int, Row]], columns: Columns, task: Task, require_labels: bool
) -> Iterator[tuple[int, Record]]:
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
            if any(columns.named()) or _is_header(row, task):
                header = tuple(row)
                if reason := _bad_header(header, columns, task):
                    yield number, reason
                    return
                continue
            if reason := _not_headerless(row, task, require_labels):
                yield number, reason
                return
            header = task.headerless[len(row)]
            if reason := _bad_first_row(dict(zip(header, row, strict=True)), task):
                yield number, reason
                continue
        if len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        else:
            yield number, f"found {len(row)} of {len(header)} fields ({', '.join(header)})"


def _is_header(row: list[str], task: Task) -> bool:
    folded = {cell.strip().lower() for cell in row}
    named = [not folded.isdisjoint(names) for names in task.columns.values()]
    return named[0] and (len(row) == 1 or any(named[1:]))


def _bad_header(header: tuple[str, ...], columns: Columns, task: Task) -> str | None:
    if repeated := {column for column in header if header.count(column) > 1}:
        return f"the header names {', '.join(map(repr, sorted(repeated)))} more than once"
    try:
        for index, (role, names) in enumerate(task.columns.items()):
            given = getattr(columns, role)
            if find_column(header, given, names) is None and (index == 0 or given):
                return missing_column(header, given, names, role) + _other_delimiter(header)
    except LineError as error:
        return str(error)
    return None


def _not_headerless(row: list[str], task: Task, require_labels: bool) -> str | None:
    """Return the reason why a first row that is no header cannot be an example either, or None."""
    hint = _other_delimiter(row)
    split_is_header = bool(hint) and any(_is_header(row[0].split(mark), task) for mark in DELIMITERS if mark in row[0])
    needs_label = require_labels and task.label_spec is not None
    if len(row) in task.headerless and not split_is_header and not (len(row) == 1 and needs_label):
        return None
    names = task.headerless.get(2) or [names[0] for names in task.columns.values()]
    hint = hint or ": name its columns by " + " and ".join(map(option_of, ("text", "label")))
    return f"{len(row)} column{'s' * (len(row) > 1)} and no header that names {' and '.join(names)}{hint}"


def _bad_first_row(record: dict[str, str], task: Task) -> str | None:
    """Return the reason why the first row cannot be an example, or None: it may be a header of unusual names."""
    try:
        task.example(record, Columns())
    except LineError as error:
        options = ", ".join(option_of(role) for role in task.columns)
        return f"{error}. If this row is a header, name its columns: {options}"
    return None


def _other_delimiter(row: tuple[str, ...] | list[str]) -> str:
    """Return a hint, if a row has one field, and this contains the delimiter of other files."""
    mark = next((mark for mark in DELIMITERS if len(row) == 1 and mark in row[0]), None)
    shown = "tab" if mark == "\t" else f"'{mark}'"
    return "" if mark is None else f": if {shown} separates the columns, say so by --delimiter {shown}"
