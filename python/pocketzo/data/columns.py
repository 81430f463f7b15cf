"""Which column of a data file holds what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Columns:
    """The names of columns that have none of their usual names; None where they have.

    The command line makes an option of each field: ``--text-column``, ``--text-pair-column``, ``--label-column``.

    Attributes
    ----------
    text, text_pair, label : str or None
        The exact names of the columns that hold the text, the second text and the label.
    """

    text: str | None = field(default=None, metadata={"holds": "text"})
    text_pair: str | None = field(default=None, metadata={"holds": "second text"})
    label: str | None = field(default=None, metadata={"holds": "label"})


def find_column(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str | None:
    """Return the name of a column: the one given, else the first one known, in upper or lower case; None if missing."""
    if given is not None:
        return given if given in columns else None
    folded = {column.strip().lower(): column for column in columns}
    return next((folded[name] for name in known if name in folded), None)


def missing_column(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str:
    """Return what to say where a column is missing."""
    return f"no {given or known[0]!r} among the columns {', '.join(map(repr, columns)) or '(none)'}"
