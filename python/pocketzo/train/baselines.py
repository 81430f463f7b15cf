"""What a run has to beat: the answer that needs no model, and what the frozen model gives without a single step.

The second is a linear probe on the last layer, and the closed form of a side head (:mod:`pocketzo.train.head`). One
forward pass over the examples gives both, and their settings are chosen by cross-validation on the training data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset
from pocketzo.data.order import Data, Order
from pocketzo.errors import DataError
from pocketzo.formats.bundle import Bundle, TaskSpec
from pocketzo.formats.side import SideHead
from pocketzo.machine.memory import trim_heap
from pocketzo.runtime.taps import Stream
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import all_finite
from pocketzo.train.head.choose import candidates
from pocketzo.train.head.evaluate import results_of
from pocketzo.train.head.fit import Fitter
from pocketzo.train.head.head import Head
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.pooled import Features
from pocketzo.train.head.states import Backbone, Told
from pocketzo.train.recipe import parse_dataclass

MOST_EXAMPLES: Final = 1024
"""Training examples from which the heads of :class:`Heads` learn at most, so that they take bounded time and memory."""
MOST: Final = 0.1
"""What these may cost, as a share of the forward passes of the run, unless they are asked for."""

LINE: Final = "baselines"
"""The key of their line in ``metrics.jsonl``."""

_WIDE: Final = 3  # layers; heads that read fewer are seldom better
_LOSS: Final = {"classes": "cross-entropy", "label sets": "bce", "numbers": "mse"}


@dataclass(frozen=True)
class Majority:
    """The most frequent class of the training data as the answer to every example.

    Attributes
    ----------
    label : int
        Its number.
    accuracy : float
        On the evaluation data.
    """

    label: int
    accuracy: float

    @classmethod
    def of(cls, train: Data, evaluated: Data | None) -> Majority | None:
        """Return it; None if the examples have no classes, or there is no evaluation data."""
        known, asked = (getattr(data, "label_ids", None) for data in (train, evaluated))
        if known is None or asked is None or not len(known) or not len(asked):
            return None
        label = int(np.bincount(known).argmax())
        return cls(label, float(np.mean(asked == label)))

    def text(self, labels: tuple[str, ...] | None, values: Mapping[str, float | None]) -> str:
        """Return it as a line for people, beside the values of a run's last evaluation."""
        name = repr(labels[self.label]) if labels else f"class {self.label}"
        line = f"always {name}, the most frequent class of the training data: accuracy {100 * self.accuracy:.1f} %"
        reached = values.get("accuracy")
        if reached is not None and reached <= self.accuracy:
            line += f"; the run, with {100 * reached:.1f} %, is no better than that"
        return line


@dataclass(frozen=True)
class Measured:
    """One head over the frozen model.

    Attributes
    ----------
    reads : str
        Its layers and pooling, for people.
    validated : dict of str to float or None
        Metrics by cross-validation on the training examples.
    evaluated : dict of str to float or None, or None
        On the evaluation data; None if there is none.
    """

    reads: str
    validated: dict[str, float | None]
    evaluated: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Heads:
    """The linear probe and the side head of a model before its training.

    Attributes
    ----------
    probe, head : Measured
    examples : int
        Training examples that they learnt from.
    forwards : int
        Examples that the model was run on, each once.
    seconds : float
        In all.
    """

    probe: Measured
    head: Measured
    examples: int
    forwards: int
    seconds: float

    def line(self) -> dict[str, Any]:
        """Return the line of ``metrics.jsonl``."""
        return {"step": 0, LINE: asdict(self)}

    @classmethod
    def of_run(cls, lines: list[dict[str, Any]], path: Path) -> Self | None:
        """Return those of a run's lines; None if there are none.

        Raises
        ------
        JournalError
            The line is damaged.
        """
        found = next((line[LINE] for line in lines if LINE in line), None)
        return None if found is None else parse_dataclass(cls, found, path, LINE)


def why_none(bundle: Bundle, train: Dataset) -> str | None:
    """Return why there are no heads for a task and its data; None if there may be some."""
    task = task_of(bundle)
    if task.several_rows:
        return f"the task {task.name!r} has several rows of tokens for each example"
    if train.label_values is None or task.labels_per != "example":
        return f"a head learns labels of examples, which the task {task.name!r} has none of"
    return None


def cost(train: Data, evaluated: Data | None) -> int:
    """Return how many examples the model is run on for :func:`measure_heads`."""
    return min(len(train), MOST_EXAMPLES) + (0 if evaluated is None else len(evaluated))


