"""The metrics. To add one, add an entry to :data:`METRICS`; nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Source: TypeAlias = Literal["loss", "cross-entropy", "classes", "label sets", "numbers", "texts"]

_SHAPES: Final[Mapping[str, tuple[str, tuple[int, ...]]]] = {
    "classes": ("vectors", (1,)),
    "label sets": ("matrices", (2,)),
    "numbers": ("vectors or matrices", (1, 2)),
}


@dataclass(frozen=True)
class Found:
    """The results of a model for some examples. A field is None if it was not requested or is not available.

    Attributes
    ----------
    loss : float or None
        The mean over labelled examples or tokens.
    predictions, labels : ndarray or None
        For each labelled example or token, one class, an integer, shape [n]; a label set, 0 or 1 for each label, shape
        [n, labels]; or one number, shape [n], or several, [n, columns]. A class or a 0 or 1 is -1 if it is predicted
        from NaN or infinity.
    """

    loss: float | None = None
    predictions: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None


@dataclass(frozen=True)
class Metric:
    """A measure of model quality.

    Attributes
    ----------
    name : str
        The name for ``--metric`` and in results.
    of : {"loss", "cross-entropy", "classes", "label sets", "numbers"}
        The input of `function`; ``"cross-entropy"`` is the loss, if it is that of one class among several.
    function : callable
        ``function(loss) -> float``, or ``function(predictions, labels) -> float``. Predictions and labels are arrays of
        one shape, as in :class:`Found`, of one example or more, without -1 or NaN.
    higher_is_better : bool
    text : callable
        ``text(value) -> str`` formats a finite value for display.
    """

    name: str
    of: Source
    function: Callable[..., float]
    higher_is_better: bool
    text: Callable[[float], str]

    @property
    def of_loss(self) -> bool:
        """Whether the metric is a function of the loss, not of predictions and labels."""
        return self.of in ("loss", "cross-entropy")

    def __call__(self, found: Found) -> float:
        """Return the value; NaN if nothing has a label, a score or the loss is NaN, or a predicted number is infinite.

        Raises
        ------
        ValueError
            `found` lacks the input of the metric, or predictions and labels are not of one shape.
        """
        if self.of_loss:
            if found.loss is None:
                raise ValueError(f"metric {self.name!r} needs a loss")
            return float(self.function(found.loss))
        if found.predictions is None or found.labels is None:
            raise ValueError(f"metric {self.name!r} needs predictions and labels")
        expected, ranks = _SHAPES[self.of]
        if found.predictions.shape != found.labels.shape or found.labels.ndim not in ranks:
            raise ValueError(
                f"predictions and labels must be {expected} of one shape, got {list(found.predictions.shape)} and "
                f"{list(found.labels.shape)}"
            )
        wrong = ~np.isfinite(found.predictions) if self.of == "numbers" else found.predictions < 0
        if not found.labels.size or wrong.any():
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


def _subset_accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of examples whose labels are all right."""
    return float(np.mean((predictions == labels).all(axis=1)))


def _micro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the F1 of all labels of all examples together; 0 if none is predicted or right."""
    return float(2 * (predictions * labels).sum() / max(1, predictions.sum() + labels.sum()))


def _macro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean F1 over the labels; 0 for one that is neither predicted nor right."""
    given = predictions.sum(axis=0) + labels.sum(axis=0)
    return float(np.mean(2 * (predictions * labels).sum(axis=0) / np.maximum(1, given)))


def _mse(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(np.mean((predictions - labels) ** 2))


def _mae(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(np.mean(np.abs(predictions - labels)))


def _r2(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the coefficient of determination, the mean over columns; NaN for fewer than 2 examples.

    A column whose labels are all equal has 1 if it is predicted exactly, else 0.
    """
    if len(labels) < 2:
        return math.nan
    labels = labels.astype(np.float64)
    error = ((predictions - labels) ** 2).sum(axis=0)
    spread = ((labels - labels.mean(axis=0)) ** 2).sum(axis=0)
    equal = _all_equal(labels)
    return float(np.mean(np.where(equal, error == 0, 1 - error / np.where(equal, 1, spread))))


def _pearson(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return Pearson's correlation, the mean over columns; 0 for a column of equal predictions or equal labels."""
    x, y = (values - values.mean(axis=0) for values in (predictions, labels.astype(np.float64)))
    size = np.sqrt((x * x).sum(axis=0)) * np.sqrt((y * y).sum(axis=0))
    equal = _all_equal(predictions) | _all_equal(labels)
    return float(np.mean(np.where(equal, 0, (x * y).sum(axis=0) / np.where(equal, 1, size))))


def _all_equal(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for each column whether its values are equal: their distance to the mean may be a rounding, not 0."""
    return np.asarray((values == values[:1]).all(axis=0))


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classes", _accuracy, higher_is_better=True, text=_percent),
        Metric("f1", "classes", _f1, higher_is_better=True, text="{:.4f}".format),
        Metric("matthews", "classes", _matthews, higher_is_better=True, text="{:.4f}".format),
        Metric("subset-accuracy", "label sets", _subset_accuracy, higher_is_better=True, text=_percent),
        Metric("micro-f1", "label sets", _micro_f1, higher_is_better=True, text="{:.4f}".format),
        Metric("macro-f1", "label sets", _macro_f1, higher_is_better=True, text="{:.4f}".format),
        Metric("r2", "numbers", _r2, higher_is_better=True, text="{:.4f}".format),
        Metric("pearson", "numbers", _pearson, higher_is_better=True, text="{:.4f}".format),
        Metric("mse", "numbers", _mse, higher_is_better=False, text="{:.4g}".format),
        Metric("mae", "numbers", _mae, higher_is_better=False, text="{:.4g}".format),
        Metric("loss", "loss", float, higher_is_better=False, text="{:.4f}".format),
        Metric("perplexity", "cross-entropy", _perplexity, higher_is_better=False, text="{:.4g}".format),
    )
}


def metric_named(name: str) -> Metric:
    """Return a metric by name; raise a :class:`ValueError` that lists all names if it is unknown."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]
