"""Metrics over a dataset."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.arguments import check_integer
from pocketzo.data.order import Data
from pocketzo.errors import TrainingError
from pocketzo.runtime.model import Model
from pocketzo.tasks.metrics import Found
from pocketzo.tasks.registry import task_of


@dataclass(frozen=True)
class Evaluation:
    """An evaluation, and what its metrics were computed from.

    Attributes
    ----------
    values : dict of str to float
        As :func:`evaluate` returns them.
    found : Found
        Loss, predictions and labels of the whole dataset.
    losses, weights : ndarray of float64, shape [batches]
        The mean loss of each batch, and the number of examples or tokens it is taken over.
    """

    values: dict[str, float]
    found: Found
    losses: NDArray[np.float64]
    weights: NDArray[np.float64]

    def resampled(self, rng: np.random.Generator) -> Found:
        """Return a bootstrap sample: of the batches for the loss, of the examples for the rest."""
        loss, predictions, labels = self.found.loss, self.found.predictions, self.found.labels
        if self.losses.size:
            chosen = rng.integers(self.losses.size, size=self.losses.size)
            loss = float(np.average(self.losses[chosen], weights=self.weights[chosen]))
        if predictions is not None and labels is not None:
            chosen = rng.integers(len(labels), size=len(labels))
            predictions, labels = predictions[chosen], labels[chosen]
        return Found(loss, predictions, labels)


def evaluate(
    model: Model, data: Data, *, batch_size: int = 32, metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Evaluate a model.

    Parameters
    ----------
    model : Model
    data : Data
        The examples. All of them are evaluated.
    batch_size : int
        Examples per forward pass.
    metrics : sequence of str, optional
        Names from :data:`pocketzo.tasks.metrics.METRICS`. By default the task's default metric and the loss,
        if graph and data allow them.

    Returns
    -------
    dict
        ``count``, the number of examples, and the value of each metric. ``loss`` is the mean over all labelled examples
        or tokens. Other metrics are computed once over the whole dataset, not per batch. A value is NaN if nothing has
        a label, or if the model returns NaN.

    Raises
    ------
    TrainingError
        The graph has neither loss nor logits, the dataset is empty, or a requested metric needs labels that the data
        lacks.
    ValueError
        A metric is unknown, or the graph lacks the output that it needs.
    """
    return evaluate_in_detail(model, data, batch_size=batch_size, metrics=metrics).values


def evaluate_in_detail(
    model: Model, data: Data, *, batch_size: int = 32, metrics: Sequence[str] | None = None
) -> Evaluation:
    """Do what :func:`evaluate` does, and return also what the metrics were computed from."""
    check_integer("batch_size", batch_size, 1)
    task = task_of(model.bundle)
    chosen = [task.metric(name) for name in (task.shown if metrics is None else metrics)]
    if not chosen:
        raise TrainingError(f"{model.bundle.path}: the graph has neither a loss nor logits to evaluate")
    if not len(data):
        raise TrainingError("there are no examples to evaluate")
    losses: list[float] = []
    weights: list[int] = []
    predictions: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    outputs = task.outputs(chosen)
    for at in range(0, len(data), batch_size):
        indices = np.arange(at, min(at + batch_size, len(data)))
        batch = data.batch(indices)
        if task.label_input is not None and "labels" not in batch and model.bundle.loss in outputs:
            raise TrainingError("the data has no labels, without which there is no loss to evaluate")
        found = task.found(model.run(batch, outputs), batch)
        weight = task.weight(batch, len(indices))
        if found.loss is not None and weight:
            losses.append(found.loss)
            weights.append(weight)
        if found.predictions is not None and found.labels is not None:
            predictions.append(found.predictions)
            labels.append(found.labels)
    whole = Found(
        sum(map(operator.mul, losses, weights)) / sum(weights) if losses else math.nan,
        np.concatenate(predictions) if predictions else None,
        np.concatenate(labels) if labels else None,
    )
    result: dict[str, float] = {"count": len(data)}
    for metric in chosen:
        if metric.of_loss or labels:
            result[metric.name] = metric(whole)
        elif metrics is not None:
            raise TrainingError(f"the data has no labels, which the metric {metric.name!r} needs")
    return Evaluation(result, whole, np.array(losses), np.array(weights, np.float64))
