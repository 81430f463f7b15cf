"""Metrics as objectives: zeroth-order methods can minimise a function that has no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocketzo.tasks.registry import task_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle
    from pocketzo.tasks.base import Task
    from pocketzo.tasks.metrics import Metric


@dataclass(frozen=True)
class MetricObjective:
    """A metric of one batch as the objective to minimise. Call it with the graph's outputs and inputs.

    Attributes
    ----------
    metric : Metric
    task : Task
    outputs : tuple of str
        The names of the required outputs.
    """

    metric: Metric
    task: Task
    outputs: tuple[str, ...]

    def __call__(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> float:
        """Return the metric, or 1 - metric if higher is better; NaN if nothing in the batch has a label.

        Raises
        ------
        ValueError
            The batch has no labels.
        """
        return self.metric.cost(self.metric(self.task.found(outputs, batch)))


def metric_objective(name: str, bundle: Bundle) -> MetricObjective:
    """Return the objective that minimises the cost of a metric for a model.

    Parameters
    ----------
    name : str
        A name from :data:`pocketzo.tasks.metrics.METRICS`.
    bundle : Bundle
        The model.

    Raises
    ------
    ValueError
        The metric is unknown, or the graph lacks the output that it needs.
    """
    task = task_of(bundle)
    metric = task.metric(name)
    return MetricObjective(metric, task, task.outputs([metric]))
