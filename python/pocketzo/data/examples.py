"""Convert records of a data file to examples, and collect the bad lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketzo.data.columns import LineError
from pocketzo.data.readers import Record, not_unicode
from pocketzo.errors import DataError

if TYPE_CHECKING:
    from pocketzo.data.columns import Columns
    from pocketzo.tasks.base import Task


class Problems:
    """The bad lines of a data source, each with its reason."""

    def __init__(self, source: str, unit: str) -> None:
        self.source = source
        self.unit = unit
        self.reasons: dict[int, str] = {}

    def add(self, number: int, reason: str) -> None:
        """Add a bad line; the first reason for a line is kept."""
        self.reasons.setdefault(number, reason)

    def check(self) -> None:
        """Raise a :class:`DataError` that names the first bad line and counts the others, if there are any."""
        if self.reasons:
            first = min(self.reasons)
            others = len(self.reasons) - 1
            more = f" (and {others} other bad {self.unit}{'s' * (others > 1)})" if others else ""
            raise DataError(f"{self.source}, {self.unit} {first}: {self.reasons[first]}{more}")


class Example(NamedTuple):
    """An example that a task read from a record.

    Attributes
    ----------
    text : str or list of str
        The text, or its words.
    pair : str or None
        The second text of a pair.
    label : int, float, list of int or float, or None
        The class, number or numbers, or the class of each word; None without labels.
    """

    text: str | list[str]
    pair: str | None
    label: Any


class Encoded(NamedTuple):
    """A tokenised example: one row of a batch, without padding.

    Attributes
    ----------
    ids, type_ids : list of int
        One value per token.
    label : int, float, list of int or float, or None
        The class, number or numbers, or one label per token; None without labels.
    cut : bool
        Whether the text was truncated.
    """

    ids: list[int]
    type_ids: list[int]
    label: Any
    cut: bool = False


def examples_of(
    records: Iterable[tuple[int, Record]], task: Task, columns: Columns, require_labels: bool, problems: Problems
) -> Iterator[tuple[int, Example]]:
    """Check records; yield the number and the example of each good one, and add the others to ``problems``."""
    labelled = True if require_labels else None
    empty: list[int] = []
    for number, record in records:
        if record is None:
            empty.append(number)
            continue
        for line in empty:
            problems.add(line, "empty line")
        empty.clear()
        try:
            if isinstance(record, str):
                raise LineError(record)
            example = task.example(record, columns)
            if labelled is None:
                labelled = example.label is not None
            if labelled and example.label is None:
                raise LineError(task.missing(record, columns, "label"))
            if not labelled and example.label is not None:
                raise LineError("a label, where the lines before have none")
        except LineError as error:
            problems.add(number, str(error))
        else:
            yield number, example


def text_of(record: Mapping[str, Any], name: str) -> str:
    """Return the text of a column; raise :class:`LineError` if it is not a string, empty or not valid Unicode."""
    text = record[name]
    if not isinstance(text, str):
        raise LineError(f"{name!r} must be a string, found {type(text).__name__}")
    if reason := not_text(name, text):
        raise LineError(reason)
    return text


def not_text(name: str, text: str) -> str | None:
    """Return the reason why a column's text cannot be used, or None."""
    return not_unicode(text) if text.strip() else f"{name!r} is empty"
