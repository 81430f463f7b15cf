"""Sign: a step of a fixed size along each direction, down the slope."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

import numpy as np

from pocketzo.kernels import Distribution
from pocketzo.optim.optimizer import Optimizer
from pocketzo.optim.program import Point


class Sign(Optimizer):
    """ZO-signSGD (Liu et al., ICLR 2019): of the loss along a direction, only whether it rises or falls is used.

    ``w -= lr sign(loss(w + eps u) - loss(w - eps u)) u``, where u is a Rademacher direction: as its elements are +-1,
    that is the sign of each element of MeZO's estimate. With several ``queries``, the update is the mean over that many
    directions. A batch with an extreme loss moves the weights no further than any other, and no loss has a scale.

    Parameters are those of :class:`Optimizer`; by default a step uses one Rademacher direction. With Gaussian ones, the
    update is the sign of the slope times the direction.
    """

    method: ClassVar[str] = "sign"
    default_lr: ClassVar[float] = 1e-4
    default_distribution: ClassVar[Distribution] = "rademacher"
    default_queries: ClassVar[int] = 1

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        """See :meth:`Optimizer.probe`."""
        coefficients = {}
        for draw in draws:
            plus = yield {draw: +1.0}
            minus = yield {draw: -1.0}
            coefficients[draw] = lr * float(np.sign(plus - minus)) / len(draws)
        return coefficients
