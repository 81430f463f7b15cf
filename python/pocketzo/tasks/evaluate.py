"""Metrics over a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pocketzo.arguments import check_integer
from pocketzo.data.order import Data
from pocketzo.errors import TrainingError
from pocketzo.runtime.model import Model
from pocketzo.tasks.culprit import naming_culprit
from pocketzo.tasks.metrics import Found
from pocketzo.tasks.parts import mean_loss, run
from pocketzo.tasks.registry import task_of


class Evaluation(NamedTuple):
    """Metrics over a dataset, and how much they depend on its parts.

    Attributes
    ----------
    values : dict of str to float
        As :func:`evaluate` returns them.
    without : dict of str to list of float
        By metric, its value without the first part of the examples, without the second, and so on: a delete-a-group
        jackknife, from which :mod:`pocketzo.train.verdict` computes standard errors.
    """

    values: dict[str, float]
    without: dict[str, list[float]]


def evaluate(
    model: Model,
    data: Data,
    *,
    batch_size: int = 32,
    metrics: Sequence[str] | None = None,
    activation_memory: int | None = None,
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
    activation_memory : int, optional
        Bytes that logits and activations may take: a batch is run in parts to that end. By default only the logits of
        language models are limited, to 32 MB.

    Returns
    -------
    dict
        ``count``, the number of examples, and the value of each metric. ``loss`` is the mean over all labelled examples
        or tokens. Other metrics are computed once over the whole dataset, not per batch. A value is NaN if nothing has
        a label, or if the model returns NaN.

    Raises
    ------
    DataError
        The model cannot be run on an example; the message names it.
    TrainingError
        The graph has neither loss nor logits, the dataset is empty, or a requested metric needs labels that the data
        lacks.
    ValueError
        A metric is unknown, or the graph lacks the output that it needs.
    """
    return evaluate_in_parts(
        model, data, batch_size=batch_size, metrics=metrics, parts=0, activation_memory=activation_memory
    ).values


def evaluate_in_parts(
    model: Model,
    data: Data,
    *,
    batch_size: int,
    metrics: Sequence[str] | None,
    parts: int,
    activation_memory: int | None = None,
) -> Evaluation:
    """Evaluate a model on a dataset, and on the dataset without each of its parts.

    Parameters
    ----------
    model, data, batch_size, metrics, activation_memory
        As for :func:`evaluate`, which lists the errors.
    parts : int
        The dataset is divided into so many parts of consecutive batches, but not more than there are batches.
    """
    check_integer("batch_size", batch_size, 1)
    task = task_of(model.bundle)
    chosen = [task.metric(name) for name in (task.shown if metrics is None else metrics)]
    if not chosen:
        raise TrainingError(f"{model.bundle.path}: the graph has neither a loss nor logits to evaluate")
    if not len(data):
        raise TrainingError("there are no examples to evaluate")
    founds: list[tuple[Found, int]] = []
    outputs = task.outputs(chosen)
    for at in range(0, len(data), batch_size):
        indices = np.arange(at, min(at + batch_size, len(data)))
        batch = data.batch(indices)
        if task.needs_labels and "labels" not in batch and any(metric.of_loss for metric in chosen):
            raise TrainingError("the data has no labels, without which there is no loss to evaluate")
        with naming_culprit(model, data, indices):
            found = task.found(run(model, task, batch, outputs, activation_memory), batch)
        founds.append((found, task.weight(batch, len(indices))))
    whole = _joined(founds)
    result: dict[str, float] = {"count": len(data)}
    judged = [metric for metric in chosen if metric.of_loss or whole.labels is not None]
    if metrics is not None and len(judged) < len(chosen):
        lacking = next(metric.name for metric in chosen if metric not in judged)
        raise TrainingError(f"the data has no labels, which the metric {lacking!r} needs")
    result |= {metric.name: metric(whole) for metric in judged}
    edges = np.linspace(0, len(founds), min(parts, len(founds)) + 1).astype(int).tolist()
    others = [_joined(founds[:start] + founds[end:]) for start, end in pairwise(edges)] if len(edges) > 2 else []
    return Evaluation(result, {metric.name: [metric(found) for found in others] for metric in judged})


def _joined(founds: Sequence[tuple[Found, int]]) -> Found:
    """Return the results of several batches as those of one; each comes with the weight of its mean loss."""
    losses = [(found.loss, weight) for found, weight in founds if found.loss is not None]
    labelled = [found for found, _ in founds if found.predictions is not None and found.labels is not None]
    return Found(
        mean_loss((loss for loss, _ in losses), (weight for _, weight in losses)),
        np.concatenate([found.predictions for found in labelled]) if labelled else None,
        np.concatenate([found.labels for found in labelled]) if labelled else None,
    )
