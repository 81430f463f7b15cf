"""Completions that a model generates for a dataset: progress, their share of exact matches, and a few of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from rich.table import Table
from rich.text import Text

from pocketzo.cli.console import err, note
from pocketzo.tasks.exact_match import Completion

_SHOWN: Final = 3
_LONGEST: Final = 60  # characters of a prompt, of which the end is what is continued
_SECONDS: Final = 10.0  # between two lines of progress where there is no terminal


@dataclass
class Generated:
    """What is known of the completions up to now.

    Attributes
    ----------
    count, matches : int
    examples : list of Completion
        The first ones.
    """

    count: int = 0
    matches: int = 0
    examples: list[Completion] = field(default_factory=list)

    def add(self, completion: Completion) -> None:
        """Count a completion."""
        self.count += 1
        self.matches += completion.matches
        if self.count <= _SHOWN:
            self.examples.append(completion)

    @property
    def share(self) -> float:
        """The share of exact matches."""
        return self.matches / self.count

    def __str__(self) -> str:
        return f"exact-match {100 * self.share:.1f} % of {self.count} prompts"

    def table(self) -> Table:
        """Return the examples as a table."""
        table = Table(box=None, pad_edge=False)
        for name in ("prompt", "expected", "got"):
            table.add_column(name, overflow="fold", ratio=1)
        for one in self.examples:
            prompt = one.prompt if len(one.prompt) <= _LONGEST else f"...{one.prompt[-_LONGEST:]}"
            got = one.got if one.ended else f"{one.got} ..."
            table.add_row(*(Text(text.replace("\n", "\\n")) for text in (prompt, one.expected, got)))
        return table


def generated_shown(completions: Iterable[Completion]) -> Generated:
    """Generate completions with a display of how many there are."""
    found, shown = Generated(), time.monotonic()
    with err.status("generating") as status:
        for completion in completions:
            found.add(completion)
            status.update(f"generating: {found}")
            if not err.is_terminal and time.monotonic() - shown >= _SECONDS:
                shown = time.monotonic()
                note(str(found))
    return found
