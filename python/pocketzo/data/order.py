"""Which examples each step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.bundle import ORDER_ID
from pocketzo.kernels import noise


class Data(Protocol):
    """What training reads: examples by number, as inputs of the graph. :class:`pocketzo.Dataset` is one."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes with the content."""

    def batch(self, indices: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return the numbered examples as the graph's inputs.

        :class:`Trainer` asks for a step's batch from another thread, while the step before it runs and never beyond. So
        it must not look at the model, whose weights are shifted meanwhile.
        """


class Order:
    """Which examples each step takes, a function of the arguments alone.

    The data is gone through again and again, each time in another order; a batch may straddle two of them. With
    ``lengths``, shape [size], all other batches are of examples of similar length.
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
            if len(self._epochs) > 1:  # a batch needs two at most, unless it is larger than the data
                self._epochs.clear()
            # Our own noise: numpy does not promise its permutations from one version to the next.
            order = np.argsort(self._noise(self._size, epoch), kind="stable")
            if self._lengths is not None:
                self._group(order, epoch, self._lengths)
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def _group(self, order: NDArray[np.int64], epoch: int, lengths: NDArray[np.integer[Any]]) -> None:
        """Sort by length within stretches of many batches, then shuffle the batches."""
        first = -epoch * self._size % self._batch_size  # those before it end a batch of the epoch before
        count = max(0, self._size - first) // self._batch_size
        whole = order[first : first + count * self._batch_size]
        stretch = max(1, min(50, count // 4)) * self._batch_size
        whole[:] = whole[np.lexsort((lengths[whole], np.arange(whole.size) // stretch))]
        shuffled = np.argsort(self._noise(count, epoch, self._size), kind="stable")
        whole[:] = whole.reshape(count, self._batch_size)[shuffled].ravel()

    def _noise(self, n: int, epoch: int, offset: int = 0) -> NDArray[np.float32]:
        return noise(n, seed=self._seed, tensor=ORDER_ID, draw=epoch, offset=offset)
