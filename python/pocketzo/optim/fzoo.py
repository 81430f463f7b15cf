"""FZOO: one-sided differences, with a step size normalised by the standard deviation of the losses."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

import numpy as np

from pocketzo.kernels import Distribution
from pocketzo.optim.optimizer import Optimizer, Share
from pocketzo.optim.program import Point


class FZOO(Optimizer):
    """FZOO (Dang et al., arXiv 2506.09034): the loss l_0 at the weights, and l_i along each of N directions u_i.

    ``w -= lr / (N std(l)) sum_i (l_i - l_0) u_i``. Parameters are those of :class:`Optimizer`; by default a step uses
    8 Rademacher directions (``queries``, at least 2).

    With ``share="split"``, there is an l_0 of each share of the batch, and std is that of the differences l_i - l_0:
    the losses themselves differ by their examples.
    """

    method: ClassVar[str] = "fzoo"
    default_lr: ClassVar[float] = 5e-4
    default_distribution: ClassVar[Distribution] = "rademacher"
    default_queries: ClassVar[int] = 8
    least_queries: ClassVar[int] = 2
    no_pace: ClassVar[str] = (
        "it divides the estimate by the spread of its losses, so that its variance follows from the number of "
        "directions alone: take more queries, or mezo or momentum"
    )

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        """See :meth:`Optimizer.probe`."""
        is_split = self.share == "split"
        starts: list[Point] = [{draw: 0.0} for draw in draws] if is_split else [{}]
        bases, along = [], []
        for point in starts:
            base = yield point
            bases.append(base)
        for draw in draws:
            loss = yield {draw: +1.0}
            along.append(loss)
        if not is_split:
            bases *= len(draws)
        moved = [loss - base for loss, base in zip(along, bases, strict=True)]
        spread = float(np.std(moved if is_split else along, ddof=1))
        if spread == 0.0:  # all directions have the same loss: no information, and a division by 0
            return dict.fromkeys(draws, 0.0)
        return {draw: lr * change / (len(draws) * spread) for draw, change in zip(draws, moved, strict=True)}

    @classmethod
    def evaluations(cls, queries: int | None = None, share: Share | None = None) -> int:
        """See :meth:`Optimizer.evaluations`."""
        return super().evaluations(queries, share) if share == "split" else 1 + (queries or cls.default_queries)

    def loss(self, losses: Sequence[float]) -> float:
        """Return the loss at the weights."""
        count = self.queries if self.share == "split" else 1
        return sum(losses[:count]) / count
