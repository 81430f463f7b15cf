"""Choose taps and penalty of a head by the loss of 5-fold cross-validation on the training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import DataError
from pocketzo.formats.side import SideHead
from pocketzo.train.head.losses import Floats
from pocketzo.train.head.pooled import POOLINGS, Basis, Features, Pooled
from pocketzo.train.head.solve import Linear, solve
from pocketzo.train.head.targets import Targets

FOLDS: Final = 5
PENALTIES: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_MIDDLE: Final = (2, 3, 4)
"""The numbers of the penalties that are tried first."""
_ENOUGH: Final = 1e-4
"""The size of the gradient at which a model is good enough to be compared."""
_WIDTHS: Final = (1, 2, 3, 4)
_FEW_TAPS: Final = 8


def candidates(side: SideHead) -> list[Features]:
    """Return what a head may read: taps in a row, and of a decoder their last tokens, alone and too."""
    layers = [tap.layer for tap in side.taps]
    few = len(layers) <= _FEW_TAPS
    return [
        Features(tuple(layers[at : at + width]), pooling)
        for pooling in (POOLINGS if side.causal else ("mean",))
        for width in (_WIDTHS if few else (1, 4))
        for at in range(len(layers) % width if not few else 0, len(layers) - width + 1, 1 if few else width)
    ]


def folds_of(labels: NDArray[np.int64] | None, rows: int, seed: int) -> NDArray[np.int64]:
    """Return the fold of each row, each class divided as equally as possible.

    Raises
    ------
    DataError
        There are fewer rows than folds, or only one class.
    """
    if rows < FOLDS:
        raise DataError(f"a head is chosen by {FOLDS}-fold cross-validation, which takes {FOLDS} examples: got {rows}")
    if labels is not None and len(np.unique(labels)) < 2:
        raise DataError(f"all {rows} examples have one class; a head learns from two or more")
    order = np.random.default_rng(seed).permutation(rows)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(rows, np.int64)
    folds[order] = np.arange(rows) % FOLDS
    return folds


@dataclass(frozen=True)
class Trial:
    """The cross-validation of one choice of features, at its best penalty.

    Attributes
    ----------
    features : Features
    l2 : float
    losses : ndarray, shape [rows]
        Of each row, by a model of the other folds.
    """

    features: Features
    l2: float
    losses: Floats

    @property
    def loss(self) -> float:
        """The mean loss of rows that were held out."""
        return float(self.losses.mean())


class Chooser:
    """Cross-validates heads.

    Parameters
    ----------
    pooled : Pooled
    targets : Targets
    folds : ndarray of int64, shape [rows]

    Attributes
    ----------
    rows : ndarray of float64, shape [rows, folds + 1]
        The weight of each row in the models of :meth:`models`.
    """

    def __init__(self, pooled: Pooled, targets: Targets, folds: NDArray[np.int64]) -> None:
        self._pooled = pooled
        self._targets = targets.values
        self._loss = targets.loss
        self._scale = targets.penalty
        self._folds = folds
        others = (folds[:, None] != np.arange(FOLDS)).astype(np.float64)
        self._others: Floats = others / others.sum(axis=0)
        everything = np.full((len(folds), 1), 1 / len(folds))
        self.rows: Floats = np.concatenate([self._others, everything], axis=1)

    def trial(self, features: Features) -> Trial:
        """Return the cross-validation of some features, at the best penalty.

        Penalties are tried from the middle on, as long as the loss falls.
        """
        x = self._pooled.basis(features).x.astype(np.float32)
        tried = dict(zip(_MIDDLE, self._held_out(x, _MIDDLE), strict=True))
        while True:
            best = min(tried, key=lambda number: float(tried[number].mean()))
            more = [number for number in (best - 1, best + 1) if 0 <= number < len(PENALTIES) and number not in tried]
            if not more:
                return Trial(features, PENALTIES[best], tried[best])
            tried |= dict(zip(more, self._held_out(x, more), strict=True))

    def best(self, features: Sequence[Features], done: Callable[[int], None]) -> list[Trial]:
        """Return the trials, the best first; `done` is called with the number of those that are made."""
        trials = []
        for number, one in enumerate(features, 1):
            trials.append(self.trial(one))
            done(number)
        return sorted(trials, key=lambda trial: trial.loss)

    def _held_out(self, x: Floats, penalties: Sequence[int]) -> Floats:
        """Return the loss of each row by a model of the other folds, [penalties, rows].

        These models are compared only: float32 is enough.
        """
        l2 = np.repeat([PENALTIES[number] for number in penalties], FOLDS) * self._scale
        rows = np.tile(self._others, len(penalties)).astype(np.float32)
        targets = self._targets.astype(np.float32)
        found = solve(x, targets, rows, l2.astype(np.float32), self._loss, _ENOUGH)
        losses = self._loss.at(found.scores(x), targets[:, None]).loss
        by_penalty = losses.reshape(len(x), len(penalties), FOLDS)
        result: Floats = by_penalty[np.arange(len(x)), :, self._folds].T.astype(np.float64)
        return result

    def models(self, trial: Trial) -> tuple[Basis, Linear]:
        """Return the models of each fold's other rows, and last that of all rows."""
        basis = self._pooled.basis(trial.features)
        rows = self.rows
        return basis, solve(basis.x, self._targets, rows, np.full(FOLDS + 1, trial.l2 * self._scale), self._loss)


def standard_error(losses: Floats, other: Floats) -> float:
    """Return the standard error of the difference of two mean losses of the same rows."""
    return float((losses - other).std(ddof=1) / np.sqrt(len(losses)))
