"""Classification: each example has one class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pocketzo.tasks.base import is_column
from pocketzo.tasks.text import TEXT, TEXT_PAIR, ClassesTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec
    from pocketzo.tasks.metrics import Source


class Classification(ClassesTask):
    """A text, or a pair of texts, and its class.

    A label is a class name of the bundle, or a class number from 0. If a class name looks like a number, labels must be
    names. If the bundle has neither names nor a number of classes, any number from 0 is a class.

    Scores are [batch, classes]; or, for two classes, one score for the second class, [batch] or [batch, 1].
    """

    name: ClassVar[str] = "classification"
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy", "bce")
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": TEXT,
        "text_pair": TEXT_PAIR,
        "label": ("label", "labels"),
    }
    predicts: ClassVar[Source] = "classes"
    default_metric: ClassVar[str] = "accuracy"

    @classmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return whether a graph with this label input and these scores suits this task."""
        if labels is not None and not (len(labels.shape) == 1 and labels.dtype.startswith(("int", "uint"))):
            return False
        if scores is None:
            return labels is not None
        return is_column(scores) if threshold is not None else len(scores.shape) == 2 and not is_column(scores)

    @property
    def class_count(self) -> int | None:
        """The number of classes; None if the graph does not fix it."""
        return 2 if self.threshold is not None else super().class_count

    def label_value(self, label: object) -> int:
        """Return the class number of a label; raise :class:`LineError` for an unknown label."""
        return self._classes.number(label)

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return the class with the highest score, or -1 where that is not finite, or a score is NaN.

        An infinite score is no answer: it is what ruined weights give, and the first class would always win.

        Parameters
        ----------
        scores : ndarray of floats, shape [n, classes]; or [n] or [n, 1] for two classes

        Returns
        -------
        ndarray of int64, shape [n]
        """
        if self.threshold is None:
            return np.where(np.isfinite(scores.max(-1)), scores.argmax(-1), -1)
        score = scores.reshape(len(scores))
        return np.where(np.isfinite(score), score > self.threshold, -1)
