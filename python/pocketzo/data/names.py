"""The names of the classes of a data file, for models that leave them to the training data."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset, records_of
from pocketzo.errors import DataError
from pocketzo.tasks.registry import task_of

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle


def class_names(path: Path, bundle: Bundle, columns: Columns) -> tuple[str, ...]:
    """Return the labels of a file, each once: in numerical order if all are integers, else in alphabetical order.

    Lines that cannot be used are passed over; :func:`load_dataset` names them.

    Raises
    ------
    DataError
        The file is of an unknown kind, cannot be read, or has no labels; or one of a row of numbers, or of white space.
    """
    task = task_of(bundle)
    if path.suffix.lower() == ".npz":
        ids = load_dataset(path, bundle, columns=columns).label_ids
        found = set() if ids is None else {str(number) for number in range(int(ids.max()) + 1)}
    else:
        found = set()
        for number, record in records_of(path, task, columns, True):
            name = None if isinstance(record, str) else task.find(record, columns, "label")
            if isinstance(record, str) or name is None:
                continue
            label = record[name]
            if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
                raise DataError(f"{path}, line {number}: the label must be a name or an integer, found {label!r}")
            found.add(str(label))
    if not found:
        raise DataError(f"{path}: no labels, from which the classes would follow")
    return in_order(found)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Return names of classes, each once: in numerical order if all are integers, else in alphabetical order."""
    found = set(names)
    return tuple(sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found))


def _is_integer(text: str) -> bool:
    return text.isascii() and text.isdigit()
