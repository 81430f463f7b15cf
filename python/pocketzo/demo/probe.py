"""A linear probe: the baseline that fine-tuning of an encoder has to beat."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pocketzo.errors import MissingExtraError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]

_STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01)


def require_scikit_learn() -> None:
    """Raise MissingExtraError if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("scikit-learn", "demo")


def linear_probe(
    features: Floats, labels: Labels, test_features: Floats, test_labels: Labels, *, l2: float | None = None
) -> float:
    """Return the test accuracy of multinomial logistic regression on frozen features.

    Features are standardised by the training rows' mean and standard deviation. scikit-learn minimises the mean
    cross-entropy plus ``l2 / 2 * sum(weight ** 2)``, with one weight vector per class and the intercepts not penalised,
    in float64 by Newton's method from zero. The result depends on no random number.

    Parameters
    ----------
    features, test_features : ndarray of float, shape (rows, columns)
    labels, test_labels : ndarray of int, shape (rows,)
        Classes, at least two.
    l2 : float, optional
        Strength of the penalty, positive. By default the one of five between 0.01 and 1 that has the lowest
        cross-entropy in 5-fold cross-validation on the training rows: an overfitted probe would be too weak a baseline.

    Returns
    -------
    float
        Fraction of test rows classified correctly, 0 to 1.

    Raises
    ------
    ValueError
        If the shapes disagree, there are no test rows, fewer than 5 training rows or fewer than 2 classes, or `l2` is
        not given and a class has fewer than 5 training rows.
    MissingExtraError
        If scikit-learn is not installed.
    """
    require_scikit_learn()
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    if (
        features.ndim != 2
        or test_features.shape != (len(test_labels), features.shape[1])
        or labels.shape != (len(features),)
    ):
        raise ValueError(
            "expected features (rows, columns) and labels (rows,), got "
            f"{features.shape} and {labels.shape}, for testing {test_features.shape} and {test_labels.shape}"
        )
    if len(labels) < 5 or len(test_labels) == 0:
        raise ValueError(f"expected at least 5 training rows and 1 test row, got {len(labels)} and {len(test_labels)}")
    rows = np.unique(labels, return_counts=True)[1]
    if len(rows) < 2:
        raise ValueError(f"expected at least 2 classes, got {len(rows)}")
    if l2 is None and rows.min() < 5:
        raise ValueError(f"expected at least 5 training rows of each class to choose l2 by, got {rows.min()} of one")
    scaler = StandardScaler().fit(features.astype(np.float64))
    x, test_x = (scaler.transform(array.astype(np.float64)) for array in (features, test_features))
    if l2 is None:
        l2 = min(_STRENGTHS, key=lambda strength: _held_out_loss(x, labels, strength))
    return float(_fit(x, labels, l2).score(test_x, test_labels))


def _held_out_loss(x: Floats, labels: Labels, l2: float) -> float:
    """Return the summed cross-entropy of each fifth of the rows under a model of the other four."""
    from sklearn.metrics import log_loss  # type: ignore[import-untyped]
    from sklearn.model_selection import StratifiedKFold  # type: ignore[import-untyped]

    return sum(
        float(log_loss(labels[held_out], _fit(x[rest], labels[rest], l2).predict_proba(x[held_out]), normalize=False))
        for rest, held_out in StratifiedKFold(5).split(x, labels)
    )


def _fit(x: Floats, labels: Labels, l2: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    # For two classes scikit-learn has one vector, the difference of the two, and penalises it twice as much as them.
    strength = l2 / 2 if len(np.unique(labels)) == 2 else l2
    return LogisticRegression(C=1 / (strength * len(x)), solver="newton-cg", tol=1e-6, max_iter=1000).fit(x, labels)
