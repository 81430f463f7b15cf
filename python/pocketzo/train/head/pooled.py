"""Pooled features of the training data: standardised, and turned so that products with them are few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.side import SideHead
from pocketzo.train.head.losses import Floats

Pooling = Literal["mean", "last"]
POOLINGS: Final[Mapping[str, tuple[Pooling, ...]]] = {"mean": ("mean",), "last": ("last",), "both": ("mean", "last")}
"""What a head reads of each tap: the mean over the tokens, the last token, or both."""

LEAST_DEVIATION: Final = 0.02
"""A standard deviation that is less counts as this: that of one feature of MiniLM is 8e-33."""
_LEAST_VARIANCE: Final = 1e-12
"""Directions with a smaller share of the largest variance are left out."""
_MOST_PRODUCTS: Final = 8
"""Matrices [rows, rows] that are kept for the next choice: those of one choice of taps."""


def poolings_of(side: SideHead) -> tuple[Pooling, ...]:
    """Return how the states of a model may be pooled: the last token alone says something in causal ones only."""
    return POOLINGS["both" if side.causal else "mean"]


class Features(NamedTuple):
    """The features of some taps, and their place among the states.

    Attributes
    ----------
    layers : tuple of int
    pooling : {"mean", "last", "both"}
    """

    layers: tuple[int, ...]
    pooling: str

    @property
    def keys(self) -> list[tuple[int, Pooling]]:
        """The layer and the pooling of each of the features."""
        return [(layer, pooling) for layer in self.layers for pooling in POOLINGS[self.pooling]]

    @property
    def text(self) -> str:
        """For people, such as ``layers 3 to 5, mean over tokens``."""
        first, last = self.layers[0], self.layers[-1]
        name = f"layer {last}" if first == last else f"layers {first} to {last}"
        parts = {"mean": "mean over tokens", "last": "last token", "both": "mean over tokens and last token"}
        return f"{name}, {parts[self.pooling]}"


@dataclass(frozen=True)
class Standard:
    """The mean of features, and the standard deviation that they are divided by, both of shape [size]."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> Self:
        """Return those of features [rows, size]."""
        wide = features.astype(np.float64)
        return cls(wide.mean(axis=0), np.maximum(wide.std(axis=0), LEAST_DEVIATION))

    def __call__(self, features: NDArray[np.float32]) -> Floats:
        """Return standardised features."""
        result: Floats = (features - self.mean) / self.deviation
        return result


class Basis(NamedTuple):
    """Features [rows, directions] along principal directions of standardised ones, and the way back.

    A penalty on the squares of weights is the same in both, so that a model of one is a model of the other.
    """

    x: Floats
    back: list[Floats]  # by tap, [size, directions]
    joint: bool = False  # whether the directions are those of all taps together

    @classmethod
    def joined(cls, bases: Sequence[Basis]) -> Basis:
        """Return the features of several taps, each along its own directions."""
        return cls(np.concatenate([one.x for one in bases], axis=1), [back for one in bases for back in one.back])

    def by_tap(self, weight: Floats) -> list[Floats]:
        """Return the weights of standardised features, by tap, for weights [directions, ...]."""
        if self.joint:
            return [np.tensordot(one, weight, axes=1) for one in self.back]
        edges = np.cumsum([back.shape[1] for back in self.back])[:-1]
        return [np.tensordot(one, part, axes=1) for one, part in zip(self.back, np.split(weight, edges), strict=True)]


class Pooled:
    """The pooled states of the training data, by layer and pooling.

    Parameters
    ----------
    states : mapping of (int, str) to ndarray of float32, shape [rows, size]
        By layer and pooling.
    """

    def __init__(self, states: Mapping[tuple[int, Pooling], NDArray[np.float32]]) -> None:
        self._states = states
        self._standard = {key: Standard.of(array) for key, array in states.items()}
        self._bases: dict[tuple[int, Pooling], Basis] = {}
        self._kernels: dict[tuple[int, Pooling], Floats] = {}
        self.rows = len(next(iter(states.values())))

    def states(self, layer: int, pooling: Pooling) -> NDArray[np.float32]:
        """Return the pooled states of a layer, [rows, size]."""
        return self._states[layer, pooling]

    def standard(self, features: Features) -> list[Standard]:
        """Return what each part of the features was standardised by."""
        return [self._standard[key] for key in features.keys]

    def basis(self, features: Features) -> Basis:
        """Return the features of some taps, along as many principal directions as there are rows at most."""
        keys = features.keys
        if sum(self._states[key].shape[1] for key in keys) <= self.rows:
            return Basis.joined([self._basis_of(*key) for key in keys])
        products = sum((self._products(*key) for key in keys), np.zeros((self.rows, self.rows)))
        x, turned = _directions(products)
        return Basis(x, [self._standardised(*key).T @ turned for key in keys], joint=True)

    def _standardised(self, layer: int, pooling: Pooling) -> Floats:
        return self._standard[layer, pooling](self._states[layer, pooling])

    def _products(self, layer: int, pooling: Pooling) -> Floats:
        """Return the products of all rows of a tap's standardised features."""
        key = layer, pooling
        if key not in self._kernels:
            wide = self._standardised(*key)
            while len(self._kernels) >= _MOST_PRODUCTS:
                del self._kernels[next(iter(self._kernels))]
            self._kernels[key] = wide @ wide.T
        return self._kernels[key]

    def _basis_of(self, layer: int, pooling: Pooling) -> Basis:
        key = layer, pooling
        if key not in self._bases:
            wide = self._standardised(*key)
            values, vectors = np.linalg.eigh(wide.T @ wide)
            kept = values > _LEAST_VARIANCE * values[-1]
            self._bases[key] = Basis(wide @ vectors[:, kept], [vectors[:, kept]])
        return self._bases[key]


def _directions(products: Floats) -> tuple[Floats, Floats]:
    """Return features of rows whose products are these, and what takes the transposed features to their directions."""
    values, vectors = np.linalg.eigh(products)
    kept = values > _LEAST_VARIANCE * values[-1]
    roots = np.sqrt(values[kept])
    return vectors[:, kept] * roots, vectors[:, kept] / roots
