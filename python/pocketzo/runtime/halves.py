"""A session of a graph that is cut: what the front computes for an example is computed once and kept."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import NotCuttableError
from pocketzo.formats.inputs import TOKEN_INPUTS, row_axis
from pocketzo.machine.memory import trim_heap
from pocketzo.runtime.cut import Cut, Kept
from pocketzo.runtime.measure import ALL_TOKENS, TOKENS
from pocketzo.runtime.outputs import probe_batch
from pocketzo.runtime.session import Session

Feed = Mapping[str, NDArray[Any]]
Values = Sequence[NDArray[Any]]
"""The values at the cut of one example, in the order of :attr:`Cut.values`."""

_IN_MEMORY: Final = 64 << 20  # bytes, which hold a batch of most models
_ROUNDINGS: Final = 1e-4  # of the largest value, between rows that are padded and rows that are not


class Store(Protocol):
    """Where the values of examples are kept."""

    def get(self, key: bytes) -> Values | None:
        """Return the values of an example; None if there are none."""

    def put(self, key: bytes, tokens: int, values: Values) -> Values:
        """Keep the values of an example of so many tokens, if there is room; return them as they will be read."""

    def flush(self) -> None:
        """Put on storage what is in memory only."""


class InMemory:
    """Keeps the values of the examples that were used last.

    Parameters
    ----------
    most : int
        Bytes.
    """

    def __init__(self, most: int = _IN_MEMORY) -> None:
        self._most = most
        self._size = 0
        self._kept: OrderedDict[bytes, Values] = OrderedDict()

    def get(self, key: bytes) -> Values | None:
        """Return the values of an example; None if there are none."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: bytes, tokens: int, values: Values) -> Values:
        """Keep the values of an example in place of those that were not used for the longest time."""
        del tokens
        self._kept[key] = values
        self._size += sum(value.nbytes for value in values)
        while self._size > self._most:
            _, gone = self._kept.popitem(last=False)
            self._size -= sum(value.nbytes for value in gone)
        return values

    def flush(self) -> None:
        """Do nothing: there is no storage."""


