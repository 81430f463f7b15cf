"""The columns of a data file, found by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Columns:
    """Column names that the user gives, for files that use none of the usual names.

    The command line makes an option of each field: ``--text-column``, ``--text-pair-column``, ``--label-column``.

    Attributes
    ----------
    text, text_pair, label : str or None
        The exact names of the columns that hold the text, the second text and the label. None means one of the usual
        names.
    """

    text: str | None = field(default=None, metadata={"holds": "text"})
    text_pair: str | None = field(default=None, metadata={"holds": "second text"})
    label: str | None = field(default=None, metadata={"holds": "label"})


def find_column(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str | None:
    """Return the given name, else the first known name in any case; None if the column is missing."""
    if given is not None:
        return given if given in columns else None
    folded = {column.strip().lower(): column for column in columns}
    return next((folded[name] for name in known if name in folded), None)


def missing_column(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str:
    """Return the error message for a missing column."""
    return f"no {given or known[0]!r} among the columns {', '.join(map(repr, columns)) or '(none)'}"
