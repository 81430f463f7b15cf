"""Examples for one model, returned in padded batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.data.batch import Batch
from pocketzo.errors import DataError
from pocketzo.formats.inputs import TOKEN_INPUTS, sections
from pocketzo.formats.past import at_beginning, is_flag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle, ValueSpec
    from pocketzo.tasks.base import Task

IMPLIED = {"attention_mask": 1, "token_type_ids": 0}  # the values of each token that the data leaves out


class Dataset:
    """Examples for one model, in file order. :func:`load_dataset` and :func:`encode_texts` create it.

    Attributes
    ----------
    label_ids : ndarray of int64, shape [n], or None
        The class number of each example; None without labels, or if labels are no classes of examples.
    lengths : ndarray of int32, shape [n], or None
        The number of tokens of each example, of the longest row if it has several; None for a model that takes no
        tokens.
    prompted : ndarray of bool, shape [n], or None
        Whether an example of a language model is a prompt, or a chat, that is followed by what counts; None if that is
        not known.
    labels : tuple of str or None
        The names of the classes; None if the bundle has none.
    cut : int
        The number of texts that were truncated to the model's maximum length.
    """

    def __init__(
        self,
        task: Task,
        source: str,
        size: int,
        tokens: Tokens | None,
        arrays: Mapping[str, NDArray[Any]],
        labels: Sequence[Any],
        lines: Sequence[int] | None = None,
        cut: int = 0,
    ) -> None:
        bundle = task.bundle
        self.cut = cut
        self._source = source
        self._lines = lines
        self.labels = bundle.labels
        self._labels = np.array(labels, task.label_dtype) if labels else None  # [n], or [n, columns]
        self.label_ids = self._labels if task.predicts == "classes" else None
        self.lengths = None if tokens is None else tokens.longest_rows
        self.prompted = None if tokens is None else tokens.prompted
        self._size = size
        self._tokens = tokens
        self._token_length = _token_length(bundle)
        self._arrays = arrays
        self._inputs: list[ValueSpec] = []
        self._past: list[ValueSpec] = []
        specs = [*bundle.inputs]
        if task.label_spec is not None and task.label_spec not in specs:  # metrics need labels that the graph does not
            specs.append(task.label_spec)
        for spec in specs:
            from_tokens = tokens is not None and (
                (spec.name in tokens.padding and is_by_token(spec)) or spec.name in tokens.places
            )
            if from_tokens or spec.name in arrays or (labels and spec == task.label_spec):
                self._inputs.append(spec)
            elif tokens is not None and at_beginning(spec, 1) is not None:
                self._past.append(spec)
            elif spec != task.label_spec:
                raise DataError(
                    f"{source}: nothing here can fill the model's input {spec.name!r} of shape {list(spec.shape)}"
                )

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        """Return the place of an example in its file, for messages."""
        place = f"row {index}" if self._lines is None else f"line {self._lines[index]}"
        return f"{self._source}, {place}"

    def batch(self, indices: NDArray[np.integer[Any]]) -> Batch:
        """Return the model's inputs for some of the examples.

        Parameters
        ----------
        indices
            The numbers of the examples, shape [batch], from 0; repetition is allowed.

        Returns
        -------
        Batch
            C-contiguous arrays [batch, ...] of the inputs' dtypes, by input name. All inputs are present, except
            ``labels`` if the data has none; labels that the data has are present even if the graph has no such input.
            Tokens are padded to the longest row of the batch, or to the model's fixed length if it has one. Other
            arrays with an axis of tokens are cut alike. Caches of past tokens that the data lacks are empty. Position
            ids of shape [sections, rows, length] are the same in each section, as they are for text.
            An example may have several rows: then ``row_examples`` [rows], which is no input, has the place in
            `indices` of each row's example.
            ``examples`` holds the `indices`.

        Raises
        ------
        ValueError
            `indices` is not a non-empty vector of integers, or one is out of range.
        DataError
            The model has a fixed batch size, and the number of `indices` differs from it.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(
                f"indices must be a non-empty vector of integers, got {indices.dtype} of shape {list(indices.shape)}"
            )
        if indices.min() < 0 or indices.max() >= self._size:
            raise ValueError(f"indices must be 0 to {self._size - 1}, got {indices.min()} to {indices.max()}")
        rows = indices if self._tokens is None else self._tokens.rows_of(indices)
        width = None if self._tokens is None else self._token_length or self._tokens.longest(rows)
        padded = {} if self._tokens is None or width is None else self._tokens.padded(rows, width)
        batch: dict[str, NDArray[Any]] = {}
        for spec in self._past:
            empty = at_beginning(spec, rows.size)
            if empty is not None:
                batch[spec.name] = empty
        for spec in self._inputs:
            if isinstance(spec.shape[0], int) and spec.shape[0] != rows.size and sections(spec) is None:
                raise DataError(
                    f"the model's input {spec.name!r} takes batches of exactly {spec.shape[0]}, got {rows.size}"
                )
            if spec.name in self._arrays:
                values = self._arrays[spec.name][indices]
                batch[spec.name] = values if self._tokens is None else self._tokens.cut(spec.name, values, width)
            elif spec.name in padded:
                values = padded[spec.name].astype(spec.dtype)
                repeats = sections(spec)
                batch[spec.name] = values if repeats is None else np.repeat(values[None], repeats, axis=0)
            elif self._labels is not None:
                batch[spec.name] = self._labels[indices].astype(spec.dtype)
        if self._tokens is not None and self._tokens.row_starts is not None:
            batch["row_examples"] = np.repeat(np.arange(indices.size), np.diff(self._tokens.row_starts)[indices])
        return Batch(batch, indices.astype(np.int64))

    @property
    def row_lengths(self) -> NDArray[np.int32] | None:
        """The number of tokens of each row of all examples; None for a model that takes no tokens."""
        return None if self._tokens is None else self._tokens.lengths

    def extremes(self) -> list[int]:
        """Return the numbers of the examples that hold the largest value of each integer input."""
        found = []
        if self._tokens is not None:
            starts = self._tokens.starts
            for values in self._tokens.columns.values():
                found.append(self._tokens.example_of(int(np.searchsorted(starts, values.argmax(), side="right")) - 1))
        for values in self._arrays.values():
            if values.dtype.kind in "iu" and values.size:
                found.append(int(values.argmax()) // (values.size // self._size))
        if self.label_ids is not None:
            found.append(int(self.label_ids.argmax()))
        return found

    @property
    def label_values(self) -> NDArray[Any] | None:
        """The labels of examples, of any kind: shape [n], or [n, columns]; None if there are none."""
        return self._labels

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokens, padding, other inputs and labels; independent of the file and its format."""
        digest = hashlib.sha256()
        content = [*self._arrays.items()]
        if self._tokens is not None:
            content += [*self._tokens.columns.items(), ("lengths", self._tokens.lengths)]
            digest.update(json.dumps([self._tokens.padding, self._tokens.pad_left]).encode())
            counted, rows = self._tokens.counted, self._tokens.row_starts
            content += [] if counted is None else [(f"counted, {self._tokens.shift}", counted)]
            content += [] if rows is None else [("row_starts", rows)]
        if self._labels is not None:
            content.append(("labels", self._labels))
        for name, values in sorted(content, key=lambda item: item[0]):
            digest.update(json.dumps([name, values.dtype.name, values.shape]).encode())
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """The tokens of all rows, concatenated. An example is a row, unless `row_starts` says otherwise."""

    lengths: NDArray[np.int32]  # [rows]
    columns: dict[str, NDArray[np.int32]]  # [sum of lengths] for each input that is not implied
    padding: dict[str, int]  # the padding value of each input, in the model's order
    pad_left: bool = False
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the axes of tokens of other inputs
    width: int | None = None  # the number of tokens of every batch, if it is not to be that of the longest example
    row_starts: NDArray[np.int64] | None = None  # [n + 1], the first row of each example, and the number of rows
    counted: NDArray[np.bool_] | None = None  # [sum of lengths]: whether the token counts; needs padding on the right
    shift: int = 0  # how far the position whose logits count is before the token that counts
    prompted: NDArray[np.bool_] | None = None  # [n]: whether an example is a prompt, followed by what counts

    @property
    def places(self) -> tuple[str, ...]:
        """The inputs that say which tokens of a batch count, if that is known."""
        return () if self.counted is None else ("positions", "targets")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The offset of each row's first token, shape [rows]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def longest_rows(self) -> NDArray[np.int32]:
        """The number of tokens of each example's longest row, shape [n]."""
        return self.lengths if self.row_starts is None else np.maximum.reduceat(self.lengths, self.row_starts[:-1])

    def rows_of(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Return the rows of some examples."""
        if self.row_starts is None:
            return indices
        return np.concatenate([np.arange(self.row_starts[i], self.row_starts[i + 1]) for i in indices])

    def example_of(self, row: int) -> int:
        """Return the example that a row belongs to."""
        return row if self.row_starts is None else int(np.searchsorted(self.row_starts, row, side="right")) - 1

    def longest(self, rows: NDArray[Any]) -> int:
        """Return the number of tokens of a batch."""
        return self.width or int(self.lengths[rows].max())

    def cut(self, name: str, values: NDArray[Any], width: int | None) -> NDArray[Any]:
        """Return another input of a batch with its axes of tokens cut to `width`."""
        axes = self.axes.get(name, ())
        return np.ascontiguousarray(values[tuple(slice(width if i in axes else None) for i in range(values.ndim))])

    def padded(self, rows: NDArray[Any], width: int) -> dict[str, NDArray[np.int64]]:
        """Return each input as [rows, width], and, where it is known what counts, ``positions`` and ``targets`` [n].

        A position is row * width + column; the logits there are those that count. Its target is the token that counts.
        """
        lengths = self.lengths[rows][:, None]
        position = np.arange(width) - (width - lengths) * self.pad_left  # within the example; [batch, width]
        inside = (position >= 0) & (position < lengths)
        source = (self.starts[rows][:, None] + position)[inside]
        padded = {}
        for name, fill in self.padding.items():
            padded[name] = np.full(inside.shape, fill, np.int64)
            if name in self.columns:
                padded[name][inside] = self.columns[name][source]
            else:
                padded[name][inside] = position[inside] if name == "position_ids" else IMPLIED[name]
        if self.counted is not None:
            places = np.flatnonzero(inside)[self.counted[source]]
            padded["positions"] = places - self.shift
            padded["targets"] = self.columns["input_ids"][source[self.counted[source]]].astype(np.int64)
        return padded


def is_by_token(spec: ValueSpec) -> bool:
    """Whether an input has the shape of the tokens, [batch, length], or repeats it by sections."""
    return len(spec.shape) == 2 or sections(spec) is not None


def fixed_batch(bundle: Bundle) -> int | None:
    """Return the number of examples that a model takes at once; None if it may vary."""
    inputs = (spec for spec in bundle.inputs if spec.shape and not is_flag(spec) and sections(spec) is None)
    return next((spec.shape[0] for spec in inputs if isinstance(spec.shape[0], int)), None)


def _token_length(bundle: Bundle) -> int | None:
    """Return the fixed number of tokens that a model takes; None if the number may vary."""
    shapes = [spec.shape for spec in bundle.inputs if spec.name in TOKEN_INPUTS and len(spec.shape) == 2]
    return next((shape[1] for shape in shapes if isinstance(shape[1], int)), None)


def token_limit(bundle: Bundle) -> int | None:
    """Return the maximum number of tokens of an example; None if there is no limit."""
    return min((length for length in (bundle.max_length, _token_length(bundle)) if length is not None), default=None)
