"""The metrics. A new one is one entry of :data:`METRICS`, and nothing else."""

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
    """What a model gave for some examples; each is None if it was not asked for or is not there.

    Attributes
    ----------
    loss : float or None
        The mean over what counts, examples or tokens.
    predictions, labels : ndarray of integers, shape [n], or None
        The class of whatever has a label, an example or a token; -1 for a prediction from scores that are NaN.
    """

    loss: float | None = None
    predictions: NDArray[np.integer[Any]] | None = None
    labels: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes
    ----------
    name : str
        As in ``--metric`` and in results.
    of : {"loss", "predictions"}
        What it is a function of.
    function : callable
        ``function(loss) -> float``, or ``function(predictions, labels) -> float`` of two integer vectors of equal
        length, at least 1, with no negative number in them.
    higher_is_better : bool
    text : callable
        ``text(value) -> str``, for people.
    """

    name: str
    of: Source
    function: Callable[..., float]
    higher_is_better: bool
    text: Callable[[float], str]

    def __call__(self, found: Found) -> float:
        """Return the value; NaN where nothing has a label, or a score or the loss is NaN.

        Raises
        ------
        ValueError
            What the metric is a function of was not found.
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
        """Return a number that is smaller the better a value is: the value, or 1 - value if higher is better."""
        return 1.0 - value if self.higher_is_better else value

    @property
    def cost_name(self) -> str:
        """What :meth:`cost` is called."""
        return f"1 - {self.name}" if self.higher_is_better else self.name

    def score(self, evaluation: Mapping[str, float | None]) -> float:
        """Return a number that is larger the better an evaluation is; -inf without a finite value."""
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
    """Return, by class that occurs, how often it is right, predicted and the label."""
    classes, index = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    predicted, true = index[: predictions.size], index[predictions.size :]
    right = np.bincount(true[predicted == true], minlength=classes.size)
    return right, np.bincount(predicted, minlength=classes.size), np.bincount(true, minlength=classes.size)


def _f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Macro-F1: the mean of each class's F1, over the classes that occur among predictions or labels."""
    right, predicted, true = _counts(predictions, labels)
    return float(np.mean(2 * right / (predicted + true)))


def _matthews(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Matthews' correlation, for any number of classes; 0 where all predictions or all labels are one class."""
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
    """Return a metric by its name; a :class:`ValueError` that names all if there is none of that name."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]
