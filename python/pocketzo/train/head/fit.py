"""Fit a side head: states once, the choice by cross-validation, the closed form, and the queries where they pay.

Where a metric is the objective, queries and bias then move by zeroth order, if that pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import DataError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.side import queries_of
from pocketzo.tasks.metrics import Found, Metric
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.attention import Heads, Singles, Tokens, forward, learn
from pocketzo.train.head.choose import FOLDS, Chooser, Trial, candidates, folds_of
from pocketzo.train.head.head import Head
from pocketzo.train.head.kept import MOST_STATES, Kept
from pocketzo.train.head.losses import Floats
from pocketzo.train.head.pooled import Features, Pooled, Pooling
from pocketzo.train.head.states import TokenStates
from pocketzo.train.head.targets import Targets
from pocketzo.train.head.zeroth import DIRECTIONS, STEPS, Zeroth

Told = Callable[[str, int, int, float | None], None]
"""Called with a stage, how much of it is done, of how much, and the seconds that are left, if that is known."""


@dataclass(frozen=True)
class ByMetric:
    """What zeroth order has made of a metric, on examples that were held out.

    Attributes
    ----------
    metric : Metric
    before, after : float
    evaluations : int
        Of the head, on a batch; the backbone does not run.
    pays : bool
        Whether the head has what was learnt.
    start : Head
        The head before it.
    """

    metric: Metric
    before: float
    after: float
    evaluations: int
    pays: bool
    start: Head


@dataclass(frozen=True)
class Fit:
    """A head, and what it was chosen by.

    Attributes
    ----------
    head : Head
    probe : Head
        On the last layer alone, without attention pooling: the linear probe. Of a decoder, whichever pooling is better.
    trials : list of Trial
        All choices of taps, the best first.
    probe_trial : Trial
        That of the probe.
    attention : ndarray of float64, shape [examples], or None
        The losses of held-out examples with attention pooling; None if it was not tried.
    pays : bool
        Whether the head has attention pooling.
    held_out, probe_held_out : ndarray of float32, shape [examples, columns]
        The scores of each example by the head, without attention pooling, and by the probe of the other folds.
    by_metric : ByMetric or None
        Zeroth order, where a metric is the objective.
    """

    head: Head
    probe: Head
    trials: list[Trial]
    probe_trial: Trial
    attention: Floats | None
    pays: bool
    held_out: Singles
    probe_held_out: Singles
    by_metric: ByMetric | None = None


class Parts(NamedTuple):
    """The models of the folds and of all rows.

    Attributes
    ----------
    weights : dict
        By layer and pooling, [size, heads, columns].
    bias : ndarray, shape [heads, columns]
    held_out : ndarray, shape [rows, columns]
        The bundle's scores of each row by the model of the other folds.
    """

    weights: dict[tuple[int, Pooling], Singles]
    bias: Singles
    held_out: Singles

    def heads(self, features: Features) -> Heads:
        """Return the heads over all tokens, with queries of zeros."""
        sizes = {layer: len(weight) for (layer, _), weight in self.weights.items()}
        none = {layer: np.zeros((sizes[layer], *self.bias.shape), np.float32) for layer in features.layers}
        return Heads.with_means([self.weights.get((one, "mean"), none[one]) for one in features.layers], self.bias)

    def of_last(self, pooled: Pooled) -> Singles:
        """Return what the last tokens add to the scores, [rows, heads, columns]."""
        total = np.zeros((pooled.rows, *self.bias.shape), np.float32)
        for (layer, pooling), weight in self.weights.items():
            if pooling == "last":
                total += np.tensordot(pooled.states(layer, pooling), weight, axes=1)
        return total


class Fitter:
    """Fits a head to examples.

    Parameters
    ----------
    bundle : Bundle
        With a side head, and the labels of the data.
    kept : Kept
        The examples.
    seed : int
        Of the folds, the order of the examples, the dropped tokens and the directions.
    told : callable
    choices : sequence of Features, optional
        Layers and poolings among which to choose; by default all.
    objective : str
        A metric, which zeroth order then minimises or maximises. The loss, and what is a function of it, has a gradient
        and needs none.
    steps : int
        Of zeroth order.

    Raises
    ------
    ValueError
        The metric is unknown, or not one of the task.
    """

    def __init__(
        self,
        bundle: Bundle,
        kept: Kept,
        *,
        seed: int,
        told: Told,
        choices: Sequence[Features] | None = None,
        objective: str = "loss",
        steps: int = STEPS,
    ) -> None:
        assert bundle.side is not None
        self._task = task_of(bundle)
        self._metric = self._task.metric(objective)
        self._steps = steps
        self._side = bundle.side
        self._kept = kept
        self._seed = seed
        self._told = told
        self._targets = Targets.of(kept.labels, self._task)
        self._folds = folds_of(self._targets.classes, len(kept), seed)
        self._choices = candidates(bundle.side) if choices is None else choices

    def fit(self) -> Fit:
        """Choose, and fit."""
        pooled, tokens = self._kept.features(), self._kept.tokens
        chooser = Chooser(pooled, self._targets, self._folds)
        choices = self._choices
        trials = chooser.best(choices, lambda done: self._told("cross-validation", done, len(choices), None))
        best = trials[0]
        last = self._side.taps[-1].layer
        probe = next((one for one in trials if one.features.layers == (last,)), best)
        parts = self._parts(pooled, chooser, best)
        heads = parts.heads(best.features)
        losses = None
        pays = False
        if tokens is not None and best.features.pooling != "last":
            layers = best.features.layers
            others = parts.of_last(pooled)
            learnt = learn(
                parts.heads(best.features),
                tokens,
                layers,
                self._targets.values,
                chooser.rows,
                others,
                self._targets.loss,
                self._seed,
                lambda done, count: self._told("attention pooling", done, count, None),
            )
            losses = self._held_out(learnt, others, tokens, layers)
            pays = bool(losses.mean() < best.loss)
            heads = learnt if pays else heads
        by_metric = None
        if not self._metric.of_loss:
            start = self._head(heads, parts, best.features)
            heads, by_metric = self._by_metric(heads, parts.of_last(pooled), tokens, start)
        of_probe = self._parts(pooled, chooser, probe)
        return Fit(
            self._head(heads, parts, best.features),
            self._head(of_probe.heads(probe.features), of_probe, probe.features),
            trials,
            probe,
            losses,
            pays,
            parts.held_out,
            of_probe.held_out,
            by_metric,
        )

    def _by_metric(
        self, heads: Heads, others: Singles, tokens: TokenStates | None, start: Head
    ) -> tuple[Heads, ByMetric]:
        """Move queries and bias by zeroth order, and return the heads that are better on held-out examples."""
        if tokens is None:
            raise DataError(
                f"the states of all tokens would take more than {MOST_STATES:,} bytes, and the objective "
                f"{self._metric.name!r} needs them: train on fewer examples, or name a --method"
            )
        labels = self._kept.labels

        def value(scores: Floats, rows: NDArray[np.int64]) -> float:
            predictions = self._task.predictions(self._targets.scores(scores))
            return self._metric(Found(None, predictions, self._task.targets(labels[rows])))

        zeroth = Zeroth(heads, others, tokens, start.layers, self._folds)
        shifts = zeroth.learn(
            lambda scores, rows: self._metric.cost(value(scores, rows)),
            self._seed,
            self._steps,
            lambda done, count: self._told("zeroth order", done, count, None),
        )
        rows = np.arange(len(labels))
        after, before = (value(scores, rows) for scores in zeroth.held_out(shifts))
        pays = self._metric.cost(after) < self._metric.cost(before)
        if pays:
            queries: list[Singles] = [query + shift for query, shift in zip(heads.queries, shifts.queries, strict=True)]
            heads = Heads(heads.weights, queries, heads.bias + shifts.bias)
        evaluations = 2 * DIRECTIONS * self._steps
        return heads, ByMetric(self._metric, before, after, evaluations, pays, start)

    def _parts(self, pooled: Pooled, chooser: Chooser, trial: Trial) -> Parts:
        """Return the models of the folds and of all rows, of states as they are: not standardised."""
        basis, models = chooser.models(trial)
        bias = models.bias.copy()
        weights = {}
        keys = trial.features.keys
        for key, standard, part in zip(keys, pooled.standard(trial.features), basis.by_tap(models.weight), strict=True):
            weight = part / standard.deviation[:, None, None]
            bias -= np.tensordot(standard.mean, weight, axes=1)
            weights[key] = weight.astype(np.float32)
        held_out = models.scores(basis.x)[np.arange(len(self._folds)), self._folds]
        return Parts(weights, bias.astype(np.float32), self._targets.scores(held_out))

    def _held_out(self, heads: Heads, others: Singles, tokens: TokenStates, layers: tuple[int, ...]) -> Floats:
        """Return the loss of each example by the head of the other folds."""
        losses = np.empty(len(self._folds))
        for chosen in np.array_split(np.arange(len(losses)), -(-len(losses) // 128)):
            numbers, starts = tokens.rows_of(chosen)
            found = forward(heads, Tokens([tokens.at(layer, numbers) for layer in layers], starts))
            scores = (found.scores + others[chosen]).astype(np.float64)
            value = self._targets.loss.at(scores, self._targets.values[chosen, None])
            losses[chosen] = value.loss[np.arange(len(chosen)), self._folds[chosen]]
        return losses

    def _head(self, heads: Heads, parts: Parts, features: Features) -> Head:
        """Return the head of all rows, with the bundle's scores."""
        columns = self._targets.columns
        queries = queries_of(columns)
        last = None
        if self._side.causal:
            sizes = [len(weight) for weight in heads.weights]
            shape = heads.bias.shape
            found = (
                parts.weights.get((layer, "last"), np.zeros((size, *shape), np.float32))
                for layer, size in zip(features.layers, sizes, strict=True)
            )
            last = [self._targets.weight(weight[:, FOLDS].astype(np.float64)) for weight in found]
        return Head(
            features.layers,
            [self._targets.weight(weight[:, FOLDS].astype(np.float64)) for weight in heads.weights],
            [np.array(np.broadcast_to(query[:, FOLDS], (len(query), queries))) for query in heads.queries],
            self._targets.bias(heads.bias[FOLDS].astype(np.float64)),
            last,
        )
