"""Run the backbone once over the data, and keep what the layers say about each token."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.data.dataset import Dataset, fixed_batch
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.side import SideHead
from pocketzo.runtime.onnx_proto import read_graph
from pocketzo.runtime.session import open_bytes
from pocketzo.runtime.subgraph import keep_values
from pocketzo.runtime.taps import Stream
from pocketzo.train.head.pooled import Pooling, poolings_of

BATCH: Final = 32
_MOST_STATES: Final = 8 << 20  # bytes of the states of a batch, which are in memory at once

Told = Callable[[int, int, float], None]
"""Called with how many examples are done, how many there are, and how many seconds the rest may take."""


class Backbone:
    """A session of the layers up to the last tap that is wanted.

    Parameters
    ----------
    bundle : Bundle
    layers : sequence of int
        The taps.
    threads : int
    stream : Stream, optional
        Of the bundle; by default that which its side head reads.
    """

    def __init__(self, bundle: Bundle, layers: Sequence[int], threads: int, stream: Stream | None = None) -> None:
        model = read_graph(bundle.model_path)
        self.layers = tuple(layers)
        taps = {tap.layer: tap for tap in (stream or Stream.of(bundle)).taps}
        self._taps = [taps[layer] for layer in layers]
        self._names = [tap.name for tap in self._taps]
        keep_values(model.graph, self._names, typed=False)
        self._session: ort.InferenceSession = open_bytes(model.SerializeToString(), bundle.path, threads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._fixed = fixed_batch(bundle)

    def run(self, data: Dataset, told: Told | None = None, rows: NDArray[np.int64] | None = None) -> Iterator[States]:
        """Yield the states of all examples, or of some, in batches of similar length, the longest first."""
        rows = np.arange(len(data)) if rows is None else rows
        lengths = np.ones(len(rows), np.int64) if data.lengths is None else data.lengths[rows]
        order = np.argsort(-lengths, kind="stable")
        total, done = int(lengths.sum()), 0
        began = time.perf_counter()
        start = 0
        while start < len(order):
            chosen = order[start : start + (self._fixed or self._fitting(int(lengths[order[start]])))]
            batch = data.batch(rows[chosen])
            feed = {name: array for name, array in batch.items() if name in self._inputs}
            values = self._session.run(self._names, feed)
            found = [tap.states(value) for tap, value in zip(self._taps, values, strict=True)]
            yield States(chosen, batch["attention_mask"] != 0, found)
            del values, found  # before the next ones are made
            start += len(chosen)
            done += int(lengths[chosen].sum())
            if told is not None:
                spent = time.perf_counter() - began
                told(start, len(order), spent * (total - done) / done)

    def _fitting(self, tokens: int) -> int:
        """Return how many examples of so many tokens are run at once."""
        return max(1, min(BATCH, _MOST_STATES // (4 * max(1, tokens) * sum(tap.size for tap in self._taps))))


class States(NamedTuple):
    """The states of some examples.

    Attributes
    ----------
    examples : ndarray of int64, shape [rows]
        Their numbers, among those that were asked for.
    real : ndarray of bool, shape [rows, tokens]
        Which tokens are no padding.
    taps : list of ndarray of float32, shape [rows, tokens, size]
    """

    examples: NDArray[np.int64]
    real: NDArray[np.bool_]
    taps: list[NDArray[np.float32]]

    def pooled(self, tap: int, pooling: Pooling) -> NDArray[np.float32]:
        """Return the mean over the tokens of each example, or the last token."""
        states = self.taps[tap]
        if pooling == "last":
            last = self.real.shape[1] - 1 - np.argmax(self.real[:, ::-1], axis=1)
            ends: NDArray[np.float32] = states[np.arange(len(states)), last]
            return ends
        share = self.real / self.real.sum(axis=1, keepdims=True)
        mean: NDArray[np.float32] = np.matmul(share[:, None].astype(np.float32), states)[:, 0]
        return mean

    def all_pooled(self, side: SideHead) -> dict[tuple[int, Pooling], NDArray[np.float32]]:
        """Return the pooled states, [rows, size], that a head may read, by layer and pooling."""
        return {
            (tap.layer, pooling): self.pooled(place, pooling)
            for place, tap in enumerate(side.taps)
            for pooling in poolings_of(side)
        }


class TokenStates:
    """The states of all tokens, float16 in temporary files that are mapped into memory.

    Parameters
    ----------
    layers : sequence of int
    sizes : sequence of int
        Of a token's state, by tap.
    lengths : ndarray of integers, shape [examples]
    folder : Path
        Where the files are; they have no name, and end with the process.

    Attributes
    ----------
    total : int
        How many tokens there are.
    """

    def __init__(self, layers: Sequence[int], sizes: Sequence[int], lengths: NDArray[np.integer], folder: Path) -> None:
        self._lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.total = int(self._lengths.sum())
        self._maps: dict[int, NDArray[np.float16]] = {}
        for layer, size in zip(layers, sizes, strict=True):
            with tempfile.TemporaryFile(dir=folder) as file:
                self._maps[layer] = np.memmap(file, np.float16, "w+", shape=(self.total, size))

    @classmethod
    def of(cls, lengths: NDArray[np.integer], maps: Mapping[int, NDArray[np.float16]]) -> TokenStates:
        """Return states that are there already: by layer, of all tokens, [tokens, size]."""
        found = cls.__new__(cls)
        found._lengths = lengths.astype(np.int64)
        found._starts = np.cumsum(found._lengths) - found._lengths
        found.total = int(found._lengths.sum())
        found._maps = dict(maps)
        return found

    @classmethod
    def joined(cls, parts: Sequence[TokenStates], folder: Path) -> TokenStates:
        """Return a copy of the states of several sets of examples, one after the other."""
        layers = [*parts[0]._maps]
        lengths = np.concatenate([part._lengths for part in parts])
        found = cls(layers, [parts[0].size(layer) for layer in layers], lengths, folder)
        for layer, states in found._maps.items():
            at = 0
            for part in parts:
                numbers, _ = part.rows_of(np.arange(len(part._lengths)))
                for chosen in np.array_split(numbers, -(-len(numbers) // 4096)):
                    states[at : at + len(chosen)] = part._maps[layer][chosen]
                    at += len(chosen)
        return found

    @property
    def nbytes(self) -> int:
        """Size of the states of these examples in bytes."""
        return int(self._lengths.sum()) * sum(2 * self.size(layer) for layer in self._maps)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each example has."""
        return self._lengths

    @property
    def maps(self) -> Mapping[int, NDArray[np.float16]]:
        """The memory, by layer."""
        return self._maps

    def take(self, examples: NDArray[np.int64]) -> TokenStates:
        """Return the states of some examples, in the same memory; tokens keep their numbers."""
        taken = copy(self)
        taken._lengths, taken._starts = self._lengths[examples], self._starts[examples]
        return taken

    def put(self, states: States) -> None:
        """Keep the states of some examples."""
        rows, _ = self.rows_of(states.examples)
        for kept, tap in zip(self._maps.values(), states.taps, strict=True):
            kept[rows] = tap[states.real]

    def rows_of(self, examples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the tokens of some examples, and where each example begins among them."""
        counts = self._lengths[examples]
        firsts = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(self._starts[examples] - firsts, counts), firsts

    def size(self, layer: int) -> int:
        """Return the size of a token's state."""
        return int(self._maps[layer].shape[1])

    def at(self, layer: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the states of some tokens, [tokens, size]."""
        return self._maps[layer][rows].astype(np.float32)
