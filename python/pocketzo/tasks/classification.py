"""Classification: each example has one class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pocketzo.data.examples import Encoded, Example, LineError, text_of
from pocketzo.tasks.base import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.formats.bundle import Bundle


class Classification(Task):
    """A text, or a pair of texts, and its class.

    A label is a class name of the bundle, or a class number from 0. If a class name looks like a number, labels must be
    names. If the bundle has neither names nor a number of classes, any number from 0 is a class.

    Parameters
    ----------
    bundle : Bundle
        The model.
    labels : sequence of str, optional
        The names of the classes, in the order of the logits.
    """

    name: ClassVar[str] = "classification"
    settings: ClassVar[tuple[str, ...]] = ("labels",)
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "sentence1"),
        "text_pair": ("text_pair", "sentence2"),
        "label": ("label", "labels"),
    }
    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {
        1: ("text",),
        2: ("text", "label"),
        3: ("text", "text_pair", "label"),
    }
    labels_per: ClassVar[Literal["example", "token"]] = "example"
    default_metric: ClassVar[str] = "accuracy"

    def __init__(self, bundle: Bundle, *, labels: Sequence[str] | None = None) -> None:
        super().__init__(bundle)
        names = tuple(labels or ())
        count = len(names) or self.class_count
        if count != self.class_count is not None:
            raise ValueError(f"'labels' has {count} names, and the logits have {self.class_count} classes")
        self._ids = {name: index for index, name in enumerate(names)}
        expected = [repr(name) for name in names[:10]] + ["..."] * (len(names) > 10)
        if count is None:
            expected = ["an integer from 0"]
        elif not any(re.fullmatch("-?[0-9]+", name) for name in names):
            self._ids |= {str(index): index for index in range(count)}
            expected.append(f"0 to {count - 1}")
        self._any = count is None
        self._expected = ", ".join(expected)

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read text, pair and class from a record."""
        text, pair, label = (self.find(record, columns, role) for role in ("text", "text_pair", "label"))
        if text is None:
            raise LineError(self.missing(record, columns, "text"))
        first = text_of(record, text)
        second = None if pair is None else text_of(record, pair)
        if pair is None and columns.text_pair is not None:
            raise LineError(self.missing(record, columns, "text_pair"))
        return Example(first, second, None if label is None else self.class_number(record[label]))

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
        """Return the tokens and the class of each example."""
        encodings = tokenizer.encode_batch([e.text if e.pair is None else (e.text, e.pair) for e in examples])
        return [Encoded(got.ids, got.type_ids, e.label) for e, got in zip(examples, encodings, strict=True)]

    def class_number(self, label: object) -> int:
        """Return the class number of a label; raise :class:`LineError` for an unknown label."""
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise LineError(f"the label must be a name or an integer, found {type(label).__name__}")
        text = str(label)
        if self._any and re.fullmatch("[0-9]{1,9}", text):
            return int(text)
        if text not in self._ids:
            raise LineError(f"unknown label {text[:80]!r}: expected {self._expected}")
        return self._ids[text]
