"""What is kept of the examples that a head learns from: the backbone runs once for each.

They are personal data: a text can be guessed from them. So files of them are readable by their owner alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset
from pocketzo.errors import DataError, JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import map_tensors, write
from pocketzo.formats.side import tap_name
from pocketzo.train.head.pooled import Pooled, Pooling, poolings_of
from pocketzo.train.head.states import Backbone, TokenStates, Told

MOST_STATES: Final = 4_000_000_000
"""Bytes of token states on storage; where they would take more, only pooled states are kept."""

_LABELS: Final = "labels"
_LENGTHS: Final = "lengths"


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
    def of(
        cls,
        bundle: Bundle,
        data: Dataset,
        *,
        threads: int = 1,
        folder: Path | None,
        told: Told | None = None,
        backbone: Backbone | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> Self:
        """Run the backbone over a dataset.

        Parameters
        ----------
        bundle : Bundle
            With a side head.
        data : Dataset
            With labels.
        threads : int
        folder : Path or None
            For temporary files of token states; they have no name, and end with the process. None keeps pooled states
            alone.
        told : callable, optional
        backbone : Backbone, optional
            Of all taps; by default one is opened with so many threads.
        rows : ndarray of int64, optional
            The numbers of the examples; by default all.

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
        labels = data.label_values if rows is None else data.label_values[rows]
        lengths = data.lengths if rows is None or data.lengths is None else data.lengths[rows]
        pooled = {
            (layer, pooling): np.empty((len(labels), size), np.float32)
            for layer, size in zip(layers, sizes, strict=True)
            for pooling in poolings_of(side)
        }
        tokens = None
        if folder is not None and lengths is not None and 2 * sum(sizes) * int(lengths.sum()) <= MOST_STATES:
            tokens = TokenStates(layers, sizes, lengths, folder)
        for found in (backbone or Backbone(bundle, layers, threads)).run(data, told, rows):
            for key, states in found.all_pooled(side).items():
                pooled[key][found.examples] = states
            if tokens is not None:
                tokens.put(found)
        return cls(labels, pooled, tokens)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Kept:
        """Return some of the examples; token states are shared, not copied."""
        pooled = {key: array[rows] for key, array in self.pooled.items()}
        return Kept(self.labels[rows], pooled, None if self.tokens is None else self.tokens.take(rows))

    def save(self, path: Path) -> None:
        """Write a file that its owner alone may read."""
        arrays: dict[str, NDArray[Any]] = {_LABELS: self.labels}
        arrays |= {f"{tap_name(layer)}.{pooling}": array for (layer, pooling), array in self.pooled.items()}
        if self.tokens is not None:
            arrays[_LENGTHS] = self.tokens.lengths
            arrays |= {tap_name(layer): array for layer, array in self.tokens.maps.items()}
        path.touch(mode=0o600, exist_ok=False)
        write(path, arrays.items())
        path.chmod(0o600)

    @classmethod
    def read(cls, path: Path, bundle: Bundle) -> Self:
        """Read what :meth:`save` wrote; token states stay in the file.

        Raises
        ------
        JournalError
            It is not of this bundle.
        """
        side = bundle.side
        assert side is not None
        found = map_tensors(path)
        layers = [tap.layer for tap in side.taps]
        try:
            pooled = {
                (layer, pooling): np.array(found[f"{tap_name(layer)}.{pooling}"])
                for layer in layers
                for pooling in poolings_of(side)
            }
            tokens = None
            if _LENGTHS in found:
                tokens = TokenStates.of(found[_LENGTHS], {layer: found[tap_name(layer)] for layer in layers})
            return cls(np.array(found[_LABELS]), pooled, tokens)
        except KeyError as error:
            raise JournalError(
                f"{path}: no tensor {error} in it: not the examples of a head of {bundle.path}"
            ) from None

    @classmethod
    def joined(cls, parts: Sequence[Kept], folder: Path) -> Self:
        """Return the examples of several sets, one after the other; token states are copied to temporary files."""
        pooled = {key: np.concatenate([part.pooled[key] for part in parts]) for key in parts[0].pooled}
        states = [part.tokens for part in parts if part.tokens is not None]
        tokens = None
        if len(states) == len(parts) and sum(one.nbytes for one in states) <= MOST_STATES:
            tokens = TokenStates.joined(states, folder)
        return cls(np.concatenate([part.labels for part in parts]), pooled, tokens)

    def features(self) -> Pooled:
        """Return the pooled states as features."""
        return Pooled(self.pooled)
