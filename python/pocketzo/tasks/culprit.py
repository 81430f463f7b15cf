"""Find the example that a model cannot be run on, and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketzo.data.dataset import fixed_batch
from pocketzo.errors import DataError, Error, MemoryLimitError
from pocketzo.formats.inputs import TOKEN_INPUTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pocketzo.data.order import Data
    from pocketzo.runtime.model import Model


@contextmanager
def naming_culprit(model: Model, data: Data, indices: NDArray[np.integer[Any]]) -> Iterator[None]:
    """If a forward pass of some examples fails, raise a :class:`DataError` that names the first that fails alone.

    The weights are to be the same when the block is left as they were in it, but for roundings: each example is run
    again.

    Parameters
    ----------
    model : Model
    data : Data
    indices : ndarray of integers, shape [batch]
        The numbers of the examples that the block runs the model on.
    """
    try:
        yield
    except (DataError, MemoryLimitError):
        raise
    except Error as error:
        found = _culprit(model, data, indices)
        if found is None:
            raise
        raise DataError(found) from error


def where(data: Data, index: int) -> str:
    """Return the place of an example: file and line, or its number if the data does not know more."""
    place = getattr(data, "where", None)
    return f"example {index}" if place is None else str(place(index))


def _culprit(model: Model, data: Data, indices: NDArray[np.integer[Any]]) -> str | None:
    copies = fixed_batch(model.bundle) or 1
    for index in np.unique(indices).tolist():
        batch = dict(data.batch(np.full(copies, index, np.int64)))
        reason = _failure(model, batch)
        if reason is None:
            continue
        limit = _length_limit(model, batch)
        if limit is None:
            return f"{where(data, index)}: the model cannot be run on this example{_largest(batch)}: {reason}"
        lengths = getattr(data, "lengths", None)
        longer = 0 if lengths is None else int(np.count_nonzero(np.asarray(lengths) > limit)) - 1
        others = f" (and {longer} other{'s' * (longer > 1)} longer than that)" if longer > 0 else ""
        return (
            f"{where(data, index)}: {batch['input_ids'].shape[1]} tokens, and the model takes at most {limit}{others}: "
            f"prepare the model with --max-length {limit}, which cuts longer texts, or shorten them"
        )
    return None


def _failure(model: Model, batch: Mapping[str, NDArray[Any]]) -> str | None:
    """Return why the model cannot be run on a batch, or None."""
    try:
        model.run(batch)
    except Error as error:
        return str(error.__cause__ or error)
    return None


def _length_limit(model: Model, batch: Mapping[str, NDArray[Any]]) -> int | None:
    """Return the number of tokens that the model takes, if it fails on a batch because that has more.

    The batch's first token is repeated, so that no other token can be the reason.
    """
    shape = batch["input_ids"].shape if "input_ids" in batch else ()
    if len(shape) != 2:
        return None
    by_token = [name for name in batch if name in (*TOKEN_INPUTS, "labels") and batch[name].shape[-2:] == shape]

    def fails(length: int) -> bool:
        changed = dict(batch)
        for name in by_token:
            changed[name] = np.repeat(batch[name][..., :1], length, axis=-1)
            if name == "position_ids":
                changed[name] += np.arange(length, dtype=changed[name].dtype)
        if "positions" in batch:  # the last one of each row
            changed["positions"] = np.arange(1, shape[0] + 1) * length - 1
            changed["targets"] = batch["input_ids"][:, 0].astype(np.int64)
        return _failure(model, changed) is not None

    most, too_many = 1, shape[1]
    if fails(most) or not fails(too_many):
        return None
    while too_many - most > 1:
        middle = (most + too_many) // 2
        if fails(middle):
            too_many = middle
        else:
            most = middle
    return most


def _largest(batch: Mapping[str, NDArray[Any]]) -> str:
    """Return the largest values of a batch's integer inputs in words: one may be beyond a table of the model."""
    found = [
        f"{name} {int(values.max())}"
        for name, values in batch.items()
        if values.dtype.kind in "iu" and values.size and name not in ("attention_mask", "position_ids")
    ]
    return f" (largest {', '.join(found)})" if found else ""
