"""The order of the data: which examples each step uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.bundle import ORDER_ID
from pocketzo.kernels import noise

BATCH_SIZE: Final = 16
"""Examples of a step by default."""


class Data(Protocol):
    """The interface of training data: numbered examples, returned as inputs of the graph, as in :class:`Dataset`."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A string that changes with the content."""

    def batch(self, indices: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return the numbered examples as the graph's inputs.

        :class:`Trainer` calls this for the next step from another thread while the current step runs, and waits for it
        after the step. An implementation must not read the model, because its weights are perturbed during that time.
        """


class Order:
    """The examples of each step, a function of the arguments alone.

    Each epoch visits all examples in a new order. A batch may contain the end of one epoch and the start of the next.
    With ``lengths``, shape [size], all other batches hold examples of similar length.
    """

    def __init__(
        self, *, seed: int, size: int, batch_size: int, lengths: NDArray[np.integer[Any]] | None = None
    ) -> None:
        self._seed = seed
        self._size = size
        self._batch_size = batch_size
        self._lengths = lengths
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Return the numbers of the examples of one step."""
        at, end = step * self._batch_size, (step + 1) * self._batch_size
        pieces = []
        while at < end:
            epoch, start = divmod(at, self._size)
            pieces.append(self._epoch(epoch)[start : start + end - at])
            at += pieces[-1].size
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch needs at most two epochs, unless it is larger than the data
                self._epochs.clear()
            # PocketZO's noise, because numpy does not guarantee the same permutations in every version.
            order = np.argsort(self._noise(self._size, epoch), kind="stable")
            if self._lengths is not None:
                self._group(order, epoch, self._lengths)
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def _group(self, order: NDArray[np.int64], epoch: int, lengths: NDArray[np.integer[Any]]) -> None:
        """Sort by length within runs of up to 50 batches, then shuffle the batches."""
        first = -epoch * self._size % self._batch_size  # earlier ones complete the last batch of the previous epoch
        count = max(0, self._size - first) // self._batch_size
        whole = order[first : first + count * self._batch_size]
        stretch = max(1, min(50, count // 4)) * self._batch_size
        whole[:] = whole[np.lexsort((lengths[whole], np.arange(whole.size) // stretch))]
        shuffled = np.argsort(self._noise(count, epoch, self._size), kind="stable")
        whole[:] = whole.reshape(count, self._batch_size)[shuffled].ravel()

    def _noise(self, n: int, epoch: int, offset: int = 0) -> NDArray[np.float32]:
        return noise(n, seed=self._seed, tensor=ORDER_ID, draw=epoch, offset=offset)
