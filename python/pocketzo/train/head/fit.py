"""Fit a side head: states once, the choice by cross-validation, the closed form, and the queries where they pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from pocketzo.data.dataset import Dataset
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.side import queries_of
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.attention import Heads, Singles, Tokens, forward, learn
from pocketzo.train.head.choose import FOLDS, Chooser, Trial, candidates, folds_of
from pocketzo.train.head.head import Head
from pocketzo.train.head.losses import Floats
from pocketzo.train.head.pooled import Features, Pooled, Pooling
from pocketzo.train.head.states import Backbone, TokenStates
from pocketzo.train.head.targets import Targets

MOST_STATES: Final = 4_000_000_000
"""Bytes of token states on storage; where they would take more, there is no attention pooling."""

Told = Callable[[str, int, int, float | None], None]
"""Called with a stage, how much of it is done, of how much, and the seconds that are left, if that is known."""


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
    """

    head: Head
    probe: Head
    trials: list[Trial]
    probe_trial: Trial
    attention: Floats | None
    pays: bool


class Parts(NamedTuple):
    """The models of the folds and of all rows.

    Attributes
    ----------
    weights : dict
        By layer and pooling, [size, heads, columns].
    bias : ndarray, shape [heads, columns]
    """

    weights: dict[tuple[int, Pooling], Singles]
    bias: Singles

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
    """Fits a head to a dataset.

    Parameters
    ----------
    bundle : Bundle
        With a side head, and the labels of the data.
    data : Dataset
        With labels.
    seed : int
        Of the folds, the order of the examples and the dropped tokens.
    threads : int
        For the backbone.
    folder : Path
        For temporary files of token states.
    told : callable
    """

    def __init__(self, bundle: Bundle, data: Dataset, *, seed: int, threads: int, folder: Path, told: Told) -> None:
        assert bundle.side is not None
        self._side = bundle.side
        self._data = data
        self._seed = seed
        self._folder = folder
        self._told = told
        self._targets = Targets.of(data, task_of(bundle))
        self._folds = folds_of(self._targets.classes, len(data), seed)
        self._layers = [tap.layer for tap in self._side.taps]
        self._backbone = Backbone(bundle, self._layers, threads)

    def fit(self) -> Fit:
        """Run the backbone over the data, choose, and fit."""
        pooled, tokens = self._states()
        chooser = Chooser(pooled, self._targets, self._folds)
        choices = candidates(self._side)
        trials = chooser.best(choices, lambda done: self._told("cross-validation", done, len(choices), None))
        best = trials[0]
        probe = next(one for one in trials if one.features.layers == (self._layers[-1],))
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
        of_probe = self._parts(pooled, chooser, probe)
        return Fit(
            self._head(heads, parts, best.features),
            self._head(of_probe.heads(probe.features), of_probe, probe.features),
            trials,
            probe,
            losses,
            pays,
        )

    def _states(self) -> tuple[Pooled, TokenStates | None]:
        sizes = [tap.size for tap in self._side.taps]
        rows = len(self._data)
        poolings: tuple[Pooling, ...] = ("mean", "last") if self._side.causal else ("mean",)
        states = {
            (layer, pooling): np.empty((rows, size), np.float32)
            for layer, size in zip(self._layers, sizes, strict=True)
            for pooling in poolings
        }
        lengths = self._data.lengths
        tokens = None
        if lengths is not None and 2 * sum(sizes) * int(lengths.sum()) <= MOST_STATES:
            tokens = TokenStates(self._layers, sizes, lengths, self._folder)
        for found in self._backbone.run(self._data, lambda *done: self._told("backbone", *done)):
            for (layer, pooling), array in states.items():
                array[found.examples] = found.pooled(self._layers.index(layer), pooling)
            if tokens is not None:
                tokens.put(found)
        return Pooled(states), tokens

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
        return Parts(weights, bias.astype(np.float32))

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
