"""Attention pooling: queries that weight the tokens of each tap, learnt by their own gradient from kept states.

The weights of the head stay. With queries of zeros the head is that of the mean over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.side import queries_of
from pocketzo.train.head.losses import Floats, Loss
from pocketzo.train.head.states import TokenStates

EPOCHS: Final = 6
BATCH: Final = 32
DROPPED: Final = 0.15
_RATE: Final = 1e-2
_WARM_UP: Final = 0.1
_DECAY: Final = (0.9, 0.99)
_EPSILON: Final = 1e-8
_NEVER: Final = -1e9

Singles = NDArray[np.floating[Any]]  # float32, but where gradients are checked


class Heads(NamedTuple):
    """Heads over the same taps: of each fold's other rows, and of all rows.

    Attributes
    ----------
    weights : list of ndarray, shape [size, heads, columns]
        By tap.
    queries : list of ndarray, shape [size, heads, queries]
        By tap. One query serves all columns, or each has its own.
    bias : ndarray, shape [heads, columns]
    """

    weights: list[Singles]
    queries: list[Singles]
    bias: Singles

    @classmethod
    def with_means(cls, weights: list[Singles], bias: Singles) -> Heads:
        """Return heads with queries of zeros."""
        columns = bias.shape[1]
        queries = [np.zeros((*weight.shape[:2], queries_of(columns)), np.float32) for weight in weights]
        return cls(weights, queries, bias)


class Tokens(NamedTuple):
    """The states of a batch: by tap, float32 [tokens, size]; and where each example begins."""

    taps: list[Singles]
    starts: NDArray[np.int64]

    @property
    def examples(self) -> NDArray[np.int64]:
        """The number in the batch of each token's example."""
        counts = np.diff([*self.starts, len(self.taps[0])])
        return np.repeat(np.arange(len(self.starts)), counts)


class Pass(NamedTuple):
    """Scores [examples, heads, columns], and by tap what their gradient needs."""

    scores: Singles
    attention: list[Singles]
    values: list[Singles]


def forward(heads: Heads, tokens: Tokens, kept: NDArray[np.bool_] | None = None) -> Pass:
    """Return the scores of a batch; tokens that are not `kept` get no attention."""
    owner = tokens.examples
    scores = np.broadcast_to(heads.bias, (len(tokens.starts), *heads.bias.shape)).copy()
    attention, values = [], []
    for tap, query, weight in zip(tokens.taps, heads.queries, heads.weights, strict=True):
        at = product(tap, query) * np.float32(tap.shape[1] ** -0.5)
        if kept is not None:
            at[~kept] = _NEVER
        at = np.exp(at - np.maximum.reduceat(at, tokens.starts)[owner])
        at /= np.add.reduceat(at, tokens.starts)[owner]
        value = product(tap, weight)
        scores += np.add.reduceat(at * value, tokens.starts)
        attention.append(at)
        values.append(value)
    return Pass(scores, attention, values)


def gradient(found: Pass, tokens: Tokens, by_score: Singles) -> list[Singles]:
    """Return the gradient of the queries, by tap, from that of the scores [examples, heads, columns]."""
    owner = tokens.examples
    gradients = []
    for tap, attention, value in zip(tokens.taps, found.attention, found.values, strict=True):
        by_attention = value * by_score[owner]
        if attention.shape[2] == 1:
            by_attention = by_attention.sum(axis=2, keepdims=True)
        weighted = attention * by_attention
        slope = weighted - attention * np.add.reduceat(weighted, tokens.starts)[owner]
        gradients.append(product(np.ascontiguousarray(tap.T), slope) * np.float32(tap.shape[1] ** -0.5))
    return gradients


def learn(
    heads: Heads,
    states: TokenStates,
    layers: tuple[int, ...],
    targets: Floats,
    rows: Floats,
    others: Singles,
    loss: Loss,
    seed: int,
    told: Callable[[int, int], None],
) -> Heads:
    """Learn the queries by Adam.

    Parameters
    ----------
    heads : Heads
        Their queries are changed in place.
    states : TokenStates
    layers : tuple of int
        The taps.
    targets : ndarray, shape [examples, columns]
    rows : ndarray, shape [examples, heads]
        Positive where a head may learn from an example.
    others : ndarray, shape [examples, heads, columns]
        What else is added to the scores.
    loss : type
        One of :data:`LOSSES`.
    seed : int
        Of the order and the dropped tokens.
    told : callable
        Called with the number of batches that are done, and how many there are.
    """
    random = np.random.default_rng(seed)
    count = len(targets)
    per_epoch = -(-count // BATCH)
    steps = EPOCHS * per_epoch
    moments = [(np.zeros_like(query), np.zeros_like(query)) for query in heads.queries]
    step = 0
    for _ in range(EPOCHS):
        order = random.permutation(count)
        for at in range(0, count, BATCH):
            chosen = order[at : at + BATCH]
            numbers, starts = states.rows_of(chosen)
            tokens = Tokens([states.at(layer, numbers) for layer in layers], starts)
            kept = random.random(len(numbers)) >= DROPPED
            kept[starts] = True
            found = forward(heads, tokens, kept)
            scores = (found.scores + others[chosen]).astype(np.float64)
            by_score = loss.at(scores, targets[chosen, None]).gradient
            share = (rows[chosen] > 0).astype(np.float64)
            by_score *= (share / np.maximum(share.sum(axis=0), 1))[..., None]
            step += 1
            rate = _RATE * min(step / max(_WARM_UP * steps, 1), (steps - step) / ((1 - _WARM_UP) * steps), 1)
            for query, slope, moment in zip(
                heads.queries, gradient(found, tokens, by_score.astype(np.float32)), moments, strict=True
            ):
                _adam(query, slope, moment, rate, step)
            told(step, steps)
    return heads


def _adam(query: Singles, slope: Singles, moment: tuple[Singles, Singles], rate: float, step: int) -> None:
    first, second = moment
    first += np.float32(1 - _DECAY[0]) * (slope - first)
    second += np.float32(1 - _DECAY[1]) * (slope * slope - second)
    size = np.sqrt(second / np.float32(1 - _DECAY[1] ** step)) + np.float32(_EPSILON)
    query -= np.float32(rate / (1 - _DECAY[0] ** step)) * first / size


def product(states: Singles, by_head: Singles) -> Singles:
    """Multiply [rows, size] by [size, heads, columns]."""
    flat: Singles = states @ by_head.reshape(len(by_head), -1)
    return flat.reshape(len(states), *by_head.shape[1:])
