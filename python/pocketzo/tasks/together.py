"""Runs a batch for several directions in one forward pass: each on all rows, or on its own share of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pocketzo.data.dataset import fixed_batch
from pocketzo.formats.inputs import row_axis
from pocketzo.tasks.parts import BY_POSITION, Budget, count_rows, sizes, take_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle
    from pocketzo.runtime.model import Batch, Model
    from pocketzo.tasks.base import Task


class Found(NamedTuple):
    """What a direction gives.

    Attributes
    ----------
    outputs : dict of str to ndarray
    batch : mapping of str to ndarray
        What it saw of the batch.
    """

    outputs: dict[str, NDArray[Any]]
    batch: Batch


def shares(bundle: Bundle, batch: Batch, count: int) -> list[NDArray[np.int64]]:
    """Return the rows of each of so many shares of a batch: of as many examples each, or one less.

    Raises
    ------
    ValueError
        There are fewer examples than shares.
    """
    example = batch["row_examples"] if "row_examples" in batch else np.arange(count_rows(bundle, batch))
    examples = int(example[-1]) + 1
    if examples < count:
        raise ValueError(f"a batch of {examples} examples cannot be split for {count} directions")
    firsts = [part[0] for part in np.array_split(np.arange(examples), count)]
    return np.split(np.arange(len(example)), np.searchsorted(example, firsts[1:]))


def run_together(
    model: Model,
    task: Task,
    batch: Batch,
    rows: Sequence[NDArray[np.int64]],
    weights: Mapping[str, NDArray[Any]],
    outputs: Iterable[str] | None = None,
    activation_memory: int | None = None,
) -> list[Found]:
    """Run a model with several values of its trained tensors.

    Parameters
    ----------
    model : Model
        Loaded with ``queries=True``.
    task : Task
        The model's.
    batch : mapping of str to ndarray
    rows : sequence of ndarray of integers
        For each value, the rows of the batch that it is applied to, in order.
    weights : mapping of str to ndarray
        The values, [len(rows), ...].
    outputs : iterable of str, optional
        The outputs; by default all.
    activation_memory : int, optional
        As for :func:`pocketzo.tasks.parts.parts`: a forward pass takes fewer rows of each direction, or fewer
        directions, if the logits and activations of all would take more.

    Raises
    ------
    ValueError
        The model takes batches of one size only; or an output does not have an element for each row or position.
    """
    bundle = model.bundle
    if (size := fixed_batch(bundle)) is not None:
        raise ValueError(
            f"{bundle.path}: the model takes batches of exactly {size}, which leaves no rows for several directions: "
            "export it with a dynamic batch, or train without --share"
        )
    names = [value.name for value in bundle.outputs] if outputs is None else list(outputs)
    loss = model.group_loss if bundle.loss in names else None
    needed = list(dict.fromkeys([name for name in names if name != bundle.loss] + (loss.values if loss else [])))
    total = count_rows(bundle, batch)
    placed = "positions" in batch
    owner = batch["positions"] // batch["input_ids"].shape[1] if placed else np.arange(total)
    joined: dict[str, list[NDArray[Any]]] = {name: [] for name in needed}
    for at, part in _passes(task, batch, rows, activation_memory):
        _run(model, batch, {name: values[at] for name, values in weights.items()}, part, owner.size, joined)
    found = []
    for index, own in enumerate(rows):
        elements = np.flatnonzero(np.isin(owner, own))
        values = {name: arrays[index][elements] for name, arrays in joined.items()}
        results = {name: values[name] for name in names if name in values}
        if loss is not None:
            results[str(bundle.loss)] = np.array(loss(values))
        found.append(Found(results, batch if len(own) == total else _subset(bundle, batch, own, elements)))
    return found


class _Rows(NamedTuple):
    """Rows of a batch for some directions, as many for each.

    Attributes
    ----------
    rows : ndarray of integers, shape [directions, rows]
    idle : ndarray of bool, of that shape
        Which of them are there only to make directions equal.
    width : int
        Tokens of the longest.
    """

    rows: NDArray[np.int64]
    idle: NDArray[np.bool_]
    width: int


def _passes(
    task: Task, batch: Batch, rows: Sequence[NDArray[np.int64]], activation_memory: int | None, first: int = 0
) -> list[tuple[slice, list[_Rows]]]:
    """Return directions, and the rows of each forward pass that is for them."""
    bundle = task.bundle
    widths, counts = sizes(bundle, batch, count_rows(bundle, batch))
    most = max(map(len, rows))
    ordered = [own[np.lexsort((counts[own], widths[own]))] for own in rows]
    taken = np.stack([np.resize(own, most) for own in ordered])
    idle = np.stack([np.arange(most) >= len(own) for own in ordered])
    at = slice(first, first + len(rows))
    if "positions" not in batch and activation_memory is None:
        return [(at, [_Rows(taken, idle, int(widths.max()))])]
    budget = Budget(task, activation_memory)
    kept = np.where(idle, 0, counts[taken])
    parts: list[list[int]] = []
    for column in range(most):
        trial = [*parts[-1], column] if parts else [column]
        if parts and budget.holds(kept[:, trial].sum(), len(rows) * len(trial), int(widths[taken[:, trial]].max())):
            parts[-1].append(column)
        else:
            parts.append([column])
    too_large = any(
        not budget.holds(kept[:, part].sum(), len(rows) * len(part), int(widths[taken[:, part]].max()))
        for part in parts
    )
    if too_large and len(rows) > 1:
        half = len(rows) // 2
        return [
            *_passes(task, batch, rows[:half], activation_memory, first),
            *_passes(task, batch, rows[half:], activation_memory, first + half),
        ]
    return [(at, [_Rows(taken[:, part], idle[:, part], int(widths[taken[:, part]].max())) for part in parts])]


def _run(
    model: Model,
    batch: Batch,
    weights: Mapping[str, NDArray[Any]],
    passes: Sequence[_Rows],
    total: int,
    joined: Mapping[str, list[NDArray[Any]]],
) -> None:
    """Append what some directions give, each an array of the results of all rows, or positions, of the batch."""
    whole: dict[str, list[NDArray[Any]]] = {}
    for taken in passes:
        if taken.idle.all():
            continue
        part = take_rows(model.bundle, batch, taken.rows.ravel(), taken.width, taken.idle.ravel())
        placed = "positions" in batch
        count = taken.rows.shape[1]
        row = part.batch["positions"] // taken.width if placed else np.arange(taken.rows.size)
        real = np.full(row.shape, True) if placed else ~taken.idle.ravel()
        direction = row // count
        for name, values in model.run(part.batch, list(joined), weights).items():
            if not values.ndim or values.shape[0] % max(row.size, 1):
                raise ValueError(
                    f"the output {name!r}, {list(values.shape)} for {row.size} rows or positions, has no part for each "
                    "of several directions: train without --share"
                )
            values = values.reshape(row.size, -1) if values.shape[0] != row.size else values
            if name not in whole:
                whole[name] = [np.zeros((total, *values.shape[1:]), values.dtype) for _ in taken.rows]
            for index, result in enumerate(whole[name]):
                own = real & (direction == index)
                result[part.at[own]] = values[own]
    for name, results in whole.items():
        joined[name].extend(results)


def _subset(bundle: Bundle, batch: Batch, rows: NDArray[np.int64], elements: NDArray[np.intp]) -> Batch:
    """Return some rows of a batch, with what is no input of the graph."""
    specs = {spec.name: spec for spec in bundle.inputs}
    total, example = count_rows(bundle, batch), batch.get("row_examples")
    found: dict[str, NDArray[Any]] = {}
    for name, array in batch.items():
        axis = row_axis(specs[name]) if name in specs else 0
        if name == "positions":
            width = batch["input_ids"].shape[1]
            row, column = np.divmod(array[elements], width)
            found[name] = np.searchsorted(rows, row) * width + column
        elif name == "labels" and example is not None:
            found[name] = array[np.unique(example[rows])]
        elif name == "row_examples":
            found[name] = array[rows] - array[rows[0]]
        elif "positions" in batch and name in BY_POSITION:
            found[name] = array[elements]
        else:
            is_cut = array.ndim > axis and array.shape[axis] == total
            found[name] = np.take(array, rows, axis) if is_cut else array
    return found
