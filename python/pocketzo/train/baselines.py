"""What a run has to beat: the answer that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pocketzo.data.order import Data


@dataclass(frozen=True)
class Majority:
    """The most frequent class of the training data as the answer to every example.

    Attributes
    ----------
    label : int
        Its number.
    accuracy : float
        On the evaluation data.
    """

    label: int
    accuracy: float

    @classmethod
    def of(cls, train: Data, evaluated: Data | None) -> Majority | None:
        """Return it; None if the examples have no classes, or there is no evaluation data."""
        known, asked = (getattr(data, "label_ids", None) for data in (train, evaluated))
        if known is None or asked is None or not len(known) or not len(asked):
            return None
        label = int(np.bincount(known).argmax())
        return cls(label, float(np.mean(asked == label)))

    def text(self, labels: tuple[str, ...] | None, values: Mapping[str, float | None]) -> str:
        """Return it as a line for people, beside the values of a run's last evaluation."""
        name = repr(labels[self.label]) if labels else f"class {self.label}"
        line = f"always {name}, the most frequent class of the training data: accuracy {100 * self.accuracy:.1f} %"
        reached = values.get("accuracy")
        if reached is not None and reached <= self.accuracy:
            line += f"; the run, with {100 * reached:.1f} %, is no better than that"
        return line
