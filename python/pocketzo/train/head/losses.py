"""The losses of a head, of many problems at once, with gradient and curvature by their scores.

Two classes have one column of scores, the log-odds of the second. The others have a column for each class, label or
number.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class Value(NamedTuple):
    """A loss at some scores.

    Attributes
    ----------
    loss : ndarray, shape [rows, problems]
    gradient : ndarray, shape [rows, problems, columns]
    mean : ndarray, shape [rows, problems, columns]
        What the scores predict: probabilities, or numbers.
    """

    loss: Floats
    gradient: Floats
    mean: Floats


class Softmax:
    """Cross-entropy over classes, of which each row has one."""

    @staticmethod
    def at(scores: Floats, targets: Floats) -> Value:
        """Return the loss at scores [rows, problems, columns], for targets [rows, 1, columns]."""
        shifted = scores - scores.max(axis=-1, keepdims=True)
        exp = np.exp(shifted)
        total = exp.sum(axis=-1, keepdims=True)
        mean = exp / total
        return Value(np.log(total[..., 0]) - (shifted * targets).sum(axis=-1), mean - targets, mean)

    @staticmethod
    def curved(mean: Floats, change: Floats) -> Floats:
        """Return the change of the gradient with a change of the scores."""
        product = mean * change
        result: Floats = product - mean * product.sum(axis=-1, keepdims=True)
        return result

    @staticmethod
    def curvature(mean: Floats) -> Floats:
        """Return the diagonal of the second derivative."""
        return mean * (1 - mean)


class Sigmoid:
    """Cross-entropy of yes or no for each column, summed over columns."""

    @staticmethod
    def at(scores: Floats, targets: Floats) -> Value:
        """Return the loss at scores [rows, problems, columns], for targets [rows, 1, columns]."""
        loss = np.logaddexp(0, scores) - scores * targets
        mean = 0.5 * (1 + np.tanh(0.5 * scores))
        return Value(loss.sum(axis=-1), mean - targets, mean)

    @staticmethod
    def curved(mean: Floats, change: Floats) -> Floats:
        """Return the change of the gradient with a change of the scores."""
        return mean * (1 - mean) * change

    curvature = staticmethod(Softmax.curvature)


class Squares:
    """Half of the squared error, summed over columns."""

    @staticmethod
    def at(scores: Floats, targets: Floats) -> Value:
        """Return the loss at scores [rows, problems, columns], for targets [rows, 1, columns]."""
        error = scores - targets
        return Value(0.5 * (error * error).sum(axis=-1), error, scores)

    @staticmethod
    def curved(mean: Floats, change: Floats) -> Floats:
        """Return the change of the gradient with a change of the scores."""
        return change

    @staticmethod
    def curvature(mean: Floats) -> Floats:
        """Return the diagonal of the second derivative."""
        return np.ones_like(mean)


Loss = type[Softmax] | type[Sigmoid] | type[Squares]
LOSSES: Final[dict[str, Loss]] = {"cross-entropy": Softmax, "bce": Sigmoid, "mse": Squares}
"""By the kind that a bundle's task names."""
