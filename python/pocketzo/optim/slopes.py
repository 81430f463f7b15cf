"""The slopes of the loss along the directions of a step, and their running mean square."""

from __future__ import annotations

import math

from pocketzo.formats.journal import Entry

_KEEP, _TAKE = 0.99, 0.01  # a mean over some 100 steps


def slopes_of(entry: Entry) -> dict[int, float]:
    """Return the slopes along a step's directions by draw, for methods whose coefficients are lr times their mean.

    The learning rate of the entry must not be 0.
    """
    count = len(entry.coefficients)
    return {draw: count * value / entry.lr for draw, value in entry.coefficients.items()}


class MeanSquare:
    """Running mean of the squares of the slopes, with Adam's correction of the first steps.

    Every operation is in float64 and in this order, so that replay on any machine gives the same bits.

    Attributes
    ----------
    total, weight : float
        After t steps, their squares have weights that add up to ``weight``.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.weight = 0.0

    def take(self, entry: Entry) -> None:
        """Take a step in, whose learning rate is not 0."""
        square = 0.0
        for slope in slopes_of(entry).values():  # sum() rounds in another way since Python 3.12
            square += slope * slope
        self.total = _KEEP * self.total + _TAKE * (square / len(entry.coefficients))
        self.weight = _KEEP * self.weight + _TAKE

    @property
    def value(self) -> float:
        """The mean; 0 before the first step."""
        return self.total / self.weight if self.weight else 0.0

    @property
    def root(self) -> float:
        """The root of the mean."""
        return math.sqrt(self.value)
