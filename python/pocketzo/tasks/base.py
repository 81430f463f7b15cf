"""The base class of tasks. A task turns columns of a data file into inputs, and outputs into predictions for metrics.

To add a task, write a named class in its own file and add one line to :mod:`pocketzo.tasks.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np

from pocketzo.data.columns import Columns, find_column, missing_column
from pocketzo.formats.bundle import ValueSpec
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.tasks.metrics import METRICS, Found, Metric, Source, metric_named

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from pocketzo.data.examples import Encoded, Example
    from pocketzo.formats.bundle import Bundle

IGNORED: Final = -100
"""The label of a token that loss and metrics ignore."""


class Task(ABC):
    """A task, such as classification, for one bundle.

    Parameters
    ----------
    bundle : Bundle
        The model.
    loss : str, optional
        The kind of loss that was added to the graph; None if the graph has a loss of its own, or none.
    threshold : float, optional
        Above it a score means yes, for scores that each answer a question of their own.

    Raises
    ------
    TypeError, ValueError
        A setting is wrong.

    Attributes
    ----------
    name : str
        The name in ``bundle.json``.
    settings : tuple of str
        The names of the accepted settings, which are parameters.
    losses : tuple of str
        The kinds of loss that fit the task.
    columns : mapping of str to tuple of str
        The usual names of each column, in lower case, by role. Roles are the field names of :class:`Columns`. The
        first role is required, the others are optional. The first name is also the key in records without a header.
    headerless : mapping of int to tuple of str
        The columns of a table without a header, by the number of its columns.
    labels_per : {"example", "token", "nothing"}
        What a label belongs to. The loss of a batch is the mean over these: examples, or tokens with a label other
        than :data:`IGNORED`. Without labels the task says what it is taken over.
    cuts : bool
        Whether :meth:`encode` cuts long texts; else the tokenizer does.
    shift : int
        For graphs with an input ``positions``: how far the position whose logits count is before the token that counts.
    several_rows : bool
        Whether an example has several rows of a batch.
    untrained : str or None
        What the results of a model are called that has not been trained for the task, if they mean something.
    predicts : {"classes", "label sets", "numbers", "texts"}
        What predictions are, which decides the metrics.
    label_dtype : str
        The dtype of labels, where the graph has no label input that fixes it.
    default_metric : str
        The metric that the best evaluation is chosen by, if the graph has the output that it needs.
    bundle : Bundle
    loss, threshold
        The parameters.
    label_input : ValueSpec or None
        The graph's label input, if its shape and dtype suit this task.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ("loss",)
    losses: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, tuple[str, ...]]]
    headerless: ClassVar[Mapping[int, tuple[str, ...]]]
    labels_per: ClassVar[Literal["example", "token", "nothing"]]
    cuts: ClassVar[bool] = False
    shift: ClassVar[int] = 0
    several_rows: ClassVar[bool] = False
    untrained: ClassVar[str | None] = None
    predicts: ClassVar[Source] = "classes"
    label_dtype: ClassVar[str] = "int64"
    default_metric: ClassVar[str]

    def __init__(self, bundle: Bundle, *, loss: str | None = None, threshold: float | None = None) -> None:
        if loss is not None and loss not in self.losses:
            raise ValueError(f"'loss' must be {' or '.join(map(repr, self.losses))}, got {loss!r}")
        if threshold is not None and type(threshold) not in (int, float):
            raise TypeError(f"'threshold' must be a number, got {threshold!r}")
        labels = next((value for value in bundle.inputs if value.name == "labels"), None)
        scores = next((value for value in bundle.outputs if value.name == bundle.logits), None)
        self.bundle = bundle
        self.loss = loss
        self.threshold = threshold
        self.label_input = labels if labels is not None and self.suits(labels, None, threshold) else None
        self._scores = scores if scores is not None and self.suits(labels, scores, threshold) else None

    @classmethod
    @abstractmethod
    def suits(cls, labels: ValueSpec | None, scores: ValueSpec | None, threshold: float | None = None) -> bool:
        """Return whether a graph with this label input and this output of scores suits this task."""

    @property
    def label_spec(self) -> ValueSpec | None:
        """The labels of a batch: the label input, or, if the graph has no input ``labels``, what metrics read.

        None if the graph has an input ``labels`` of another kind, or the task has none.
        """
        if self.labels_per == "nothing":
            return None
        if self.label_input is None and all(value.name != "labels" for value in self.bundle.inputs):
            return ValueSpec("labels", self.label_dtype, ("batch",) if self.labels_per == "example" else ("batch", "?"))
        return self.label_input

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
    def encode(self, tokenizer: Tokenizer, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
        """Return the tokens and the label of each example.

        Parameters
        ----------
        tokenizer : Tokenizer
            It truncates to `limit`, unless the task :attr:`cuts` itself, and does not pad.
        examples : sequence of Example
        limit : int or None
            The maximum number of tokens.
        """

    def counting_tokens(
        self,
        ids: NDArray[Any],
        inside: NDArray[np.bool_],
        marks: NDArray[Any] | None,
        problem: Callable[[int, str], None],
    ) -> NDArray[np.bool_]:
        """Return which tokens of arrays count, for tasks that know it.

        Parameters
        ----------
        ids : ndarray of integers, shape [n, length]
        inside : ndarray of bool, shape [n, length]
            Where there are tokens, and no padding.
        marks : ndarray or None
            The array ``labels`` of a task without labels.
        problem : callable
            ``problem(row, reason)`` is called for rows that cannot be used.
        """
        raise NotImplementedError

    @abstractmethod
    def label_value(self, label: object) -> Any:
        """Return a label from a data file, as a number or list of numbers; raise :class:`LineError` for a wrong one."""

    def label_row(self, values: object) -> Any:
        """Return a label from a row of an array, like :meth:`label_value`."""
        return self.label_value(values)

    @property
    def class_count(self) -> int | None:
        """The number of classes; None if the graph does not fix it."""
        count = None if self._scores is None else self._scores.shape[-1]
        return count if isinstance(count, int) else None

    def find(self, record: Mapping[str, Any], columns: Columns, role: str) -> str | None:
        """Return the name of the column for a role; None if the record lacks it or its value is null."""
        name = find_column(record, getattr(columns, role), self.columns[role])
        return None if name is None or record[name] is None else name

    def missing(self, record: Mapping[str, Any], columns: Columns, role: str) -> str:
        """Return the error message for a record that lacks the column for a role, or has null there."""
        name = find_column(record, getattr(columns, role), self.columns[role])
        if name is not None:
            return f"{name!r} is null"
        return missing_column(record, getattr(columns, role), self.columns[role], role)

    # ---- outputs -> loss and metrics ----

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that the graph's outputs allow, the default one first."""
        given = self.gives
        names = [name for name, metric in METRICS.items() if self._has(metric) and given[metric.of_loss]]
        return tuple(sorted(names, key=lambda name: (name != self.default_metric, name != "loss")))

    @cached_property
    def vocabulary(self) -> int:
        """The number of logits of a token of a language model, or an estimate: the longest axis of a weight."""
        longest = max((size for tensor in self.bundle.tensors for size in tensor.shape[:2]), default=1)
        return embedding_rows(self.bundle).get("input_ids", longest)

    @property
    def gives(self) -> Mapping[bool, bool]:
        """Whether the graph gives what metrics of the loss need (True), and what the others need (False)."""
        return {True: self.bundle.loss is not None, False: self._scores is not None}

    @property
    def needs_labels(self) -> bool:
        """Whether there is no loss without labels."""
        return self.label_input is not None

    def _has(self, metric: Metric) -> bool:
        """Return whether a metric is one of the task's, whatever the graph gives."""
        return metric.of in ("loss", self.predicts, *({"cross-entropy"} & {*self.losses}))

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that are evaluated by default: the task's default metric and the loss."""
        return tuple(name for name in self.metrics if name in (self.default_metric, "loss"))

    def metric(self, name: str | None = None) -> Metric:
        """Return a metric, by default the first of :attr:`metrics`.

        Raises
        ------
        ValueError
            The metric is unknown or not one of the task's, or the graph lacks the output that it needs.
        """
        if name is None:
            return METRICS[next(iter(self.metrics), "loss")]
        metric = metric_named(name)
        if not self._has(metric):
            known = ", ".join(name for name, metric in METRICS.items() if self._has(metric))
            raise ValueError(f"{self.bundle.path}: the task {self.name!r} has no metric {name!r}; it has {known}")
        if name not in self.metrics:
            raise ValueError(f"{self.bundle.path}: the graph has no output that gives the metric {name!r}")
        return metric

    def outputs(self, metrics: Sequence[Metric]) -> tuple[str, ...]:
        """Return the names of the outputs that metrics need."""
        needed = {metric.of_loss for metric in metrics}
        names = {True: self.bundle.loss, False: self.bundle.logits}
        return tuple(name for of_loss, name in names.items() if of_loss in needed and name is not None)

    def weight(self, batch: Mapping[str, NDArray[Any]], examples: int) -> int:
        """Return the number of examples or tokens that the mean loss of a batch is taken over."""
        labels = batch.get("labels")
        if self.labels_per == "token" and labels is not None:
            return int(np.count_nonzero(labels != IGNORED))
        return examples

    def found(self, outputs: Mapping[str, NDArray[Any]], batch: Mapping[str, NDArray[Any]]) -> Found:
        """Return the loss, predictions and labels of one batch; None for each that outputs or labels do not give."""
        loss = None if self.bundle.loss is None else outputs.get(self.bundle.loss)
        scores = None if self._scores is None else outputs.get(self._scores.name)
        labels = batch.get("labels")
        mean = None if loss is None else float(loss)
        if scores is None or labels is None:
            return Found(mean)
        counted = self.counted(labels)
        return Found(mean, self.predictions(scores[counted]), self.targets(labels[counted]))

    def counted(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which labels of a batch metrics count."""
        counted: NDArray[np.bool_] = labels != IGNORED
        return counted

    def targets(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Return the labels that metrics count, as metrics compare them with predictions."""
        return labels

    @abstractmethod
    def predictions(self, scores: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """Return what the scores of labels that are counted predict: integers with -1 for NaN, or floats."""


def is_column(scores: ValueSpec) -> bool:
    """Return whether scores are one number an example: [batch] or [batch, 1]."""
    return len(scores.shape) == 1 or (len(scores.shape) == 2 and scores.shape[1] == 1)
