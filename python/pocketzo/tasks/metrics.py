"""The metrics. To add one, add an entry to :data:`METRICS`; nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Source: TypeAlias = Literal["loss", "predictions"]


@dataclass(frozen=True)
class Found:
    """The results of a model for some examples. A field is None if it was not requested or is not available.

    Attributes
    ----------
    loss : float or None
        The mean over labelled examples or tokens.
    predictions, labels : ndarray of integers, shape [n], or None
        One class for each labelled example or token. A prediction is -1 if its scores contain NaN.
    """

    loss: float | None = None
    predictions: NDArray[np.integer[Any]] | None = None
    labels: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class Metric:
    """A measure of model quality.

    Attributes
    ----------
    name : str
        The name for ``--metric`` and in results.
    of : {"loss", "predictions"}
        The input of `function`.
    function : callable
        ``function(loss) -> float``, or ``function(predictions, labels) -> float``. Predictions and labels are integer
        vectors of equal length, at least 1, without negative values.
    higher_is_better : bool
    text : callable
        ``text(value) -> str`` formats a finite value for display.
    """

    name: str
    of: Source
    function: Callable[..., float]
    higher_is_better: bool
    text: Callable[[float], str]

    def __call__(self, found: Found) -> float:
        """Return the value; NaN if nothing has a label, or if a score or the loss is NaN.

        Raises
        ------
        ValueError
            `found` lacks the input of the metric, or predictions and labels are not vectors of one length.
        """
        if self.of == "loss":
            if found.loss is None:
                raise ValueError(f"metric {self.name!r} needs a loss")
            return float(self.function(found.loss))
        if found.predictions is None or found.labels is None:
            raise ValueError(f"metric {self.name!r} needs predictions and labels")
        if found.predictions.shape != found.labels.shape or found.labels.ndim != 1:
            raise ValueError(
                f"predictions and labels must be vectors of one length, got shapes {list(found.predictions.shape)} and "
                f"{list(found.labels.shape)}"
            )
        if not found.labels.size or found.predictions.min() < 0:
            return math.nan
        return float(self.function(found.predictions, found.labels))

    def cost(self, value: float) -> float:
        """Return the quantity to minimise: the value, or 1 - value if higher is better."""
        return 1.0 - value if self.higher_is_better else value

    @property
    def cost_name(self) -> str:
        """The name of the quantity that :meth:`cost` returns."""
        return f"1 - {self.name}" if self.higher_is_better else self.name

    def score(self, evaluation: Mapping[str, float | None]) -> float:
        """Return a number that is larger for a better evaluation; -inf if the value is missing or not finite."""
        value = evaluation.get(self.name)
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.higher_is_better else -value

    def format(self, value: float | None) -> str:
        """Return a value as text; "-" for None."""
        if value is None:
            return "-"
        return self.text(value) if math.isfinite(value) else str(value)


def _accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(np.mean(predictions == labels))


def _counts(predictions: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return three counts for each class that occurs: correct predictions, predictions, labels."""
    classes, index = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    predicted, true = index[: predictions.size], index[predictions.size :]
    right = np.bincount(true[predicted == true], minlength=classes.size)
    return right, np.bincount(predicted, minlength=classes.size), np.bincount(true, minlength=classes.size)


def _f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return macro-F1: the mean F1 over the classes that occur in predictions or labels."""
    right, predicted, true = _counts(predictions, labels)
    return float(np.mean(2 * right / (predicted + true)))


def _matthews(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the multiclass Matthews correlation coefficient; 0 if all predictions or all labels are one class."""
    right, predicted, true = (counts.astype(np.float64) for counts in _counts(predictions, labels))
    n = float(labels.size)
    of_predictions, of_labels = n * n - predicted @ predicted, n * n - true @ true
    if of_predictions == 0 or of_labels == 0:
        return 0.0
    return float((right.sum() * n - predicted @ true) / np.sqrt(of_predictions) / np.sqrt(of_labels))


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "predictions", _accuracy, higher_is_better=True, text=_percent),
        Metric("f1", "predictions", _f1, higher_is_better=True, text="{:.4f}".format),
        Metric("matthews", "predictions", _matthews, higher_is_better=True, text="{:.4f}".format),
        Metric("loss", "loss", float, higher_is_better=False, text="{:.4f}".format),
        Metric("perplexity", "loss", _perplexity, higher_is_better=False, text="{:.4g}".format),
    )
}


def metric_named(name: str) -> Metric:
    """Return a metric by name; raise a :class:`ValueError` that lists all names if it is unknown."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]
