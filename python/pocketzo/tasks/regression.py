"""Regression: each example has a number, or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pocketzo.data.columns import LineError
from pocketzo.tasks.base import is_column
from pocketzo.tasks.text import TEXT, TEXT_PAIR, TextTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec
    from pocketzo.tasks.metrics import Source


class Regression(TextTask):
    """A text, or a pair of texts, and its number: ``{"text": "...", "label": 3.5}``.

    A model with several output columns takes as many numbers, in a list, or in one string, separated by commas or white
    space.
    """

    name: ClassVar[str] = "regression"
    losses: ClassVar[tuple[str, ...]] = ("mse",)
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT,
        "text_pair": TEXT_PAIR,
        "label": ("label", "labels", "score", "target"),
    }
    predicts: ClassVar[Source] = "numbers"
    label_dtype: ClassVar[str] = "float32"
    default_metric: ClassVar[str] = "r2"

    @classmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return whether a graph with this label input and these scores suits this task."""
        rank = 0 if scores is None else 1 if is_column(scores) else len(scores.shape)
        if labels is not None and not (labels.dtype.startswith("float") and rank in (0, len(labels.shape))):
            return False
        return rank in (1, 2) or (scores is None and labels is not None)

    @property
    def _columns(self) -> int | None:
        """The number of values of a label; None if the graph does not fix it."""
        if self._scores is None or is_column(self._scores):
            return 1
        count = self._scores.shape[1]
        return count if isinstance(count, int) else None

    def label_value(self, label: object) -> float | list[float]:
        """Return the number, or numbers, of a label; raise :class:`LineError` for anything else."""
        if self._columns == 1:
            return _number(label)
        if self._columns is None:
            raise LineError("the model does not fix how many numbers a label has: use .npz")
        numbers = label.replace(",", " ").split() if isinstance(label, str) else label
        if not isinstance(numbers, list) or len(numbers) != self._columns:
            found = len(numbers) if isinstance(numbers, list) else type(label).__name__
            raise LineError(f"the label must be {self._columns} numbers, found {found}")
        return [_number(number) for number in numbers]

    def label_row(self, values: object) -> float | list[float]:
        """Return the number, or numbers, of a row of an array; raise :class:`LineError` for anything else."""
        numbers = values if isinstance(values, list) else [values]
        if self._columns not in (None, len(numbers)):
            raise LineError(f"the label must have {self._columns} columns, found {len(numbers)}")
        row = [_number(number) for number in numbers]
        return row[0] if self._columns == 1 else row

    def counted(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Return True for each example: any number is a label."""
        return np.ones(len(labels), np.bool_)

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the predicted numbers: shape [n] for one column, else [n, columns]."""
        return (scores.reshape(len(scores)) if self._columns == 1 else scores).astype(np.float64)


def _number(label: object) -> float:
    """Return a label as a number; raise :class:`LineError` if it is none, or none that float32 holds."""
    if isinstance(label, bool) or not isinstance(label, (str, int, float)):
        raise LineError(f"the label must be a number, found {type(label).__name__}")
    try:
        number = math.nan if isinstance(label, str) and "_" in label else float(label)
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise LineError(f"the label must be a number, found {str(label)[:80]!r}")
    return number
