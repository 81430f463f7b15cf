"""The losses of a run's steps, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np


class Windows:
    """Collects losses, each time until a window is complete: what follows is the same in a run that is resumed.

    Parameters
    ----------
    size : int
        Steps of a window.
    least : int
        Finite losses that a window needs, at least 2.
    """

    def __init__(self, size: int, least: int) -> None:
        self.size = size
        self._least = least
        self._losses: list[float] = []

    def add(self, step: int, loss: float) -> tuple[float, float] | None:
        """Add the loss of a step, from 1; one that is not finite counts for nothing.

        Returns
        -------
        (float, float) or None
            The mean of a window that is complete, and the square of its standard error; None before, or of too few.
        """
        if math.isfinite(loss):
            self._losses.append(loss)
        if step % self.size:
            return None
        losses, self._losses = np.array(self._losses), []
        if len(losses) < self._least:
            return None
        return float(losses.mean()), float(losses.var(ddof=1) / len(losses))


def losses_of(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
    """Yield step and loss of the lines of ``metrics.jsonl`` that have them."""
    for line in lines:
        if isinstance(loss := line.get("loss"), int | float):
            yield line["step"], loss
