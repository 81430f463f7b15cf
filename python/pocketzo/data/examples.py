"""Records checked against a bundle: text, pair and label of each example."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketzo.errors import DataError

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle
from pocketzo.data.columns import Columns, find_column, missing_column
from pocketzo.data.readers import LABEL_NAMES, PAIR_NAMES, TEXT_NAMES, Record, not_unicode


class LineError(Exception):
    """What is wrong with a line."""


class Problems:
    """The first bad line, and how many there are."""

    def __init__(self, source: str, unit: str) -> None:
        self.source = source
        self.unit = unit
        self.reasons: dict[int, str] = {}

    def add(self, number: int, reason: str) -> None:
        """Keep what is wrong with a line."""
        self.reasons.setdefault(number, reason)

    def check(self) -> None:
        """Raise a :class:`DataError` if any line was bad."""
        if self.reasons:
            first = min(self.reasons)
            others = len(self.reasons) - 1
            more = f" (and {others} other bad {self.unit}{'s' * (others > 1)})" if others else ""
            raise DataError(f"{self.source}, {self.unit} {first}: {self.reasons[first]}{more}")


class Example(NamedTuple):
    """One example, checked: the number of its line, its text, and its pair and label if any."""

    number: int
    text: str
    pair: str | None
    label: int | None


class Classes:
    """The labels that a bundle knows."""

    def __init__(self, bundle: Bundle) -> None:
        names = bundle.labels or ()
        logits = next((spec.shape for spec in bundle.outputs if spec.name == bundle.logits), ())
        count = len(names) or (logits[-1] if logits else None)
        self.ids = {name: index for index, name in enumerate(names)}
        self.open = not isinstance(count, int)
        expected = [repr(name) for name in names[:10]] + ["..."] * (len(names) > 10)
        if not isinstance(count, int):
            expected = ["an integer from 0"]
        elif not any(re.fullmatch("-?[0-9]+", name) for name in names):
            self.ids |= {str(index): index for index in range(count)}
            expected.append(f"0 to {count - 1}")
        self.expected = ", ".join(expected)

    def id(self, label: object) -> int:
        """Return the number of the class that a label names."""
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise LineError(f"the label must be a name or an integer, found {type(label).__name__}")
        text = str(label)
        if self.open and re.fullmatch("[0-9]{1,9}", text):
            return int(text)
        if text not in self.ids:
            raise LineError(f"unknown label {text[:80]!r}: expected {self.expected}")
        return self.ids[text]


def examples_of(
    records: Iterable[tuple[int, Record]],
    bundle: Bundle,
    columns: Columns,
    require_labels: bool,
    problems: Problems,
) -> Iterator[Example]:
    """Check records and yield the good ones; ``problems`` gets the others."""
    classes = Classes(bundle)
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
            text, pair = _text(record, columns.text, TEXT_NAMES), _text(record, columns.text_pair, PAIR_NAMES)
            if text is None:
                raise LineError(missing_column(record, columns.text, TEXT_NAMES))
            if pair is None and columns.text_pair is not None:
                raise LineError(missing_column(record, columns.text_pair, PAIR_NAMES))
            name = find_column(record, columns.label, LABEL_NAMES)
            label = None if name is None or record[name] is None else classes.id(record[name])
            if labelled is None:
                labelled = label is not None
            if labelled and label is None:
                raise LineError(missing_column(record, columns.label, LABEL_NAMES))
            if not labelled and label is not None:
                raise LineError("a label, where the lines before have none")
        except LineError as error:
            problems.add(number, str(error))
        else:
            yield Example(number, text, pair, label)


def _text(record: dict[str, Any], given: str | None, known: tuple[str, ...]) -> str | None:
    name = find_column(record, given, known)
    if name is None or record[name] is None:
        return None
    text = record[name]
    if not isinstance(text, str):
        raise LineError(f"{name!r} must be a string, found {type(text).__name__}")
    if not text.strip():
        raise LineError(f"{name!r} is empty")
    if reason := not_unicode(text):
        raise LineError(reason)
    return text
