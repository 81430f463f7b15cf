"""Convert records of a data file to examples, and collect the bad lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketzo.data.columns import LineError
from pocketzo.data.readers import Record, not_unicode
from pocketzo.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

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
    pair : str or list of str or None
        The second text of a pair, or the texts that may follow.
    label : int, float, list of int or float, or None
        The class, number or numbers, or the class of each word; None without labels.
    spans : sequence of (int, int), or None
        The characters of the text that are learnt, from the first to the one after the last; None for no choice.
    """

    text: str | list[str]
    pair: str | list[str] | None
    label: Any
    spans: Sequence[tuple[int, int]] | None = None


class Row(NamedTuple):
    """A row of a batch, without padding.

    Attributes
    ----------
    ids, type_ids : list of int
        One value per token.
    counted : list of bool or None
        Whether the token counts: its logits, or its loss. None if that is not known by token.
    """

    ids: list[int]
    type_ids: list[int]
    counted: list[bool] | None = None


class Encoded(NamedTuple):
    """A tokenised example.

    Attributes
    ----------
    rows : list of Row
        One, or one for each of several texts that belong together.
    label : int, float, list of int or float, or None
        The class, number or numbers, or one label per token; None without labels.
    cut : bool
        Whether the text was truncated.
    problem : str or None
        Why the example cannot be used.
    prompted : bool
        Whether it is a prompt, or a chat, that is followed by what counts.
    """

    rows: list[Row]
    label: Any
    cut: bool = False
    problem: str | None = None
    prompted: bool = False


def end_of_text(encoding: Encoding) -> int:
    """Return the number of tokens before those that the tokenizer appends, such as an end token.

    Tokens that it puts before the text, such as a first one, are among them; if there is no text, all are.
    """
    stop = len(encoding.ids)
    while stop and encoding.special_tokens_mask[stop - 1]:
        stop -= 1
    return stop or len(encoding.ids)


def examples_of(
    records: Iterable[tuple[int, Record]], task: Task, columns: Columns, require_labels: bool, problems: Problems
) -> Iterator[tuple[int, Example]]:
    """Check records; yield the number and the example of each good one, and add the others to ``problems``."""
    labelled = True if require_labels and task.labels_per != "nothing" else None
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
