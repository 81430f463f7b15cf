"""What tasks share that read one text, or a pair of texts, and one label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pocketzo.data.columns import LineError
from pocketzo.data.examples import Encoded, Example, Row, text_of
from pocketzo.tasks.base import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.formats.bundle import Bundle

TEXT: Final = ("text", "sentence", "sentence1")
TEXT_PAIR: Final = ("text_pair", "sentence2")


class TextTask(Task):
    """A text, or a pair of texts, and its label."""

    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {
        1: ("text",),
        2: ("text", "label"),
        3: ("text", "text_pair", "label"),
    }
    labels_per: ClassVar[Literal["example", "token", "nothing"]] = "example"

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read text, pair and label from a record."""
        text, pair, label = (self.find(record, columns, role) for role in ("text", "text_pair", "label"))
        if text is None:
            raise LineError(self.missing(record, columns, "text"))
        first = text_of(record, text)
        second = None if pair is None else text_of(record, pair)
        if pair is None and columns.text_pair is not None:
            raise LineError(self.missing(record, columns, "text_pair"))
        return Example(first, second, None if label is None else self.label_value(record[label]))

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return the tokens and the label of each example."""
        encodings = tokenizer.encode_batch([e.text if e.pair is None else (e.text, e.pair) for e in examples])
        return [
            Encoded([Row(got.ids, got.type_ids)], example.label, bool(got.overflowing))
            for example, got in zip(examples, encodings, strict=True)
        ]


class Classes:
    """The classes of a task, by name and by number.

    If a class name looks like a number, classes have names only. Without names or a count, any number from 0 is a
    class.

    Parameters
    ----------
    names : sequence of str
        The names in the order of the scores; may be empty.
    count : int or None
        The number of classes of the graph; None if the graph does not fix it.

    Attributes
    ----------
    count : int or None
        The number of names, or of classes of the graph.
    have_spaces : bool
        Whether a name contains white space.

    Raises
    ------
    ValueError
        The names are not as many as the classes.
    """

    def __init__(self, names: Sequence[str], count: int | None) -> None:
        if names and count not in (None, len(names)):
            raise ValueError(f"'labels' has {len(names)} names, and the scores have {count} classes")
        self.count = len(names) or count
        self.have_spaces = any(name.split() != [name] for name in names)
        self._ids = {name: index for index, name in enumerate(names)}
        expected = [repr(name) for name in names[:10]] + ["..."] * (len(names) > 10)
        if self.count is None:
            expected = ["an integer from 0"]
        elif not any(re.fullmatch("-?[0-9]+", name) for name in names):
            self._ids |= {str(index): index for index in range(self.count)}
            expected.append(f"0 to {self.count - 1}")
        self._expected = ", ".join(expected)

    def number(self, label: object) -> int:
        """Return the number of a class by its name or number; raise :class:`LineError` for an unknown one."""
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise LineError(f"the label must be a name or an integer, found {type(label).__name__}")
        text = str(label)
        if self.count is None and re.fullmatch("[0-9]{1,9}", text):
            return int(text)
        if text not in self._ids:
            raise LineError(f"unknown label {text[:80]!r}: expected {self._expected}")
        return self._ids[text]


class ClassesTask(TextTask):
    """A text, or a pair of texts, and a label of named classes.

    Parameters
    ----------
    bundle : Bundle
        The model.
    labels : sequence of str, optional
        The names of the classes, in the order of the scores.
    loss, threshold : optional
        See :class:`Task`.
    """

    settings: ClassVar[tuple[str, ...]] = ("labels", "loss", "threshold")

    def __init__(
        self,
        bundle: Bundle,
        *,
        labels: Sequence[str] | None = None,
        loss: str | None = None,
        threshold: float | None = None,
    ) -> None:
        super().__init__(bundle, loss=loss, threshold=threshold)
        self._classes = Classes(labels or (), self.class_count)
