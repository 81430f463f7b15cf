"""Whether a run is being ruined: its training loss has risen clearly above its own best, without evaluation data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pocketzo.train.windows import Windows, losses_of

_WINDOW: Final = 20, 100  # least and most steps of a window
_WINDOWS: Final = 20  # of a run, if they are not to be shorter or longer than that
_ERRORS: Final = 5.0  # standard errors; the largest and the smallest of 20 windows of mere noise are 2.8 apart
_LOST: Final = 0.5  # share of what was gained
_RISE: Final = 0.05  # share of the best value


@dataclass(frozen=True)
class Rise:
    """A training loss that has risen clearly.

    Attributes
    ----------
    best, now : float
        Means over the window with the lowest loss, and over the last one.
    error : float
        Standard error of their difference.
    best_step, step : int
        The last steps of these windows, from 1.
    window : int
        Steps of each.
    """

    best: float
    now: float
    error: float
    best_step: int
    step: int
    window: int

    def text(self, name: str) -> str:
        """Return it as a sentence, for what is minimised."""
        return (
            f"the training {name} rose from {self.best:.4g} (mean of steps {self.best_step - self.window + 1} to "
            f"{self.best_step}) to {self.now:.4g} (steps {self.step - self.window + 1} to {self.step}), with a "
            f"standard error of {self.error:.2g}"
        )


class Guard:
    """Watches the losses of a run's steps.

    They are compared in windows that do not overlap, each time that one is complete: so a run that is resumed is
    stopped where it would have been without. The last window has risen clearly if its mean is above the lowest one by
    more than five standard errors of the difference, 5 % of the lowest, and half of what had been gained since the
    first window.

    Parameters
    ----------
    steps : int
        Length of the run.
    lines : iterable of mapping
        Lines of ``metrics.jsonl``, in order, of steps that were taken before.

    Attributes
    ----------
    rise : Rise or None
        How the loss has risen in the last complete window; None if it has not.
    """

    def __init__(self, steps: int, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        least, most = _WINDOW
        self.rise: Rise | None = None
        size = max(least, min(most, steps // _WINDOWS))
        self._windows = Windows(size, size // 2 + 1)
        self._complete: list[tuple[float, float, int]] = []  # mean, its variance, last step
        for step, loss in losses_of(lines):
            self.add(step, loss)

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step, from 1; one that is not finite counts for nothing."""
        window = self._windows.add(step, loss)
        if step % self._windows.size == 0:
            self.rise = None
        if window is None:
            return
        self._complete.append((*window, step))
        (first, *_), (now, spread, _) = self._complete[0], self._complete[-1]
        best, least_spread, best_step = min(self._complete)
        error = math.sqrt(spread + least_spread)
        if now - best > max(_ERRORS * error, _RISE * abs(best), _LOST * (first - best)):
            self.rise = Rise(best, now, error, best_step, step, self._windows.size)
