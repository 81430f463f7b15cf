"""Which clients a round asks: few at first, more whenever the loss has stopped falling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from pocketzo.arguments import check_integer
from pocketzo.train.windows import Windows, losses_of

WINDOW: Final = 10
"""Steps whose losses are compared with those of as many before."""


class Cohort:
    """The clients that a round asks, drawn by lot among those that can be reached.

    While slopes are large, a few noisy directions go down; later the noise is larger than what is left to gain. So,
    as in FwdLLM (Xu et al., arXiv 2308.13894), the number of clients grows with progress: it doubles after each
    :data:`WINDOW` steps whose mean loss is not below that of the window before by more than the standard error of the
    difference.

    Parameters
    ----------
    first : int or None
        Clients that the first rounds ask; None to ask all, always.
    seed : int
        Of the lot, with the step.
    lines : iterable of mapping
        Lines of the server's ``metrics.jsonl``, in order, of the steps before.
    """

    def __init__(self, first: int | None, seed: int, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        if first is not None:
            check_integer("clients", first, 1)
        self.size = first
        self._seed = seed
        self._windows = Windows(WINDOW, 2)
        self._before: tuple[float, float] | None = None  # mean and squared standard error of the last complete window
        for step, loss in losses_of(lines):
            self.add(step, loss)

    def add(self, step: int, loss: float) -> None:
        """Add the mean loss of the clients of a step, from 1; one that is not finite counts for nothing."""
        window = self._windows.add(step, loss)
        if window is None:
            return
        if self.size is not None and self._before is not None:
            (before, its), (mean, squared) = self._before, window
            if not before - mean > math.sqrt(squared + its):
                self.size *= 2
        self._before = window

    def of(self, clients: Iterable[str], step: int) -> Sequence[str]:
        """Return the clients of the round after a step."""
        names = sorted(set(clients))
        if self.size is None or self.size >= len(names):
            return names
        drawn = np.random.default_rng([self._seed, step]).permutation(len(names))[: self.size]
        return [names[number] for number in sorted(drawn)]
