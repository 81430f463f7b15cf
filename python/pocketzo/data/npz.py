"""Examples from ``.npz`` files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.data.columns import Columns, LineError, find_column, missing_column
from pocketzo.data.dataset import Dataset, Tokens, token_limit
from pocketzo.data.examples import Problems
from pocketzo.data.sequences import Sequences
from pocketzo.data.tokens import keep_tokens
from pocketzo.errors import DataError
from pocketzo.formats.inputs import TOKEN_INPUTS
from pocketzo.formats.npz import read_arrays
from pocketzo.runtime.embeddings import embedding_rows
from pocketzo.runtime.padding import COUNTING, pads_right_only
from pocketzo.tasks.base import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import ValueSpec
    from pocketzo.tasks.base import Task


def read_npz(path: Path, task: Task, columns: Columns, require_labels: bool) -> Dataset:
    """Read the examples of an ``.npz`` file."""
    if task.several_rows:
        raise DataError(f"{path}: an example of the task {task.name!r} has several rows: write the data as .jsonl")
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    specs = {spec.name: spec for spec in task.bundle.inputs}
    has_labels = task.label_spec is not None
    label_names = task.columns.get("label", ())
    try:
        label_name = find_column(arrays, columns.label, label_names) if has_labels else None
    except LineError as error:
        raise DataError(f"{path}: {error}") from None
    has_tokens = "input_ids" in arrays and arrays["input_ids"].ndim == 2
    rows = {name: len(values) if np.ndim(values) else 0 for name, values in arrays.items()}
    size = next(iter(rows.values()), 0)
    if not size:
        raise DataError(f"{path}: no examples")
    for name, count in rows.items():
        if count != size:
            raise DataError(f"{path}: array {name!r} has {count} rows, {next(iter(rows))!r} has {size}")
        known = name in specs or name == label_name or (name == "labels" and task.labels_per == "nothing")
        if not known and not (has_tokens and name in TOKEN_INPUTS):
            raise DataError(f"{path}: array {name!r} is no input of the model, which takes {', '.join(specs)}")
    marks = arrays.pop("labels") if task.labels_per == "nothing" and "labels" in arrays else None
    if label_name not in (None, "labels") and "labels" in arrays:
        raise DataError(f"{path}: arrays {label_name!r} and 'labels' both hold labels: name one by --label-column")
    if label_name is None and require_labels and has_labels and label_names:
        raise DataError(f"{path}: {missing_column(arrays, columns.label, label_names, 'label')}")

    problems = Problems(str(path), "row")
    labels: list[int] = []
    if label_name is not None and task.labels_per == "token":
        arrays["labels"] = _labels_by_token(path, task, arrays.pop(label_name), problems)
    elif label_name is not None:
        for row, label in enumerate(arrays.pop(label_name).tolist()):
            try:
                labels.append(task.label_row(label))
            except LineError as error:
                problems.add(row, str(error))
    if task.label_spec is not None:
        specs["labels"] = task.label_spec
    sequence = Sequences.of(path, task, specs, arrays) if has_tokens else None
    tokens = None if sequence is None else _tokens(arrays, task, problems, sequence, marks)
    arrays = {name: _checked(path, specs[name], values, problems, sequence) for name, values in arrays.items()}
    problems.check()
    return Dataset(task, str(path), size, tokens, arrays, labels)


def _labels_by_token(path: Path, task: Task, labels: NDArray[Any], problems: Problems) -> NDArray[Any]:
    if labels.dtype.kind not in "iu" or labels.ndim != 2:
        raise DataError(
            f"{path}: array 'labels' must be integers [n, length], a class number or {IGNORED} by token, found "
            f"{labels.dtype} of shape {list(labels.shape)}"
        )
    most = 2**31 if task.class_count is None else task.class_count
    bad = (labels != IGNORED) & ((labels < 0) | (labels >= most))
    for row in np.flatnonzero(bad.any(axis=1)):
        at = int(bad[row].argmax())
        problems.add(
            int(row),
            f"unknown label {labels[row, at]} at position {at}: expected 0 to {most - 1}, or {IGNORED} where there is "
            "none",
        )
    return labels


def _tokens(
    arrays: dict[str, NDArray[Any]],
    task: Task,
    problems: Problems,
    sequence: Sequences,
    marks: NDArray[Any] | None,
) -> Tokens:
    """Take what is by token out of `arrays`, cut after the last token of each row that the mask keeps.

    ``marks`` is -100, or the token, where a token does not count, or does, in the loss of a language model.
    """
    given = {name: arrays.pop(name) for name in sequence.by_token}
    shape = given["input_ids"].shape
    rows = embedding_rows(task.bundle)
    for name, values in given.items():
        if _is_mask_of_floats(task, name, values):
            values = given[name] = values.astype(np.int8)
        if values.shape != shape or values.dtype.kind not in "iub" or not values.size:
            raise DataError(
                f"{problems.source}: array {name!r} must be integers [n, length], the same for all of a model's token "
                f"inputs, found {values.dtype} of shape {list(values.shape)}, and 'input_ids' of {list(shape)}"
            )
        top = 1 if name == "attention_mask" else rows.get(name, 2**31) - 1
        bad = np.zeros(shape, bool) if name == "labels" else (values < 0) | (values > top)
        known = f": the model's embedding has {rows[name]} rows" if name in rows else ""
        for row in np.flatnonzero(bad.any(axis=1)):
            at = int(bad[row].argmax())
            problems.add(int(row), f"{name!r} must be 0 to {top}, found {values[row, at]} at position {at}{known}")
    mask = given.get("attention_mask", np.ones(shape)) != 0
    lengths = (shape[1] - np.argmax(mask[:, ::-1], axis=1)).astype(np.int32)
    for row in np.flatnonzero(~mask.any(axis=1)):
        problems.add(int(row), "'attention_mask' keeps no token")
    if not mask[:, 0].all() and pads_right_only(task.bundle):
        for row in np.flatnonzero(~mask[:, 0] & mask.any(axis=1)):
            problems.add(
                int(row), f"'attention_mask' begins with padding, and the model's {COUNTING} needs it at the end"
            )
    longest = token_limit(task.bundle)
    if longest is not None:
        for row in np.flatnonzero(lengths > longest):
            problems.add(int(row), f"{lengths[row]} tokens, the model takes at most {longest}")
    inside = np.arange(shape[1]) < lengths[:, None]
    if "labels" in given:
        for row in np.flatnonzero(((given["labels"] != IGNORED) & ~inside).any(axis=1)):
            problems.add(int(row), "a label where 'attention_mask' keeps no token")
    columns = {name: values[inside].astype(np.int32) for name, values in given.items()}
    fills = {name: int(values[~inside][0]) for name, values in given.items() if not inside.all()}
    tokens = keep_tokens(task, lengths, columns, fills | {"labels": IGNORED})
    tokens = replace(tokens, axes=sequence.axes, width=sequence.width)
    if not task.cuts:
        return tokens
    if not mask[:, 0].all():
        problems.add(int(np.argmin(mask[:, 0])), "'attention_mask' begins with padding, which is to be at the end")
    try:
        counted = task.counting_tokens(given["input_ids"], inside, marks, problems.add)
    except LineError as error:
        raise DataError(f"{problems.source}: {error}") from None
    return replace(tokens, counted=counted[inside], shift=task.shift)


def _is_mask_of_floats(task: Task, name: str, values: NDArray[Any]) -> bool:
    """Whether an array holds zeros and ones for a mask that the model takes as floats."""
    wanted = name == "attention_mask" and any(spec.name == name and spec.is_float for spec in task.bundle.inputs)
    return wanted and values.dtype.kind == "f" and bool(np.isin(values, (0, 1)).all())


def _checked(
    path: Path, spec: ValueSpec, values: NDArray[Any], problems: Problems, sequence: Sequences | None
) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    cut = () if sequence is None else sequence.axes.get(spec.name, ())
    same = len(spec.shape) == values.ndim and all(
        axis in cut or want == values.shape[axis]
        for axis, want in enumerate(spec.shape)
        if axis > 0 and isinstance(want, int)
    )
    widened = dtype.kind in "iu" and values.dtype.kind in "iu" and np.can_cast(values.dtype, dtype)
    if not same or not (widened or values.dtype == dtype):
        raise DataError(
            f"{path}: array {spec.name!r} is {values.dtype} of shape {list(values.shape)}, "
            f"the model takes {spec.dtype} of shape {list(spec.shape)}"
        )
    if dtype.kind == "f":
        for row in np.flatnonzero(np.isnan(values).reshape(len(values), -1).any(axis=1)):
            problems.add(int(row), f"{spec.name!r} has a NaN")
    return np.ascontiguousarray(values, dtype)
