"""Pacing by variance: a step takes directions until the means of two halves of its estimates differ little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from pocketzo.arguments import check_integer, check_number
from pocketzo.optim.slopes import MeanSquare


@dataclass(frozen=True)
class Pace:
    """How many directions a step takes: another ``queries`` of them while the variance of the estimate is too large.

    FwdLLM (Xu et al., arXiv 2308.13894) compares the means A and B of the estimates ``g_i z_i`` over the first and the
    second half of the directions. Their variance for each trained parameter is ``|A - B|**2 / (2 d)``. Directions of
    many elements are orthogonal and of the squared length d, but for a relative error of about ``sqrt(2 / d)``. So the
    variance is ``(mean(g**2 of A) + mean(g**2 of B)) / n`` for n directions, which needs neither weights nor
    directions.

    It is divided by the running mean of ``g**2`` over the steps before, which makes it independent of the scale of
    the loss and of the number of parameters: it is 2 / n where the slopes are as large as usual. The squared length of
    the mean would not do as a divisor: ``|A - B|**2 / |A + B|**2`` is 1 for orthogonal directions, whatever the loss.

    Attributes
    ----------
    threshold : float
        The variance above which a step goes on. A usual step takes ``2 / threshold`` directions.
    most : int
        The largest number of directions of a step, at least 2.
    """

    threshold: float
    most: int = 64

    def __post_init__(self) -> None:
        check_number("pace", self.threshold, positive=True)
        check_integer("the most directions of a step with pace", self.most, 2)

    def variance(self, slopes: Sequence[float], usual: MeanSquare) -> float:
        """Return the variance in units of the usual mean square; infinite for one slope, and 0 if all are 0.

        Parameters
        ----------
        slopes : sequence of float
            Along the directions so far, in order.
        usual : MeanSquare
            Of the steps before; before the first one, that of these slopes takes its place.
        """
        half = len(slopes) // 2
        if not half:
            return math.inf
        squares = [slope * slope for slope in slopes]
        unit = usual.value or sum(squares) / len(squares)
        found = 0.5 * (sum(squares[:half]) / half**2 + sum(squares[half:]) / (len(slopes) - half) ** 2)
        return found / unit if found else 0.0

    def usual(self, queries: int) -> int:
        """Return the number of directions of a step whose slopes are as large as usual."""
        rounds = max(math.ceil(2 / self.threshold / queries), 1 if queries > 1 else 2)
        return min(rounds, self.most // queries) * queries


class Growing(Sequence[int]):
    """The draws of a step with pace: iteration asks for another round when those so far are used up.

    Parameters
    ----------
    more : callable
        Gets the number of draws so far and returns the next ones; none to end the step.
    """

    def __init__(self, more: Callable[[int], Sequence[int]]) -> None:
        self._more = more
        self._draws: list[int] = []

    def __iter__(self) -> Iterator[int]:
        at = 0
        while at < len(self._draws) or self._grow():
            yield self._draws[at]
            at += 1

    def _grow(self) -> bool:
        more = self._more(len(self._draws))
        self._draws += more
        return bool(more)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._draws[index]

    def __len__(self) -> int:
        return len(self._draws)
