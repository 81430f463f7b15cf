"""What is kept of the examples that a head learns from: the backbone runs once for each.

They are personal data: a text can be guessed from them. So files of them are readable by their owner alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset
from pocketzo.errors import DataError
from pocketzo.formats.bundle import Bundle
from pocketzo.train.head.pooled import Pooled, Pooling
from pocketzo.train.head.states import Backbone, TokenStates, Told

MOST_STATES: Final = 4_000_000_000
"""Bytes of token states on storage; where they would take more, only pooled states are kept."""


@dataclass(frozen=True)
class Kept:
    """States and labels of examples.

    Attributes
    ----------
    labels : ndarray, shape [rows] or [rows, columns]
    pooled : dict of (int, str) to ndarray of float32, shape [rows, size]
        By layer and pooling.
    tokens : TokenStates or None
        None if they would take more than :data:`MOST_STATES`.
    """

    labels: NDArray[Any]
    pooled: dict[tuple[int, Pooling], NDArray[np.float32]]
    tokens: TokenStates | None

    @classmethod
    def of(cls, bundle: Bundle, data: Dataset, *, threads: int, folder: Path, told: Told | None = None) -> Self:
        """Run the backbone over a dataset.

        Parameters
        ----------
        bundle : Bundle
            With a side head.
        data : Dataset
            With labels.
        threads : int
        folder : Path
            For temporary files of token states; they have no name, and end with the process.
        told : callable, optional

        Raises
        ------
        DataError
            There are no labels.
        """
        side = bundle.side
        assert side is not None
        if data.label_values is None:
            raise DataError("the training data has no labels, which a head learns")
        layers = [tap.layer for tap in side.taps]
        sizes = [tap.size for tap in side.taps]
        poolings: tuple[Pooling, ...] = ("mean", "last") if side.causal else ("mean",)
        pooled = {
            (layer, pooling): np.empty((len(data), size), np.float32)
            for layer, size in zip(layers, sizes, strict=True)
            for pooling in poolings
        }
        tokens = None
        if data.lengths is not None and 2 * sum(sizes) * int(data.lengths.sum()) <= MOST_STATES:
            tokens = TokenStates(layers, sizes, data.lengths, folder)
        for found in Backbone(bundle, layers, threads).run(data, told):
            for (layer, pooling), array in pooled.items():
                array[found.examples] = found.pooled(layers.index(layer), pooling)
            if tokens is not None:
                tokens.put(found)
        return cls(data.label_values, pooled, tokens)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Kept:
        """Return some of the examples; token states are shared, not copied."""
        pooled = {key: array[rows] for key, array in self.pooled.items()}
        return Kept(self.labels[rows], pooled, None if self.tokens is None else self.tokens.take(rows))

    def features(self) -> Pooled:
        """Return the pooled states as features."""
        return Pooled(self.pooled)
