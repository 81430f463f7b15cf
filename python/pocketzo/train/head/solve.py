"""Penalised linear models in closed form: many problems over the same features at once, by Newton's method in float64.

The problems differ in the weights of the rows and in the penalty, so that all folds and penalties of a cross-validation
share each product with the features.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo.train.head.losses import Floats, Loss

TOLERANCE: Final = 1e-7
"""Of the gradient, in units of the loss; features have a variance of about 1."""
_MOST_STEPS: Final = 60
_MOST_PRODUCTS: Final = 60


class Linear(NamedTuple):
    """Linear models of several problems.

    Attributes
    ----------
    weight : ndarray, shape [features, problems, columns]
    bias : ndarray, shape [problems, columns]
    """

    weight: Floats
    bias: Floats

    def scores(self, x: Floats) -> Floats:
        """Return the scores [rows, problems, columns] of features [rows, features]."""
        return _product(x, self.weight) + self.bias


def solve(x: Floats, targets: Floats, rows: Floats, l2: Floats, loss: Loss, tolerance: float = TOLERANCE) -> Linear:
    """Minimise a weighted mean of losses and penalties, for each problem.

    A problem minimises ``sum(rows * loss(x @ weight + bias)) + l2 / 2 * sum(weight ** 2)``. The bias is not penalised.

    Parameters
    ----------
    x : ndarray of float64, shape [rows, features]
        The fewer products are needed, the less its columns are correlated.
    targets : ndarray of float64, shape [rows, columns]
    rows : ndarray of float64, shape [rows, problems]
        The weight of each row; they sum to 1 for each problem.
    l2 : ndarray of float64, shape [problems]
        Greater than 0.
    loss : type
        One of :data:`LOSSES`.
    tolerance : float
        The size of the gradient at which a problem counts as solved.
    """
    columns = targets.shape[1]
    found = Linear(np.zeros((x.shape[1], len(l2), columns), x.dtype), np.zeros((len(l2), columns), x.dtype))
    squares = np.square(x).mean(axis=0)
    active = np.arange(len(l2))
    for _ in range(_MOST_STEPS):
        problem = _Problem(x, targets[:, None], rows[:, active, None], l2[active, None], loss, squares)
        at = Linear(found.weight[:, active], found.bias[active])
        at, open_ones = problem.step(at, tolerance)
        found.weight[:, active], found.bias[active] = at
        active = active[open_ones]
        if not active.size:
            break
    return found


class _Problem:
    """Problems that are not solved yet."""

    def __init__(self, x: Floats, targets: Floats, rows: Floats, l2: Floats, loss: Loss, squares: Floats) -> None:
        self._x = x
        self._targets = targets
        self._rows = rows
        self._l2 = l2
        self._loss = loss
        self._squares = squares

    def step(self, at: Linear, tolerance: float) -> tuple[Linear, NDArray[np.bool_]]:
        """Take a step of Newton's method; return the new point, and which problems were not solved before it."""
        scores = at.scores(self._x)
        value = self._loss.at(scores, self._targets)
        gradient = self._pulled(self._rows * value.gradient, at.weight)
        size = np.sqrt(_dot(gradient, gradient))
        unsolved = size > tolerance
        if not unsolved.any():
            return at, unsolved
        move, change = self._direction(gradient, value.mean, np.minimum(0.1, np.sqrt(size)) * size)
        slope = _dot(gradient, move)
        before = self._objective(value.loss, at)
        roundings = 4 * np.finfo(before.dtype).eps * np.abs(before)
        share = np.ones_like(before)
        for _ in range(40):
            moved = Linear(at.weight + share[:, None] * move.weight, at.bias + share[:, None] * move.bias)
            loss = self._loss.at(scores + share[:, None] * change, self._targets).loss
            rising = self._objective(loss, moved) > before + 1e-4 * share * slope + roundings
            if not rising.any():
                break
            share = np.where(rising, share / 2, share)
        else:
            unsolved &= ~rising  # roundings are larger than what is left
        return moved, unsolved

    def _objective(self, loss: Floats, at: Linear) -> Floats:
        penalty = np.square(at.weight).sum(axis=(0, 2))
        total: Floats = (self._rows[..., 0] * loss).sum(axis=0) + self._l2[:, 0] / 2 * penalty
        return total

    def _pulled(self, by_row: Floats, weight: Floats) -> Linear:
        """Return the gradient of the parameters from that of the scores, with the penalty's."""
        return Linear(_product(self._x.T, by_row) + self._l2 * weight, by_row.sum(axis=0))

    def _direction(self, gradient: Linear, mean: Floats, enough: Floats) -> tuple[Linear, Floats]:
        """Return minus the inverse curvature times the gradient by conjugate gradients, and its change of the scores.

        Parameters
        ----------
        enough : ndarray, shape [problems]
            The size of the residual at which to end.
        """
        curvature = (self._rows * self._loss.curvature(mean)).sum(axis=0).mean(axis=-1, keepdims=True)
        scale = Linear(self._squares[:, None, None] * curvature + self._l2, np.maximum(curvature, 1e-8))
        residual = Linear(-gradient.weight, -gradient.bias)
        move = Linear(np.zeros_like(gradient.weight), np.zeros_like(gradient.bias))
        change = np.zeros_like(mean)
        z = Linear(residual.weight / scale.weight, residual.bias / scale.bias)
        p, steep = z, _dot(residual, z)
        for _ in range(_MOST_PRODUCTS):
            going = np.sqrt(_dot(residual, residual)) > enough
            if not going.any():
                break
            along = p.scores(self._x)
            bent = self._pulled(self._rows * self._loss.curved(mean, along), p.weight)
            share = np.where(going, steep / np.where(going, _dot(p, bent), 1), 0)[:, None]
            move = Linear(move.weight + share * p.weight, move.bias + share * p.bias)
            change += share * along
            residual = Linear(residual.weight - share * bent.weight, residual.bias - share * bent.bias)
            z = Linear(residual.weight / scale.weight, residual.bias / scale.bias)
            steep, before = _dot(residual, z), steep
            ratio = np.where(going, steep / np.where(going, before, 1), 0)[:, None]
            p = Linear(z.weight + ratio * p.weight, z.bias + ratio * p.bias)
        return move, change


def _product(x: Floats, by_problem: Floats) -> Floats:
    """Multiply a matrix by a tensor [., problems, columns]."""
    flat: Floats = x @ by_problem.reshape(len(by_problem), -1)
    return flat.reshape(-1, *by_problem.shape[1:])


def _dot(one: Linear, other: Linear) -> Floats:
    """Return the inner product for each problem."""
    by_weight: Floats = np.einsum("fpc,fpc->p", one.weight, other.weight)
    by_bias: Floats = np.einsum("pc,pc->p", one.bias, other.bias)
    return by_weight + by_bias
