"""Evaluate heads on a dataset: the backbone runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset
from pocketzo.formats.bundle import Bundle
from pocketzo.tasks.metrics import Found
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.head import Head
from pocketzo.train.head.states import Backbone, Told


def evaluate_heads(
    bundle: Bundle, heads: Sequence[Head], data: Dataset, *, threads: int, told: Told | None = None
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
    """
    backbone = Backbone(bundle, sorted({layer for head in heads for layer in head.layers}), threads)
    scores = [np.empty((len(data), len(head.bias)), np.float32) for head in heads]
    for states in backbone.run(data, told):
        for head, array in zip(heads, scores, strict=True):
            array[states.examples] = head.scores(states, backbone.layers)
    task = task_of(bundle)
    labels = data.label_values
    assert labels is not None, "loaded with labels"
    results = []
    for array in scores:
        found = Found(_loss(task.loss, array, labels), task.predictions(array), task.targets(labels))
        values = {metric.name: float(metric(found)) for metric in map(task.metric, task.shown)}
        results.append({"count": len(data), **values})
    return results


def _loss(kind: str | None, scores: NDArray[np.float32], labels: NDArray[np.generic]) -> float:
    """Return the mean loss, as a bundle's graph computes it."""
    wide = scores.astype(np.float64)
    if kind == "cross-entropy":
        top = wide.max(axis=1, keepdims=True)
        total = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
        return float((total - wide[np.arange(len(wide)), labels.astype(np.int64)]).mean())
    targets = labels.reshape(wide.shape).astype(np.float64)
    if kind == "bce":
        return float((np.logaddexp(0, wide) - wide * targets).mean())
    return float(np.square(wide - targets).mean())
