"""Choice: the continuation of a context that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from pocketzo.data.columns import LineError
from pocketzo.data.examples import Encoded, Example, not_text, text_of
from pocketzo.tasks.causal_lm import TOKEN_LOSSES, LanguageTask
from pocketzo.tasks.completion import completed, too_long
from pocketzo.tasks.metrics import Found

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.data.columns import Columns
    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.metrics import Source


class Choice(LanguageTask):
    """``{"context": "The sky is", "choices": [" blue", " a fish"], "label": 0}``: a context, and how it may continue.

    Each choice is a row of the batch. Its score is its log-likelihood after the context; the loss is the cross-entropy
    of the scores of an example's choices. A label is the number of the right choice, from 0, or its text.

    Parameters
    ----------
    bundle : Bundle
        The model.
    per : {"sum", "token"}
        Whether a score is the sum over the tokens of the choice, or their mean.
    loss
        See :class:`Task`.
    """

    name: ClassVar[str] = "choice"
    settings: ClassVar[tuple[str, ...]] = ("loss", "per")
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("context",),
        "text_pair": ("choices",),
        "label": ("label",),
    }
    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {}
    labels_per: ClassVar[Literal["example", "token", "nothing"]] = "example"
    predicts: ClassVar[Source] = "classes"
    default_metric: ClassVar[str] = "accuracy"
    several_rows: ClassVar[bool] = True
    untrained: ClassVar[str | None] = "zero-shot"

    def __init__(self, bundle: Bundle, *, per: str = "sum", loss: str | None = None) -> None:
        super().__init__(bundle, loss=loss)
        if per not in ("sum", "token"):
            raise ValueError(f"'per' must be 'sum' or 'token', got {per!r}")
        self.per = per

    @property
    def gives(self) -> Mapping[bool, bool]:
        """Both kinds of metrics: predictions follow from the losses of the tokens."""
        return {True: True, False: True}

    @property
    def needs_labels(self) -> bool:
        """Whether there is no loss without labels."""
        return True

    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Read a context, its choices and the label from a record."""
        context, choices, label = (self.find(record, columns, role) for role in ("text", "text_pair", "label"))
        for role, name in (("text", context), ("text_pair", choices)):
            if name is None:
                raise LineError(self.missing(record, columns, role))
        assert context is not None
        assert choices is not None
        given = record[choices]
        if not isinstance(given, list) or len(given) < 2:
            raise LineError(f"{choices!r} must be a list of two texts or more, found {_kind(given)}")
        for choice in given:
            if not isinstance(choice, str):
                raise LineError(f"{choices!r} must hold strings, found {type(choice).__name__}")
            if reason := not_text(choices, choice):
                raise LineError(reason)
        number = None
        if label is not None:
            value = record[label]
            number = given.index(value) if isinstance(value, str) and value in given else self.label_value(value)
            if number >= len(given):
                raise LineError(f"the label is {number}, and there are {len(given)} choices, from 0")
        return Example(text_of(record, context), given, number)

    def label_value(self, label: object) -> int:
        """Return the number of the right choice; raise :class:`LineError` unless it is an integer from 0."""
        if type(label) is not int or label < 0:
            raise LineError(f"the label must be the number of a choice, from 0, or its text, found {label!r}")
        return label

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return a row for each choice of each example."""
        pairs = [(str(one.text), choice) for one in examples for choice in one.pair or ()]
        rows = iter(completed(tokenizer, [one for one, _ in pairs], [choice for _, choice in pairs], None))
        encoded = []
        for one in examples:
            own = [next(rows) for _ in one.pair or ()]
            problems = (too_long(row, limit, f"choice {number}") for number, row in enumerate(own))
            encoded.append(Encoded(own, one.label, problem=next((reason for reason in problems if reason), None)))
        return encoded

    def found(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> Found:
        """Return loss, predictions and labels of one batch."""
        losses, labels = outputs.get(TOKEN_LOSSES), batch.get("labels")
        if losses is None or labels is None:
            return Found()
        scores = self.scores(losses, batch)
        largest = scores.max(axis=1)
        with np.errstate(invalid="ignore"):  # a loss that is not finite makes those of the batch so
            shifted = scores - largest[:, None]
        cross = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        predictions = np.where(np.isfinite(largest), scores.argmax(axis=1), -1)
        return Found(float(cross.mean()), predictions, labels)

    def scores(self, losses: NDArray[Any], batch: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Return the score of each choice.

        Parameters
        ----------
        losses : ndarray, shape [n]
            The output ``token_losses``.
        batch : mapping of str to ndarray
            With ``positions`` [n], ``input_ids`` [rows, sequence] and ``row_examples`` [rows], the example of each row.

        Returns
        -------
        ndarray of float64, shape [examples, most choices]
            -inf for the choices that an example does not have.
        """
        rows, width = batch["input_ids"].shape
        of_row = batch["positions"] // width
        sums = np.bincount(of_row, losses.astype(np.float64), rows)
        divisors = np.bincount(of_row, minlength=rows) if self.per == "token" else np.ones(rows)
        example = batch["row_examples"]
        first = np.searchsorted(example, example)  # rows of an example follow each other
        number = np.arange(rows) - first
        scores = np.full((int(example[-1]) + 1, int(number.max()) + 1), -np.inf)
        scores[example, number] = -sums / divisors
        return scores

    def weight(self, batch: Mapping[str, NDArray[Any]], examples: int) -> int:
        """Return the number of examples."""
        return examples


def _kind(value: object) -> str:
    return f"{len(value)}" if isinstance(value, list) else type(value).__name__