def measure_heads(
    bundle: Bundle,
    train: Dataset,
    evaluated: Dataset | None = None,
    *,
    metric: str | None = None,
    seed: int = 0,
    threads: int = 1,
    told: Told | None = None,
) -> Heads:
    """Fit a linear probe and the closed form of a side head to a frozen model, and evaluate both.

    The model is that of the bundle, whatever is trained in it; none of its files is changed, and the package onnx is
    not needed. It runs once over at most :data:`MOST_EXAMPLES` training examples and the evaluation data. The layers,
    the pooling and the penalty are chosen by 5-fold cross-validation on the training examples.

    Parameters
    ----------
    bundle : Bundle
    train : Dataset
        With labels of examples.
    evaluated : Dataset, optional
        Evaluation data, which nothing is chosen by.
    metric : str, optional
        One more metric than those that evaluations of the task show.
    seed : int
        Of the folds, and of the examples where there are too many.
    threads : int
        Of the session.
    told : callable, optional
        Gets the progress.

    Raises
    ------
    BundleError
        No layers are found in the graph.
    DataError
        There are less than 5 examples, no labels, or one class only.
    NotPrepackableError
        The package protobuf is not installed.
    """
    began = time.perf_counter()
    if (reason := why_none(bundle, train)) is not None:
        raise DataError(reason)
    stream = Stream.of(bundle)
    described = _as_head(bundle, stream)
    task = task_of(described)
    layers = [tap.layer for tap in stream.taps]
    rows = np.sort(Order(seed=seed, size=len(train), batch_size=min(len(train), MOST_EXAMPLES))(0))
    total = cost(train, evaluated)
    kept = Kept.of(
        described,
        train,
        folder=None,
        backbone=Backbone(bundle, layers, threads, stream),
        rows=rows,
        told=_scaled(told, 0, len(rows), total),
    )
    trim_heap()  # the session is closed: neither the fit nor training has it in memory
    fit = Fitter(described, kept, seed=seed, told=lambda *_: None, choices=_choices(stream.side)).fit()
    metrics = [] if metric is None else [metric]
    by_fold = [results_of(task, scores, kept.labels, metrics) for scores in (fit.probe_held_out, fit.held_out)]
    held_out: list[dict[str, float] | None] = [None, None]
    if evaluated is not None and evaluated.label_values is not None:
        progress = _scaled(told, len(rows), len(evaluated), total)
        backbone = Backbone(bundle, layers, threads, stream)
        scores = _scores([fit.probe, fit.head], backbone, stream, evaluated, progress)
        held_out = [results_of(task, one, evaluated.label_values, metrics) for one in scores]
    trials = fit.probe_trial, fit.trials[0]
    probe, head = (
        Measured(trial.features.text, all_finite(validated) or {}, all_finite(on_data))
        for trial, validated, on_data in zip(trials, by_fold, held_out, strict=True)
    )
    return Heads(probe, head, len(rows), total, round(time.perf_counter() - began, 3))


def _as_head(bundle: Bundle, stream: Stream) -> Bundle:
    """Return the description of a bundle with a side head, and a loss that a head can minimise."""
    task = task_of(bundle)
    spec = bundle.task or TaskSpec(task.name)
    if task.loss is None:
        spec = replace(spec, settings={**spec.settings, "loss": _LOSS[task.predicts]})
    return replace(bundle, side=stream.side, task=spec)


def _choices(side: SideHead) -> list[Features]:
    """Return what the heads may read: the last layer, and of all layers those choices that have most of them."""
    last, most = side.taps[-1].layer, min(_WIDE, len(side.taps))
    return [one for one in candidates(side) if len(one.layers) >= most or one.layers == (last,)]


def _scores(
    heads: list[Head], backbone: Backbone, stream: Stream, data: Dataset, told: Told | None
) -> list[NDArray[np.float32]]:
    """Return the scores of each head, [examples, columns]."""
    found = [np.empty((len(data), len(head.bias)), np.float32) for head in heads]
    for states in backbone.run(data, told):
        pooled = states.all_pooled(stream.side)
        for head, array in zip(heads, found, strict=True):
            array[states.examples] = head.scores_of_pooled(pooled)
    return found


def _scaled(told: Told | None, before: int, count: int, total: int) -> Told | None:
    """Return what reports a part of all examples as that of all."""
    if told is None:
        return None

    def report(done: int, _: int, left: float) -> None:
        told(before + done, total, left)

    return report
