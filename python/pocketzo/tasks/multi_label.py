"""Multi-label classification: each example has any number of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pocketzo.data.columns import LineError
from pocketzo.tasks.base import is_column
from pocketzo.tasks.text import TEXT, TEXT_PAIR, ClassesTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec
    from pocketzo.tasks.metrics import Source


class MultiLabel(ClassesTask):
    """A text, or a pair of texts, and its labels: ``{"text": "...", "labels": ["sport", "politics"]}``.

    Labels are names or numbers as in :class:`Classification`, in a list, or in one string: separated by commas, or, if
    no name contains white space, by white space. An empty list or string means that no label applies. In an ``.npz``
    file, a row holds 0 or 1 for each label.
    """

    name: ClassVar[str] = "multi-label"
    losses: ClassVar[tuple[str, ...]] = ("bce",)
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT,
        "text_pair": TEXT_PAIR,
        "label": ("labels", "label"),
    }
    headerless: ClassVar[Mapping[int, tuple[str, ...]]] = {
        1: ("text",),
        2: ("text", "labels"),
        3: ("text", "text_pair", "labels"),
    }
    predicts: ClassVar[Source] = "label sets"
    label_dtype: ClassVar[str] = "float32"
    default_metric: ClassVar[str] = "micro-f1"

    @classmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return whether a graph with this label input and these scores suits this task."""
        if labels is not None and not (len(labels.shape) == 2 and labels.dtype.startswith("float")):
            return False
        if scores is None:
            return labels is not None
        return threshold is not None and len(scores.shape) == 2 and not is_column(scores)

    def label_value(self, label: object) -> list[int]:
        """Return 0 or 1 for each label of the task; raise :class:`LineError` for an unknown label."""
        if self._classes.count is None:
            raise LineError("the model does not fix the number of labels: prepare it with their names, or use .npz")
        if isinstance(label, str):
            parts = label.split(",") if self._classes.have_spaces else label.replace(",", " ").split()
            label = [part.strip() for part in parts if part.strip()]
        if isinstance(label, int) and not isinstance(label, bool):
            label = [label]
        if not isinstance(label, list):
            raise LineError(f"the labels must be a list or a string, found {type(label).__name__}")
        row = [0] * self._classes.count
        for item in label:
            number = self._classes.number(item)
            if row[number]:
                raise LineError(f"the label {item!r} is given twice")
            row[number] = 1
        return row

    def label_row(self, values: object) -> list[int]:
        """Check a row of 0 and 1 from an array; raise :class:`LineError` for any other."""
        count = self._classes.count
        if not isinstance(values, list) or count not in (None, len(values)):
            found = f"{len(values)} values" if isinstance(values, list) else "one value"
            raise LineError(f"the labels must be 0 or 1 for each of {count or 'n'} labels, found {found}")
        for value in values:
            if value not in (0, 1):
                raise LineError(f"the labels must be 0 or 1, found {value!r}")
        return [int(value) for value in values]

    def counted(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Return True for each example."""
        return np.ones(len(labels), np.bool_)

    def targets(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return 0 or 1 as integers, shape [n, labels]."""
        return (labels > 0.5).astype(np.int64)

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return 1 for each score above the threshold, 0 for others, -1 for NaN; shape [n, labels]."""
        assert self.threshold is not None, "scores suit this task with a threshold only"
        return np.where(np.isfinite(scores), scores > self.threshold, -1)
