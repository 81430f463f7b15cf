"""Language modelling: the tokens of texts, completions or a chat's answers, each predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np

from pocketzo.data.columns import LineError
from pocketzo.data.examples import Encoded, Example, end_of_text, text_of
from pocketzo.data.turns import answers
from pocketzo.errors import DataError
from pocketzo.tasks.base import IGNORED, Task
from pocketzo.tasks.completion import completed, row_of, too_long
from pocketzo.tasks.metrics import Found

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.formats.bundle import Bundle, ValueSpec
    from pocketzo.tasks.metrics import Metric, Source

TOKEN_LOSSES: Final = "token_losses"
"""The output of the cross-entropy of each token that counts."""


class LanguageTask(Task):
    """What tasks share whose graph gives the loss of each token: inputs ``positions`` and ``targets``."""

    losses: ClassVar[tuple[str, ...]] = ("cross-entropy",)
    cuts: ClassVar[bool] = True
    shift: ClassVar[int] = 1

    def __init__(self, bundle: Bundle, *, loss: str | None = None) -> None:
        super().__init__(bundle, loss=loss)
        self.end = next(iter(bundle.generation.eos), None) if bundle.generation is not None else None

    @classmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return False: no graph has one of these tasks unless it was prepared for it."""
        return False

    def outputs(self, metrics: Sequence[Metric]) -> tuple[str, ...]:
        """Return the name of the output that all metrics need."""
        return (TOKEN_LOSSES,)

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """Raise NotImplementedError: the graph has no scores."""
        raise NotImplementedError


class CausalLM(LanguageTask):
    """Texts to continue: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``.

    All tokens of a text count but the first; of a prompt and its completion, those of the completion, and an end token
    after it; of a chat, those of the assistant's messages. The loss is the mean over the tokens that count.
    """

    name: ClassVar[str] = "causal-lm"
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "messages", "prompt"),
        "text_pair": ("completion",),
    }
    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {1: ("text",), 2: ("prompt", "completion")}
    labels_per: ClassVar[Literal["example", "token", "nothing"]] = "nothing"
    predicts: ClassVar[Source] = "texts"
    default_metric: ClassVar[str] = "perplexity"

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read a text, a prompt and its completion, or a chat from a record."""
        text, pair = (self.find(record, columns, role) for role in ("text", "text_pair"))
        if text is None:
            raise LineError(self.missing(record, columns, "text"))
        if isinstance(record[text], list):
            try:
                chat, spans = answers(self.bundle, record[text])
            except (DataError, ValueError) as error:
                raise LineError(f"{text!r}: {error}") from None
            return Example(chat, None, None, spans)
        if pair is None and (columns.text_pair is not None or text.strip().lower() == "prompt"):
            raise LineError(self.missing(record, columns, "text_pair"))
        return Example(text_of(record, text), None if pair is None else text_of(record, pair), None)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return the tokens of each example, and which of them count."""
        found: dict[int, Encoded] = {}
        pairs = [index for index, one in enumerate(examples) if one.pair is not None]
        rows = completed(
            tokenizer,
            [str(examples[index].text) for index in pairs],
            [str(examples[index].pair) for index in pairs],
            self.end,
        )
        for index, row in zip(pairs, rows, strict=True):
            found[index] = Encoded([row], None, problem=too_long(row, limit, "the completion"), prompted=True)
        texts = [index for index, one in enumerate(examples) if one.pair is None]
        for index in texts:
            spans = examples[index].spans
            encoding = tokenizer.encode(str(examples[index].text), add_special_tokens=spans is None)
            found[index] = _text(encoding, limit) if spans is None else _chat(encoding, spans, limit)
        return [found[index] for index in range(len(examples))]

    def counting_tokens(
        self,
        ids: NDArray[Any],
        inside: NDArray[np.bool_],
        marks: NDArray[Any] | None,
        problem: Callable[[int, str], None],
    ) -> NDArray[np.bool_]:
        """Return which tokens count: those of the array ``labels`` that are not -100, or all but the first."""
        counted = inside.copy() if marks is None else np.zeros_like(inside)
        if marks is not None:
            if marks.shape != ids.shape or marks.dtype.kind not in "iu":
                raise LineError(
                    f"array 'labels' must be integers of the shape of 'input_ids', {list(ids.shape)}, found "
                    f"{marks.dtype} of shape {list(marks.shape)}"
                )
            counted = marks != IGNORED
            for row in np.flatnonzero((counted & (~inside | (marks != ids))).any(axis=1)):
                problem(
                    int(row), f"'labels' must be the tokens of 'input_ids' where they count, and {IGNORED} elsewhere"
                )
        counted[:, 0] = False
        for row in np.flatnonzero(~counted.any(axis=1)):
            problem(int(row), "there is no token that counts and is predicted from one before it")
        return counted

    def label_value(self, label: object) -> Any:
        """Raise :class:`LineError`: texts have no labels."""
        raise LineError("a label, and the task 'causal-lm' has none")

    def weight(self, batch: Mapping[str, NDArray[Any]], examples: int) -> int:
        """Return the number of tokens that count."""
        return int(batch["targets"].size)

    def found(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> Found:
        """Return the loss of one batch."""
        losses = outputs.get(TOKEN_LOSSES)
        return Found(None if losses is None else float(losses.mean(dtype=np.float64)))


def _text(encoding: Encoding, limit: int | None) -> Encoded:
    """Return the tokens of a text, of which the last ones are cut off if there are too many."""
    cut = limit is not None and len(encoding.ids) > limit
    row = row_of(encoding, [True] * (min(limit, end_of_text(encoding)) if cut and limit else len(encoding.ids)))
    return Encoded([row], None, cut, too_long(row, limit, "the text"))


def _chat(encoding: Encoding, spans: Sequence[tuple[int, int]], limit: int | None) -> Encoded:
    """Return the tokens of a chat; those count that begin in one of its spans of characters."""
    counted = [any(start <= at < end for start, end in spans) for at, _ in encoding.offsets]
    row = row_of(encoding, counted)
    return Encoded([row], None, problem=too_long(row, limit, "the assistant's last message"), prompted=True)
