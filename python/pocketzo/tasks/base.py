"""The base class of tasks. A task turns columns of a data file into inputs, and outputs into predictions for metrics.

To add a task, write a named class in its own file and add one line to :mod:`pocketzo.tasks.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np

from pocketzo.data.columns import Columns, find_column, missing_column
from pocketzo.tasks.metrics import METRICS, Found, Metric, metric_named

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.data.examples import Encoded, Example
    from pocketzo.formats.bundle import Bundle, ValueSpec

IGNORED: Final = -100
"""The label of a token that loss and metrics ignore."""


class Task(ABC):
    """A task, such as classification, for one bundle.

    Parameters
    ----------
    bundle : Bundle
        The model.
    **settings
        The settings of the bundle's task, by name. A wrong one raises ValueError or TypeError.

    Attributes
    ----------
    name : str
        The name in ``bundle.json``.
    settings : tuple of str
        The names of the accepted settings.
    columns : mapping of str to tuple of str
        The usual names of each column, in lower case, by role. Roles are the field names of :class:`Columns`. The
        first role is required, the others are optional. The first name is also the key in records without a header.
    headerless : mapping of int to tuple of str
        The columns of a table without a header, by the number of its columns.
    labels_per : {"example", "token"}
        What a label belongs to. The loss of a batch is the mean over these: examples, or tokens with a label other
        than :data:`IGNORED`.
    default_metric : str
        The metric that the best evaluation is chosen by, if the graph has the output that it needs.
    bundle : Bundle
    label_input : ValueSpec or None
        The graph's label input, if its shape and dtype suit this task.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    headerless: ClassVar[Mapping[int, tuple[str, ...]]]
    labels_per: ClassVar[Literal["example", "token"]]
    default_metric: ClassVar[str]

    def __init__(self, bundle: Bundle) -> None:
        labels = next((value for value in bundle.inputs if value.name == "labels"), None)
        logits = next((value for value in bundle.outputs if value.name == bundle.logits), None)
        self.bundle = bundle
        self.label_input = labels if labels is not None and self.suits(labels, None) else None
        self._logits = logits if logits is not None and self.suits(labels, logits) else None

    @classmethod
    def suits(cls, labels: ValueSpec | None, logits: ValueSpec | None) -> bool:
        """Return whether a graph with this label input and this logits output suits this task."""
        rank = 1 if cls.labels_per == "example" else 2
        if labels is not None and not (len(labels.shape) == rank and labels.dtype.startswith(("int", "uint"))):
            return False
        if logits is not None and len(logits.shape) != rank + 1:
            return False
        return labels is not None or logits is not None

    # ---- columns of a data file -> inputs ----

    @abstractmethod
    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Check a record and convert it to an example.

        Parameters
        ----------
        record : mapping of str to any
            The values of a line, by column.
        columns : Columns
            The column names that the user gave.

        Raises
        ------
        LineError
            The record cannot be used. The message gives the reason.
        """

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
        """Return the tokens and the label of each example.

        The tokenizer truncates to the model's maximum length, and does not pad.
        """

    @abstractmethod
    def class_number(self, label: object) -> int:
        """Return the class number of a label from a data file; raise :class:`LineError` for an unknown label."""

    @property
    def class_count(self) -> int | None:
        """The number of classes; None if the graph does not fix it."""
        count = None if self._logits is None else self._logits.shape[-1]
        return count if isinstance(count, int) else None

    def find(self, record: Mapping[str, Any], columns: Columns, role: str) -> str | None:
        """Return the name of the column for a role; None if the record lacks it or its value is null."""
        name = find_column(record, getattr(columns, role), self.columns[role])
        return None if name is None or record[name] is None else name

    def missing(self, record: Mapping[str, Any], columns: Columns, role: str) -> str:
        """Return the error message for a record that lacks the column for a role."""
        return missing_column(record, getattr(columns, role), self.columns[role])

    # ---- outputs -> loss and metrics ----

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that the graph's outputs allow, the default one first."""
        given = {"loss": self.bundle.loss is not None, "predictions": self._logits is not None}
        names = [name for name, metric in METRICS.items() if given[metric.of]]
        return tuple(sorted(names, key=lambda name: (name != self.default_metric, name != "loss")))

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that are evaluated by default: the task's default metric and the loss."""
        return tuple(name for name in self.metrics if name in (self.default_metric, "loss"))

    def metric(self, name: str | None = None) -> Metric:
        """Return a metric, by default the first of :attr:`metrics`.

        Raises
        ------
        ValueError
            The metric is unknown, or the graph lacks the output that it needs.
        """
        if name is None:
            return METRICS[next(iter(self.metrics), "loss")]
        metric = metric_named(name)
        if name not in self.metrics:
            raise ValueError(f"{self.bundle.path}: the graph has no output that gives the metric {name!r}")
        return metric

    def outputs(self, metrics: Sequence[Metric]) -> tuple[str, ...]:
        """Return the names of the outputs that metrics need."""
        needed = {metric.of for metric in metrics}
        names = {"loss": self.bundle.loss, "predictions": self.bundle.logits}
        return tuple(name for of, name in names.items() if of in needed and name is not None)

    def weight(self, batch: Mapping[str, NDArray[Any]], examples: int) -> int:
        """Return the number of examples or tokens that the mean loss of a batch is taken over."""
        labels = batch.get("labels")
        if self.labels_per == "token" and labels is not None:
            return int(np.count_nonzero(labels != IGNORED))
        return examples

    def found(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> Found:
        """Return the loss, predictions and labels of one batch; None for each that outputs or labels do not give."""
        loss = None if self.bundle.loss is None else outputs.get(self.bundle.loss)
        scores = None if self._logits is None else outputs.get(self._logits.name)
        labels = batch.get("labels")
        mean = None if loss is None else float(loss)
        if scores is None or labels is None:
            return Found(mean)
        counted = labels != IGNORED
        return Found(mean, self.predictions(scores[counted]), labels[counted])

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return the class with the highest score, or -1 where a score is NaN.

        Parameters
        ----------
        scores : ndarray of floats, shape [n, classes]

        Returns
        -------
        ndarray of int64, shape [n]
        """
        return np.where(np.isnan(scores).any(-1), -1, scores.argmax(-1))
