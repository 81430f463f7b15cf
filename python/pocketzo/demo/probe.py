"""A linear probe: the baseline for fine-tuning an encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]


def linear_probe(
    features: Floats, labels: Labels, test_features: Floats, test_labels: Labels, *, l2: float | None = None
) -> float:
    """Return the test accuracy of multinomial logistic regression on frozen features.

    Features are standardised by the training rows' mean and standard deviation. The objective is the mean cross-entropy
    plus ``l2 / 2 * sum(weight ** 2)``, without a penalty on the intercept. Newton's method minimises it in float64 from
    zero, so the result is deterministic.

    Parameters
    ----------
    features, test_features : ndarray of float, shape (rows, columns)
    labels, test_labels : ndarray of int, shape (rows,)
        Classes, counted from 0.
    l2 : float, optional
        Strength of the penalty, positive. By default the one of five values between 0.01 and 1 with the lowest 5-fold
        cross-entropy on the training rows: a probe that overfits would be too weak a baseline.

    Returns
    -------
    float
        Share of test rows classified correctly, 0 to 1.

    Raises
    ------
    ValueError
        If the shapes disagree, or there are no test rows or fewer than 5 training rows.
    """
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
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    deviation[deviation == 0] = 1
    x, test_x = (np.column_stack([(rows - mean) / deviation, np.ones(len(rows))]) for rows in (features, test_features))
    y = np.eye(int(labels.max()) + 1)[labels]
    if l2 is None:
        fold = np.empty(len(labels), np.int64)
        fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 5  # stratified by class

        def held_out_loss(l2: float) -> float:
            weights = [_fit(x[fold != k], y[fold != k], l2) for k in range(5)]
            return sum(float(-(y[fold == k] * _log_softmax(x[fold == k] @ weights[k])).sum()) for k in range(5))

        l2 = min((1.0, 0.3, 0.1, 0.03, 0.01), key=held_out_loss)
    return float(np.mean(np.argmax(test_x @ _fit(x, y, l2), axis=1) == test_labels))


def _log_softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scores = scores - scores.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return result


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], l2: float) -> npt.NDArray[np.float64]:
    """Return weights [columns, classes] of logistic regression; `x` ends in a column of ones, `y` is one-hot.

    Conjugate gradients compute the Newton direction, so no Hessian is stored.
    """
    rows = len(x)
    decay = np.full((x.shape[1], 1), l2)
    decay[-1] = 0

    def objective(weights: npt.NDArray[np.float64], log_p: npt.NDArray[np.float64]) -> float:
        return float(-(y * log_p).sum() / rows + (decay * weights**2).sum() / 2)

    weights = np.zeros((x.shape[1], y.shape[1]))
    log_p = _log_softmax(x @ weights)
    for _ in range(100):
        p = np.exp(log_p)
        gradient = x.T @ (p - y) / rows + decay * weights
        if np.abs(gradient).max() < 1e-5:
            break
        direction = np.zeros_like(weights)
        residual = -gradient
        search = residual
        square = float((residual**2).sum())
        enough = (
            min(0.25, np.sqrt(square)) * square
        )  # the tolerance shrinks with the gradient: convergence is superlinear
        for _ in range(weights.size):
            moved = x @ search
            curved = x.T @ (p * (moved - (p * moved).sum(axis=1, keepdims=True))) / rows + decay * search
            length = square / float((search * curved).sum())
            direction += length * search
            residual = residual - length * curved
            previous, square = square, float((residual**2).sum())
            if square <= enough:
                break
            search = residual + square / previous * search
        before, slope, scale = objective(weights, log_p), float((gradient * direction).sum()), 1.0
        log_p = _log_softmax(x @ (weights + direction))
        while scale > 1e-6 and objective(weights + scale * direction, log_p) > before + 1e-4 * scale * slope:
            scale /= 2
            log_p = _log_softmax(x @ (weights + scale * direction))
        weights = weights + scale * direction
    return weights
