"""What a run minimises: the loss or another metric of a batch, or a function of the caller's.

Zeroth-order methods can minimise a function that has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pocketzo.tasks.parts import count_rows, run
from pocketzo.tasks.registry import task_of
from pocketzo.tasks.together import Found, run_together, shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle
    from pocketzo.runtime.model import Batch, Model
    from pocketzo.tasks.base import Task
    from pocketzo.tasks.metrics import Metric

BatchObjective: TypeAlias = Callable[[Mapping[str, "NDArray[Any]"], Mapping[str, "NDArray[Any]"]], float]


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


@dataclass(frozen=True)
class Objective:
    """An objective as a function of a model and a batch, which is run in parts.

    Attributes
    ----------
    function : MetricObjective or callable
        Of the graph's outputs and inputs.
    task : Task
    activation_memory : int or None
        See :func:`pocketzo.tasks.parts.parts`.
    """

    function: MetricObjective | BatchObjective
    task: Task
    activation_memory: int | None = None

    @property
    def metric(self) -> Metric | None:
        """The metric that is minimised; None for a function of the caller's."""
        return self.function.metric if isinstance(self.function, MetricObjective) else None

    def forward(self, model: Model, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run the model as a step does."""
        outputs = self.function.outputs if isinstance(self.function, MetricObjective) else None
        return run(model, self.task, batch, outputs, self.activation_memory)

    def __call__(self, model: Model, batch: Batch) -> float:
        """Return the value to minimise."""
        return float(self.function(self.forward(model, batch), batch))


@dataclass(frozen=True)
class OnBatch:
    """An objective on one batch: a function of a model, or of a model and several values of what is trained.

    Attributes
    ----------
    objective : Objective
    batch : mapping of str to ndarray
    queries : int
        In how many shares the batch is split where a direction sees a share only.
    """

    objective: Objective
    batch: Batch
    queries: int

    def __call__(self, model: Model) -> float:
        """Return the value to minimise."""
        return self.objective(model, self.batch)

    def forward(self, model: Model, weights: Mapping[str, NDArray[Any]], of: Sequence[int | None]) -> list[Found]:
        """Run the model as a step does that evaluates several directions together.

        Parameters
        ----------
        model : Model
        weights : mapping of str to ndarray
            Values [directions, ...] of all trained tensors.
        of : sequence of int or None
            The share of the batch that each sees; None for all of it.
        """
        whole = np.arange(count_rows(model.bundle, self.batch))
        cut = [] if of[0] is None else shares(model.bundle, self.batch, self.queries)
        rows = [whole if share is None else cut[share] for share in of]
        function, task = self.objective.function, self.objective.task
        outputs = function.outputs if isinstance(function, MetricObjective) else None
        return run_together(model, task, self.batch, rows, weights, outputs, self.objective.activation_memory)

    def together(self, model: Model, weights: Mapping[str, NDArray[Any]], shares: Sequence[int | None]) -> list[float]:
        """Return the value to minimise at each of several values of what is trained; see :meth:`forward`."""
        found = self.forward(model, weights, shares)
        return [float(self.objective.function(outputs, batch)) for outputs, batch in found]
