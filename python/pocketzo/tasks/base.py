"""The interface of a task, which turns columns of a data file into inputs, and outputs into metrics.

A task is a class with a name, in a file of its own, and one line of :mod:`pocketzo.tasks.registry`.
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
"""The label of a token that does not count."""


class Task(ABC):
    """A kind of problem, for one bundle.

    Parameters
    ----------
    bundle : Bundle
        The model.
    **settings
        Those of the bundle's task, by name; a ValueError or TypeError if one is wrong.

    Attributes
    ----------
    name : str
        As in ``bundle.json``.
    settings : tuple of str
        The names of the settings that it takes.
    columns : mapping of str to tuple of str
        The columns that it reads, by the names of :class:`Columns`' fields, the first one always and the others where
        they are there; each with the names that it has as a rule, in lower case, the first of which is also the key of
        a record without a header.
    headerless : mapping of int to tuple of str
        Which columns a table of so many has that has no header.
    labels_per : {"example", "token"}
        What has a label, and so what the mean loss of a batch is over: examples, or tokens with a label other than
        :data:`IGNORED`.
    default_metric : str
        By which runs are judged, where the graph gives what it needs.
    bundle : Bundle
    label_input : ValueSpec or None
        The graph's input for labels, if it takes those of this task.
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
        """Whether a graph with this input for labels and this output of class scores may be for this task."""
        rank = 1 if cls.labels_per == "example" else 2
        if labels is not None and not (len(labels.shape) == rank and labels.dtype.startswith(("int", "uint"))):
            return False
        if logits is not None and len(logits.shape) != rank + 1:
            return False
        return labels is not None or logits is not None

    # ---- columns of a data file -> inputs ----

    @abstractmethod
    def example(self, record: Mapping[str, Any], columns: Columns) -> Example:
        """Check a record and take from it what an example needs.

        Parameters
        ----------
        record : mapping of str to any
            A line's values by column.
        columns : Columns
            The names that the user gave.

        Raises
        ------
        LineError
            The record cannot be used; says why.
        """

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
        """Return the tokens and the label of each example.

        The tokenizer truncates to the model's maximum length, and does not pad.
        """

    @abstractmethod
    def class_number(self, label: object) -> int:
        """Return the number of the class that a label of a data file names; a :class:`LineError` if it names none."""

    @property
    def class_count(self) -> int | None:
        """The number of classes, if it is known."""
        count = None if self._logits is None else self._logits.shape[-1]
        return count if isinstance(count, int) else None

    def find(self, record: Mapping[str, Any], columns: Columns, role: str) -> str | None:
        """Return the name of the column that has a role in a record, if it is there and not null."""
        name = find_column(record, getattr(columns, role), self.columns[role])
        return None if name is None or record[name] is None else name

    def missing(self, record: Mapping[str, Any], columns: Columns, role: str) -> str:
        """Return what to say where a record lacks the column that has a role."""
        return missing_column(record, getattr(columns, role), self.columns[role])

    # ---- outputs -> loss and metrics ----

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the graph gives what they need for, the default one first."""
        given = {"loss": self.bundle.loss is not None, "predictions": self._logits is not None}
        names = [name for name, metric in METRICS.items() if given[metric.of]]
        return tuple(sorted(names, key=lambda name: (name != self.default_metric, name != "loss")))

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that are evaluated where none is asked for: the default one and the loss."""
        return tuple(name for name in self.metrics if name in (self.default_metric, "loss"))

    def metric(self, name: str | None = None) -> Metric:
        """Return a metric, by default the first of :attr:`metrics`.

        Raises
        ------
        ValueError
            There is no such metric, or the graph lacks what it needs.
        """
        if name is None:
            return METRICS[next(iter(self.metrics), "loss")]
        metric = metric_named(name)
        if name not in self.metrics:
            raise ValueError(f"{self.bundle.path}: the graph has no output that gives the metric {name!r}")
        return metric

    def outputs(self, metrics: Sequence[Metric]) -> tuple[str, ...]:
        """Return the names of the outputs that the metrics need."""
        needed = {metric.of for metric in metrics}
        names = {"loss": self.bundle.loss, "predictions": self.bundle.logits}
        return tuple(name for of, name in names.items() if of in needed and name is not None)

    def weight(self, batch: Mapping[str, NDArray[Any]], examples: int) -> int:
        """Return the number of examples or tokens over which the loss of a batch of so many examples is the mean."""
        labels = batch.get("labels")
        if self.labels_per == "token" and labels is not None:
            return int(np.count_nonzero(labels != IGNORED))
        return examples

    def found(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> Found:
        """Return predictions, labels and loss of one batch, as far as its outputs and labels have them."""
        loss = None if self.bundle.loss is None else outputs.get(self.bundle.loss)
        scores = None if self._logits is None else outputs.get(self._logits.name)
        labels = batch.get("labels")
        mean = None if loss is None else float(loss)
        if scores is None or labels is None:
            return Found(mean)
        counted = labels != IGNORED
        return Found(mean, self.predictions(scores[counted]), labels[counted])

    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return the class with the highest score, or -1 where scores are NaN.

        Parameters
        ----------
        scores : ndarray of floats, shape [n, classes]

        Returns
        -------
        ndarray of int64, shape [n]
        """
        return np.where(np.isnan(scores).any(-1), -1, scores.argmax(-1))
