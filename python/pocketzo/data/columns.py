"""The columns of a data file, found by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields


class LineError(Exception):
    """A line of a data file cannot be used; the message gives the reason."""


@dataclass(frozen=True)
class Columns:
    """How to find the columns of a file that uses none of the usual names, or another delimiter.

    The command line makes an option of each field: ``--text-column``, ``--text-pair-column``, ``--label-column``,
    ``--delimiter``.

    Attributes
    ----------
    text, text_pair, label : str or None
        The exact names of the columns that hold the text, the second text and the label. None means one of the usual
        names.
    delimiter : str or None
        The character between the fields of a ``.tsv`` or ``.csv`` file. None means a tab or a comma, by the suffix.

    Raises
    ------
    ValueError
        ``delimiter`` is not one character, or is a quote or a line end.
    """

    text: str | None = field(default=None, metadata={"holds": "text"})
    text_pair: str | None = field(default=None, metadata={"holds": "second text"})
    label: str | None = field(default=None, metadata={"holds": "label"})
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise ValueError(f"the delimiter must be one character, no quote and no line end, got {self.delimiter!r}")

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield role and name of each column that has been named."""
        for role in COLUMN_ROLES:
            if (name := getattr(self, role)) is not None:
                yield role, name


COLUMN_ROLES = {one.name: str(one.metadata["holds"]) for one in fields(Columns) if one.metadata}
"""What each column holds, by role."""


def option_of(role: str) -> str:
    """Return the command line's option that names the column for a role."""
    return f"--{role.replace('_', '-')}-column"


def find_column(columns: Collection[str], given: str | None, known: tuple[str, ...]) -> str | None:
    """Return the given name, else the first known name in any case; None if the column is missing.

    Raises
    ------
    LineError
        Several columns have the known name, in different case.
    """
    if given is not None:
        return given if given in columns else None
    folded: dict[str, list[str]] = {}
    for column in columns:
        folded.setdefault(column.strip().lower(), []).append(column)
    found = next((folded[name] for name in known if name in folded), [])
    if len(found) > 1:
        raise LineError(
            f"the columns {' and '.join(map(repr, found))} differ only in case or spaces: choose one by "
            "--text-column, --text-pair-column or --label-column, or delete the other"
        )
    return found[0] if found else None


def missing_column(columns: Collection[str], given: str | None, known: tuple[str, ...], role: str) -> str:
    """Return the error message for a missing column."""
    message = f"no {given or known[0]!r} among the columns {', '.join(map(repr, columns)) or '(none)'}"
    return message if given is not None or not columns else f"{message}: name the column by {option_of(role)}"
