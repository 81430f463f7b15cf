"""MeZO: two-sided (central) differences."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

from pocketzo.kernels import Distribution
from pocketzo.optim.optimizer import Optimizer
from pocketzo.optim.program import Point


class MeZO(Optimizer):
    """MeZO (Malladi et al., arXiv 2305.17333): a central difference of the loss along each direction.

    ``g = (loss(w + eps z) - loss(w - eps z)) / (2 eps)``, then ``w -= lr g z``. With several ``queries``, the update is
    the mean over that many directions. Parameters are those of :class:`Optimizer`; by default a step uses one
    Gaussian direction.
    """

    method: ClassVar[str] = "mezo"
    default_lr: ClassVar[float] = 1e-5
    default_distribution: ClassVar[Distribution] = "gaussian"
    default_queries: ClassVar[int] = 1

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        """See :meth:`Optimizer.probe`."""
        differences = {}
        for draw in draws:
            plus = yield {draw: +1.0}
            minus = yield {draw: -1.0}
            differences[draw] = plus - minus
        # Only now the number of draws is known: with a pace, it grows.
        return {draw: lr * change / (2 * self.eps * len(draws)) for draw, change in differences.items()}

    def slopes(self, losses: Sequence[float]) -> list[float]:
        """See :meth:`Optimizer.slopes`."""
        return [(plus - minus) / (2 * self.eps) for plus, minus in zip(losses[::2], losses[1::2], strict=False)]
