"""Token classification: each token has a class, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pocketzo.data.columns import LineError
from pocketzo.data.examples import Encoded, Example, Row, not_text
from pocketzo.tasks.base import IGNORED
from pocketzo.tasks.classification import Classification

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.formats.bundle import ValueSpec


class TokenClassification(Classification):
    """Words and the class of each: ``{"tokens": ["Ada", "sleeps"], "labels": ["NAME", "O"]}``.

    Either may also be one string, which is split at white space. The first token of a word gets the word's class. All
    other tokens of the word, special tokens and words with the label -100 are ignored.
    """

    name: ClassVar[str] = "token-classification"
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("tokens", "words", "text", "sentence"),
        "label": ("labels", "tags", "label"),
    }
    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {1: ("tokens",), 2: ("tokens", "labels")}
    labels_per: ClassVar[Literal["example", "token", "nothing"]] = "token"
    settings: ClassVar[tuple[str, ...]] = ("labels", "loss")
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy",)

    @classmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return whether a graph with this label input and these scores suits this task."""
        if threshold is not None or (scores is not None and len(scores.shape) != 3):
            return False
        if labels is not None and not (len(labels.shape) == 2 and labels.dtype.startswith(("int", "uint"))):
            return False
        return labels is not None or scores is not None

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read words and their classes from a record."""
        text, label = (self.find(record, columns, role) for role in ("text", "label"))
        if text is None:
            raise LineError(self.missing(record, columns, "text"))
        words = _items(record, text)
        for word in words:
            if not isinstance(word, str):
                raise LineError(f"{text!r} must hold strings, found {type(word).__name__}")
            if reason := not_text(text, word):
                raise LineError(reason)
        if label is None:
            return Example(words, None, None)
        labels = [self.label_value(item) for item in _items(record, label)]
        if len(labels) != len(words):
            raise LineError(f"{len(labels)} labels for {len(words)} words")
        return Example(words, None, labels)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return the tokens of each example, and the class of each token."""
        encodings = tokenizer.encode_batch([example.text for example in examples], is_pretokenized=True)
        return [
            Encoded([Row(got.ids, got.type_ids)], _by_token(got.word_ids, example.label), bool(got.overflowing))
            for example, got in zip(examples, encodings, strict=True)
        ]

    def label_value(self, label: object) -> int:
        """Return the class number of a label, or -100 for -100; raise :class:`LineError` for any other label."""
        if not isinstance(label, bool) and label in (IGNORED, str(IGNORED)):
            return IGNORED
        return super().label_value(label)


def _items(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record[name]
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise LineError(f"{name!r} must be a list or a string, found {type(value).__name__}")
    if not value:
        raise LineError(f"{name!r} is empty")
    return value


def _by_token(words: Sequence[int | None], labels: Any) -> list[int] | None:
    """Return the label of the first token of each word, and -100 for all other tokens."""
    if labels is None:
        return None
    firsts = [word if word != before else None for before, word in zip([None, *words], words, strict=False)]
    return [IGNORED if word is None else labels[word] for word in firsts]
