"""What a head is to predict, as columns of numbers, and the way back to the scores of a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import DataError
from pocketzo.tasks.base import Task
from pocketzo.train.head.losses import LOSSES, Floats, Loss


@dataclass(frozen=True)
class Targets:
    """The labels of the training data.

    Attributes
    ----------
    values : ndarray of float64, shape [rows, columns]
        Of two classes one column, 1 for the second; of more, one a class; numbers are standardised.
    loss : type
    penalty : float
        By what a penalty is multiplied. Two columns of weights, w / 2 and -w / 2, have half the squares of w.
    classes : ndarray of int64, shape [rows], or None
        The class of each row.
    scale, shift : float
        Of numbers: a score times `scale` plus `shift` is the prediction.
    """

    values: Floats
    loss: Loss
    penalty: float = 1.0
    classes: NDArray[np.int64] | None = None
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def of(cls, labels: NDArray[Any], task: Task) -> Self:
        """Return the targets for the labels of a dataset.

        Raises
        ------
        DataError
            All are the same number.
        """
        if task.loss == "cross-entropy":
            count = task.class_count or int(labels.max()) + 1
            one_hot = np.eye(count)[labels]
            if count == 2:
                return cls(one_hot[:, 1:], LOSSES["bce"], 0.5, labels)
            return cls(one_hot, LOSSES["cross-entropy"], classes=labels)
        values = labels.reshape(len(labels), -1).astype(np.float64)
        if task.loss == "bce":
            return cls(values, LOSSES["bce"])
        scale = float(values.std())
        if scale == 0:
            raise DataError(f"all {len(values)} labels are {values[0, 0]:g}: there is nothing to learn")
        shift = float(values.mean())
        return cls((values - shift) / scale, LOSSES["mse"], scale=scale, shift=shift)

    @property
    def columns(self) -> int:
        """Scores of an example in the bundle."""
        return 2 if self.penalty != 1 else self.values.shape[1]

    def scores(self, scores: Floats) -> NDArray[np.float32]:
        """Return the bundle's scores [rows, columns] for those of a head."""
        return self.bias(scores)

    def weight(self, weight: Floats) -> NDArray[np.float32]:
        """Return weights [size, columns] of the bundle's scores."""
        return self._spread(weight * self.scale)

    def bias(self, bias: Floats) -> NDArray[np.float32]:
        """Return the bias [columns] of the bundle's scores."""
        return self._spread(bias * self.scale + self.shift)

    def _spread(self, values: Floats) -> NDArray[np.float32]:
        both = np.concatenate([-values / 2, values / 2], axis=-1) if self.penalty != 1 else values
        return np.ascontiguousarray(both, np.float32)
