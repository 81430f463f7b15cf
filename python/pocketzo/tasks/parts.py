"""Runs a batch in parts, so that logits and activations take little memory however large the batch is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pocketzo.data.dataset import fixed_batch, is_by_token
from pocketzo.formats.inputs import TOKEN_INPUTS, row_axis
from pocketzo.runtime.slices import LOGITS_MEMORY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import Bundle
    from pocketzo.runtime.model import Batch, Model
    from pocketzo.tasks.base import Task

BY_POSITION: Final = ("positions", "targets", "labels")
"""The inputs with an element for each position whose logits count, in graphs that have `positions`."""


class Part(NamedTuple):
    """Some rows of a batch.

    Attributes
    ----------
    batch : mapping of str to ndarray
        The graph's inputs.
    at : ndarray of integers
        The place of each of its results among those of the whole batch.
    """

    batch: Batch
    at: NDArray[np.int64]


def parts(task: Task, batch: Batch, activation_memory: int | None = None, slices: int = 1) -> list[Part]:
    """Cut a batch into parts of whole rows, each as wide as its longest row.

    A batch is not cut if it fits, if the graph takes batches of one size only, or if it has a single row.

    Parameters
    ----------
    task : Task
    batch : mapping of str to ndarray
        Inputs [rows, ...]; for a graph that has them, ``positions`` [n] and ``targets`` [n].
    activation_memory : int, optional
        Bytes that the logits of a part, and the largest activations, may take. By default only logits are limited, to
        :data:`LOGITS_MEMORY`, and only where ``positions`` say which of them there are. A part has at least one row.
    slices : int
        In how many slices the graph computes logits, each within the limit.
    """
    bundle = task.bundle
    placed = "positions" in batch
    rows = count_rows(bundle, batch)
    whole = [Part(batch, np.arange(batch["positions"].size if placed else rows))]
    if rows < 2 or fixed_batch(bundle) is not None or not whole[0].at.size or not (placed or activation_memory):
        return whole
    widths, counts = sizes(bundle, batch, rows)
    budget = Budget(task, activation_memory, slices)
    groups: list[list[int]] = []
    for row in np.lexsort((counts, widths)).tolist():
        if groups and budget.holds(counts[[*groups[-1], row]].sum(), len(groups[-1]) + 1, int(widths[row])):
            groups[-1].append(row)
        else:
            groups.append([row])
    if len(groups) == 1:
        return whole
    groups = [sorted(group) for group in groups if not placed or counts[group].any()]
    return [take_rows(bundle, batch, np.array(group), int(widths[group].max())) for group in groups]


def run(
    model: Model,
    task: Task,
    batch: Batch,
    outputs: Iterable[str] | None = None,
    activation_memory: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Run a model on a batch in parts; return what it returns for the whole batch, but for roundings.

    Parameters
    ----------
    model, batch, outputs
        As for :meth:`Model.run`.
    task : Task
        The model's.
    activation_memory : int, optional
        As for :func:`parts`.

    Returns
    -------
    dict of str to ndarray
        The outputs by name. The loss is the mean of the parts' losses, each with the weight of what counts in it,
        summed in float64.

    Raises
    ------
    ValueError
        An output that is not the loss does not have an element for each example or position, so that parts of it are
        no part of the whole.
    """
    cut = parts(task, batch, activation_memory, model.slices.count)
    names = None if outputs is None else list(outputs)
    if len(cut) == 1:
        return model.run(batch, names, logits_memory=activation_memory)
    return joined(
        model.bundle, task, cut, [model.run(part.batch, names, logits_memory=activation_memory) for part in cut]
    )