class Halves:
    """A session that runs the back on values which are kept, and the front for examples of which there are none.

    An example is known by its row of the front's inputs, without the padding behind it: rows of the same tokens have
    the same values, in whichever batch, run or data file they are.

    Parameters
    ----------
    cut : Cut
    open_front : callable
        Creates the front's session, when it is needed.
    back : Session

    Attributes
    ----------
    store : Store
        By default some memory.
    computed : int
        Rows of which the front was run.
    seconds : float
        That it took.
    """

    def __init__(self, cut: Cut, open_front: Callable[[], ort.InferenceSession], back: Session) -> None:
        self.cut = cut
        self.store: Store = InMemory()
        self.computed = 0
        self.seconds = 0.0
        self._open_front = open_front
        self._front: ort.InferenceSession | None = None
        self._back = back
        self._names = [kept.name for kept in cut.values]
        self._inputs: frozenset[str] | None = None
        self._specs = {spec.name: spec for spec in cut.bundle.inputs}
        self._row_axes = {spec.name: row_axis(spec) for spec in cut.bundle.inputs}

    def release(self) -> None:
        """Close the front's session, which is created anew if it is needed again."""
        self._front = None
        trim_heap()

    def run(self, names: list[str] | None, feed: Feed, options: ort.RunOptions | None = None, /) -> list[NDArray[Any]]:
        """Return outputs by their names, as a session of the whole graph does."""
        names = [value.name for value in self.cut.bundle.outputs] if names is None else names
        found: dict[str, NDArray[Any]] = {}
        if others := [name for name in names if name in self.cut.others]:
            given = {name: array for name, array in feed.items() if name in self._front_inputs()}
            found.update(zip(others, self._opened().run(others, given, options), strict=True))
        if rest := [name for name in names if name not in found]:
            given = {name: array for name, array in feed.items() if name not in self.cut.unread}
            given |= dict(zip(self._names, self.values(feed, options), strict=True))
            found.update(zip(rest, self._back.run(rest, given, options), strict=True))
        return [found[name] for name in names]

    def values(self, feed: Feed, options: ort.RunOptions | None = None) -> list[NDArray[Any]]:
        """Return the values at the cut for a batch; those at padding are zeros."""
        lengths, width = self._lengths(feed)
        keys = self._keys(feed, lengths)
        found = {key: self.store.get(key) for key in dict.fromkeys(keys)}
        missing = [key for key, values in found.items() if values is None]
        if missing:
            rows = np.array([keys.index(key) for key in missing])
            for key, row, values in zip(missing, rows, self._computed(feed, rows, lengths, options), strict=True):
                found[key] = self.store.put(key, int(lengths[row]), values)
        joined = []
        for place, kept in enumerate(self.cut.values):
            rows_of = [found[key] for key in keys]
            joined.append(_joined(kept, [values[place] for values in rows_of if values is not None], width))
        return joined

    def fill(self, feed: Feed) -> None:
        """Compute and keep the values of a batch's examples that are not kept yet."""
        self.values(feed)

    def check_rows(self) -> None:
        """Check that neither other rows of a batch nor padding behind a row change its values.

        Raises
        ------
        NotCuttableError
            They do.
        """
        probe = probe_batch(self.cut.bundle)
        lengths, width = self._lengths(probe)
        if "attention_mask" not in probe or len(lengths) < 1 or width < 2 or self._is_fixed():
            return
        half = width // 2
        whole = {name: np.take(array, [0, 0], self._row_axes[name]) for name, array in self._own(probe).items()}
        whole["attention_mask"] = np.ones_like(whole["attention_mask"])
        part = {
            name: np.ascontiguousarray(np.take(array, [0], self._row_axes[name])[..., :half])
            if name in TOKEN_INPUTS
            else np.take(array, [0], self._row_axes[name])
            for name, array in whole.items()
        }
        padded = {name: array.copy() for name, array in whole.items()}
        for name in TOKEN_INPUTS:
            if name in padded:
                padded[name][..., 1, half:] = 0
        (alone,) = self._computed(part, np.array([0]), np.array([half]), None)
        _, beside = self._computed(padded, np.array([0, 1]), np.array([width, half]), None)
        for kept, one, other in zip(self.cut.values, alone, beside, strict=True):
            largest = float(np.abs(one.astype(np.float64)).max(initial=0))
            off = float(np.abs(one.astype(np.float64) - other).max(initial=0))
            if not off <= _ROUNDINGS * largest:
                raise NotCuttableError(
                    f"{self.cut.bundle.path}: {kept.name} of an example changes by {off:.3g} (of {largest:.3g}) with "
                    "the padding or with other examples of its batch, so that it cannot be kept"
                )

    # ---- the front ----

    def _opened(self) -> ort.InferenceSession:
        if self._front is None:
            self._front = self._open_front()
            self._inputs = frozenset(value.name for value in self._front.get_inputs())
        return self._front

    def _front_inputs(self) -> frozenset[str]:
        if self._inputs is None:
            self._opened()
        assert self._inputs is not None
        return self._inputs

    def _own(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Return the front's inputs, and the mask, which says where rows end."""
        own = self._front_inputs() | {"attention_mask"}
        return {name: array for name, array in feed.items() if name in own and name in self._specs}

    def _is_fixed(self) -> bool:
        specs = [spec for name, spec in self._specs.items() if name in TOKEN_INPUTS]
        return any(isinstance(spec.shape[-1], int) or isinstance(spec.shape[-2], int) for spec in specs)

    def _lengths(self, feed: Feed) -> tuple[NDArray[np.int64], int]:
        """Return the number of tokens of each row up to the last one that is no padding, and that of the batch."""
        own = self._own(feed)
        tokens = next((own[name] for name in TOKEN_INPUTS if name in own), None)
        if tokens is None or tokens.ndim < 2:
            sizes = [array.shape[self._row_axes[name]] for name, array in own.items() if self._has_rows(name)]
            return np.ones(max(sizes, default=1), np.int64), 1
        rows, width = tokens.shape[-2:]
        if "attention_mask" not in own or own["attention_mask"].shape != (rows, width):
            return np.full(rows, width), width
        real = own["attention_mask"] != 0
        return np.where(real.any(axis=1), width - np.argmax(real[:, ::-1], axis=1), width), width

    def _has_rows(self, name: str) -> bool:
        shape = self._specs[name].shape
        return len(shape) > self._row_axes[name] and shape != (1,)  # a flag

    def _keys(self, feed: Feed, lengths: NDArray[np.int64]) -> list[bytes]:
        own = self._own(feed)
        common = hashlib.blake2b(digest_size=16)
        rows: list[tuple[NDArray[Any], bool]] = []
        for name, array in sorted(own.items()):
            by_row = self._has_rows(name) and array.shape[self._row_axes[name]] == len(lengths)
            by_token = by_row and name in TOKEN_INPUTS
            shape = "tokens" if by_token else (array.shape[1:] if by_row else array.shape)
            common.update(f"{name} {array.dtype} {shape}\n".encode())
            if by_row:
                rows.append((np.moveaxis(array, self._row_axes[name], 0), by_token))
            else:
                common.update(np.ascontiguousarray(array).tobytes())
        keys = []
        for row, length in enumerate(lengths.tolist()):
            digest = common.copy()
            digest.update(length.to_bytes(8, "little"))
            for array, by_token in rows:
                digest.update(np.ascontiguousarray(array[row][..., :length] if by_token else array[row]).tobytes())
            keys.append(digest.digest())
        return keys

    def _computed(
        self, feed: Feed, rows: NDArray[np.int64], lengths: NDArray[np.int64], options: ort.RunOptions | None
    ) -> list[Values]:
        """Run the front, and return the values of some rows without those at padding."""
        session = self._opened()
        given = {name: array for name, array in feed.items() if name in self._front_inputs()}
        total, at = len(lengths), rows
        fixed = any(isinstance(self._specs[name].shape[self._row_axes[name]], int) for name in given)
        if len(rows) < total and not fixed:
            given = {
                name: np.take(array, rows, self._row_axes[name])
                if self._has_rows(name) and array.shape[self._row_axes[name]] == total
                else array
                for name, array in given.items()
            }
            at = np.arange(len(rows))
        began = time.perf_counter()
        arrays = session.run(self._names, given, options)
        self.seconds += time.perf_counter() - began
        self.computed += len(rows)
        count = len(rows) if at is not rows else total
        found: list[Values] = []
        for place, row in zip(at.tolist(), rows.tolist(), strict=True):
            length = int(lengths[row])
            found.append(
                [_row(kept, array, place, count, length) for kept, array in zip(self.cut.values, arrays, strict=True)]
            )
        return found


def _row(kept: Kept, array: NDArray[Any], row: int, rows: int, length: int) -> NDArray[Any]:
    """Return a copy of the value of one row, without what is at padding."""
    if kept.sizes.axes[0] == ALL_TOKENS:
        width = array.shape[0] // rows
        own: NDArray[Any] = array[row * width : row * width + length]
        return own.copy()
    cut = tuple(slice(length if axis == TOKENS else None) for axis in kept.sizes.axes[1:])
    part: NDArray[Any] = array[row][cut]
    return part.copy()


def _joined(kept: Kept, rows: Sequence[NDArray[Any]], width: int) -> NDArray[Any]:
    """Return the value of a batch from those of its rows."""
    flat = kept.sizes.axes[0] == ALL_TOKENS
    whole = np.zeros((len(rows), *kept.shape_of(width)), kept.sizes.dtype)
    for place, row in enumerate(rows):
        whole[place][tuple(map(slice, row.shape))] = row
    return whole.reshape(len(rows) * width, *whole.shape[2:]) if flat else whole
