"""Zeroth order over kept states: queries and bias of a head move by any metric, from function values alone.

Heads that were fitted to a training set are nearly always right on it, so that a metric there is flat. Here each
example is scored by the head of the other folds, which has not seen it, and what is learnt is one shift of all heads'
queries and biases. It is learnt once on all examples, and once without each fold, on which it is then judged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo.kernels import noise
from pocketzo.train.head.attention import Heads, Singles, product
from pocketzo.train.head.choose import FOLDS
from pocketzo.train.head.states import TokenStates

STEPS: Final = 300
BATCH: Final = 128
DIRECTIONS: Final = 4
"""Of a step; each is looked at on both sides."""
_EPS: Final = 0.1
_RATE: Final = 1e-2
_WARM_UP: Final = 0.1
_DECAY: Final = (0.95, 0.999)
_EPSILON: Final = 1e-8

Cost = Callable[[Singles, NDArray[np.int64]], float]
"""The number to minimise, of scores [rows, columns] and the numbers of their examples."""


class Shifts(NamedTuple):
    """What is added to the heads: by what was learnt without each fold, and last on all examples.

    Attributes
    ----------
    queries : list of ndarray of float32, shape [size, folds + 1, queries]
        By tap.
    bias : ndarray of float32, shape [folds + 1, columns]
    """

    queries: list[Singles]
    bias: Singles


class Zeroth:
    """Learns shifts of heads.

    Parameters
    ----------
    heads : Heads
        Of each fold's other rows, and of all rows.
    others : ndarray of float32, shape [examples, heads, columns]
        What else is added to the scores.
    states : TokenStates
    layers : tuple of int
        The taps.
    folds : ndarray of int64, shape [examples]
    """

    def __init__(
        self, heads: Heads, others: Singles, states: TokenStates, layers: tuple[int, ...], folds: NDArray[np.int64]
    ) -> None:
        self._states = states
        self._layers = layers
        self._folds = folds
        examples = np.arange(len(folds))
        self._base = heads.bias[folds] + others[examples, folds]
        total, columns, queries = states.total, heads.bias.shape[1], heads.queries[0].shape[2]
        self._values = [np.empty((total, columns), np.float32) for _ in layers]
        self._logits = [np.empty((total, queries), np.float32) for _ in layers]
        for fold in range(FOLDS):
            for chosen in _parts(np.flatnonzero(folds == fold)):
                numbers, _ = states.rows_of(chosen)
                for at, layer in enumerate(layers):
                    tap = states.at(layer, numbers)
                    self._values[at][numbers] = tap @ heads.weights[at][:, fold]
                    self._logits[at][numbers] = tap @ heads.queries[at][:, fold] * _scale(tap)

    def learn(self, cost: Cost, seed: int, steps: int, told: Callable[[int, int], None]) -> Shifts:
        """Learn the shifts by Adam, on estimates of the gradient along random directions.

        Parameters
        ----------
        cost : callable
        seed : int
            Of the directions and the batches.
        steps : int
        told : callable
            Called with the number of steps that are done, and how many there are.
        """
        sizes = [self._states.size(layer) for layer in self._layers]
        columns, queries = self._base.shape[1], self._logits[0].shape[1]
        shapes = [(columns,), *((size, queries) for size in sizes)]
        edges = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        at, first, second = (np.zeros((FOLDS + 1, edges[-1]), np.float32) for _ in range(3))
        order = np.random.default_rng(seed)
        for step in range(1, steps + 1):
            chosen = order.permutation(len(self._folds))[:BATCH]
            batch = _Batch(self, chosen, self._unpacked(at, edges, shapes))
            slope = np.zeros_like(at)
            for query in range(DIRECTIONS):
                draw = (step - 1) * DIRECTIONS + query
                u = noise(int(edges[-1]), seed=seed, tensor=0, draw=draw, distribution="rademacher")
                sides = batch.along(self._unpacked(u[None], edges, shapes))
                for problem in range(FOLDS + 1):
                    rows = np.flatnonzero(self._folds[chosen] != problem)
                    plus, minus = (cost(side[rows, problem], chosen[rows]) for side in sides)
                    slope[problem] += np.float32((plus - minus) / (2 * _EPS * DIRECTIONS)) * u
            rate = _RATE * min(step / (_WARM_UP * steps), (steps - step) / ((1 - _WARM_UP) * steps), 1)
            first += np.float32(1 - _DECAY[0]) * (slope - first)
            second += np.float32(1 - _DECAY[1]) * (slope * slope - second)
            size = np.sqrt(second / np.float32(1 - _DECAY[1] ** step)) + np.float32(_EPSILON)
            at -= np.float32(rate / (1 - _DECAY[0] ** step)) * first / size
            told(step, steps)
        return self._unpacked(at, edges, shapes)

    def held_out(self, shifts: Shifts) -> tuple[Singles, Singles]:
        """Return the scores [examples, columns] of each fold by the shift that was learnt without it, and by none."""
        scores = np.empty_like(self._base), np.empty_like(self._base)
        none = Shifts([np.zeros_like(query) for query in shifts.queries], np.zeros_like(shifts.bias))
        for chosen in _parts(np.arange(len(self._folds))):
            for array, moved in zip(scores, (shifts, none), strict=True):
                found = _Batch(self, chosen, moved).scores()
                array[chosen] = found[np.arange(len(chosen)), self._folds[chosen]]
        return scores

    def _unpacked(self, flat: Singles, edges: NDArray[np.int64], shapes: list[tuple[int, ...]]) -> Shifts:
        arrays = [
            flat[:, start:end].reshape(len(flat), *shape)
            for start, end, shape in zip(edges, edges[1:], shapes, strict=False)
        ]
        return Shifts([np.ascontiguousarray(one.transpose(1, 0, 2)) for one in arrays[1:]], arrays[0])


class _Batch:
    """Some examples at one point: what the scores along any direction have in common."""

    def __init__(self, of: Zeroth, chosen: NDArray[np.int64], at: Shifts) -> None:
        numbers, self._starts = of._states.rows_of(chosen)
        self._owner = np.repeat(np.arange(len(chosen)), np.diff([*self._starts, len(numbers)]))
        self._taps = [of._states.at(layer, numbers) for layer in of._layers]
        self._values = [values[numbers][:, None] for values in of._values]
        self._weights = []
        for tap, logits, query in zip(self._taps, of._logits, at.queries, strict=True):
            found = logits[numbers][:, None] + product(tap, query) * _scale(tap)
            self._weights.append(np.exp(found - np.maximum.reduceat(found, self._starts)[self._owner]))
        self._base = of._base[chosen][:, None] + at.bias

    def scores(self) -> Singles:
        """Return the scores [examples, problems, columns]."""
        return self._summed([1.0] * len(self._taps), np.zeros((1, 1), np.float32))

    def along(self, direction: Shifts) -> tuple[Singles, Singles]:
        """Return the scores [examples, problems, columns] on both sides."""
        factors = [
            np.exp(np.float32(_EPS) * product(tap, query) * _scale(tap))
            for tap, query in zip(self._taps, direction.queries, strict=True)
        ]
        bias = np.float32(_EPS) * direction.bias
        return self._summed(factors, bias), self._summed([1 / factor for factor in factors], -bias)

    def _summed(self, factors: list[Singles] | list[float], bias: Singles) -> Singles:
        scores: Singles = self._base + bias
        for weight, factor, value in zip(self._weights, factors, self._values, strict=True):
            weight = weight * factor
            total = np.add.reduceat(weight * value, self._starts)
            scores = scores + total / np.add.reduceat(weight, self._starts)
        return scores


def _scale(tap: Singles) -> np.float32:
    return np.float32(tap.shape[1] ** -0.5)


def _parts(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(rows, -(-len(rows) // BATCH)) if len(rows) else []
