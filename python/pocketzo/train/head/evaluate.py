"""Evaluate heads on a dataset: the backbone runs once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset
from pocketzo.formats.bundle import Bundle
from pocketzo.tasks.base import Task
from pocketzo.tasks.metrics import Found
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.head import Head
from pocketzo.train.head.states import Backbone, Told

Floats = NDArray[np.float64]


def _cross_entropy(scores: Floats, labels: NDArray[Any]) -> float:
    top = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
    return float((total - scores[np.arange(len(scores)), labels.astype(np.int64)]).mean())


def _bce(scores: Floats, labels: NDArray[Any]) -> float:
    return float((np.logaddexp(0, scores) - scores * labels.reshape(scores.shape)).mean())


def _mse(scores: Floats, labels: NDArray[Any]) -> float:
    return float(np.square(scores - labels.reshape(scores.shape)).mean())


LOSSES: Final[Mapping[str, Callable[[Floats, NDArray[Any]], float]]] = {
    "cross-entropy": _cross_entropy,
    "bce": _bce,
    "mse": _mse,
}
"""Mean losses of scores and labels, as bundles' graphs compute them."""


def evaluate_heads(
    bundle: Bundle,
    heads: Sequence[Head],
    data: Dataset,
    *,
    threads: int,
    told: Told | None = None,
    metrics: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Return the metrics of each head, as :func:`pocketzo.evaluate` gives them.

    Parameters
    ----------
    bundle : Bundle
        With the labels of the heads.
    heads : sequence of Head
    data : Dataset
        With labels.
    threads : int
    told : callable, optional
    metrics : sequence of str
        Names of others than the task's own.
    """
    backbone = Backbone(bundle, sorted({layer for head in heads for layer in head.layers}), threads)
    scores = [np.empty((len(data), len(head.bias)), np.float32) for head in heads]
    for states in backbone.run(data, told):
        for head, array in zip(heads, scores, strict=True):
            array[states.examples] = head.scores(states, backbone.layers)
    labels = data.label_values
    assert labels is not None, "loaded with labels"
    return [results_of(task_of(bundle), array, labels, metrics) for array in scores]


def results_of(
    task: Task, scores: NDArray[np.float32], labels: NDArray[Any], metrics: Sequence[str] = ()
) -> dict[str, float]:
    """Return the metrics of scores, by name: the task's own, and others.

    Parameters
    ----------
    task : Task
        With a loss.
    scores : ndarray of float32, shape [rows, columns]
    labels : ndarray, shape [rows] or [rows, columns]
    metrics : sequence of str
        Names of others.
    """
    assert task.loss is not None, "prepare gives a side head's task a loss"
    loss = LOSSES[task.loss](scores.astype(np.float64), labels)
    found = Found(loss, task.predictions(scores), task.targets(labels))
    names = dict.fromkeys([*task.shown, *metrics])
    return {"count": len(labels), **{metric.name: float(metric(found)) for metric in map(task.metric, names)}}