def joined(
    bundle: Bundle, task: Task, cut: Sequence[Part], results: Sequence[Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """Return the outputs of a whole batch from those of its parts; see :func:`run`."""
    if len(cut) == 1:
        return dict(results[0])
    loss = bundle.loss
    total = sum(part.at.size for part in cut)
    found: dict[str, NDArray[Any]] = {}
    for name, first in results[0].items():
        if name == loss:
            weights = [task.weight(part.batch, part.at.size) for part in cut]
            found[name] = np.array(mean_loss((float(result[name]) for result in results), weights))
            continue
        values = np.empty((total, *first.shape[1:]), first.dtype)
        for part, result in zip(cut, results, strict=True):
            if result[name].shape[:1] != part.at.shape:
                raise ValueError(
                    f"the output {name!r}, {list(result[name].shape)} for {part.at.size} examples, cannot be joined "
                    "from parts of a batch: leave activation_memory out"
                )
            values[part.at] = result[name]
        found[name] = values
    return found


def mean_loss(losses: Iterable[float], weights: Iterable[int]) -> float:
    """Return the mean of losses, each with the weight of what counts in it; NaN if nothing does."""
    counted = [(loss, weight) for loss, weight in zip(losses, weights, strict=True) if weight]
    return sum(loss * weight for loss, weight in counted) / sum(weight for _, weight in counted) if counted else nan


class Budget:
    """What a part may hold; see :func:`parts`."""

    def __init__(self, task: Task, activation_memory: int | None, slices: int = 1) -> None:
        self._all = activation_memory
        self._logits = slices * (activation_memory or LOGITS_MEMORY)
        self._vocabulary = task.vocabulary
        matrices = [tensor.shape for tensor in task.bundle.tensors if len(tensor.shape) == 2]
        widest = (size for shape in matrices if self._vocabulary not in shape for size in shape)
        self._widest = max(widest, default=1)  # and the attention's scores, of a head, are as wide as the text

    def holds(self, positions: int, rows: int, width: int) -> bool:
        """Return whether rows of a width may be a part, with so many positions in all."""
        fits = 4 * int(positions) * self._vocabulary <= self._logits
        return fits and (self._all is None or 4 * rows * width * max(self._widest, width) <= self._all)


def count_rows(bundle: Bundle, batch: Batch) -> int:
    """Return the number of rows of a batch."""
    placed = "positions" in batch
    by_row = [spec for spec in bundle.inputs if spec.shape and not (placed and spec.name in BY_POSITION)]
    return max((batch[spec.name].shape[row_axis(spec)] for spec in by_row if spec.name in batch), default=1)


def sizes(bundle: Bundle, batch: Batch, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of tokens of each row, where rows can be trimmed, and of its positions."""
    if "positions" not in batch:
        width = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        return np.full(rows, width), np.zeros(rows, np.int64)
    width = batch["input_ids"].shape[1]
    row, column = np.divmod(batch["positions"], width)
    counts = np.bincount(row, minlength=rows)
    by_token = [spec for spec in bundle.inputs if spec.name in batch and spec.name not in BY_POSITION]
    fixed = any(not is_by_token(spec) or isinstance(spec.shape[-1], int) for spec in by_token)
    if fixed or "attention_mask" not in batch or any(batch[spec.name].shape[-2:] != (rows, width) for spec in by_token):
        return np.full(rows, width), counts
    real = batch["attention_mask"] != 0
    real[row, column] = True
    return np.where(real.any(axis=1), width - np.argmax(real[:, ::-1], axis=1), 1), counts


def take_rows(
    bundle: Bundle, batch: Batch, group: NDArray[np.int64], width: int, idle: NDArray[np.bool_] | None = None
) -> Part:
    """Return some rows of a batch, trimmed to a width.

    Parameters
    ----------
    bundle : Bundle
    batch : mapping of str to ndarray
    group : ndarray of integers
        The rows; each may be taken several times.
    width : int
    idle : ndarray of bool, optional
        Which of the rows have no positions that count.
    """
    placed, rows = "positions" in batch, count_rows(bundle, batch)
    part: dict[str, NDArray[Any]] = {}
    for spec in bundle.inputs:
        if spec.name in batch and not (placed and spec.name in BY_POSITION):
            values, axis = batch[spec.name], row_axis(spec)
            is_cut = spec.shape and values.shape[axis] == rows
            part[spec.name] = np.take(values, group, axis) if is_cut else values
    if not placed:
        return Part(part, group)
    before = batch["input_ids"].shape[1]
    for name in TOKEN_INPUTS:
        if name in part and width < before:
            part[name] = np.ascontiguousarray(part[name][..., :width])
    row, column = np.divmod(batch["positions"], before)
    order = np.argsort(row, kind="stable")
    first, end = (np.searchsorted(row[order], group, side) for side in ("left", "right"))
    if idle is not None:
        end = np.where(idle, first, end)
    at = np.concatenate([order[start:stop] for start, stop in zip(first, end, strict=True)])
    part |= {
        spec.name: batch[spec.name][at] for spec in bundle.inputs if spec.name in batch and spec.name in BY_POSITION
    }
    part["positions"] = np.repeat(np.arange(len(group)), end - first) * width + column[at]
    return Part(part, at)
