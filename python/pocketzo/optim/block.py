"""Block: each step perturbs and updates only a random share of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pocketzo.arguments import check_number
from pocketzo.formats.bundle import BLOCK_ID
from pocketzo.kernels import noise


@dataclass(frozen=True)
class Block:
    """A random share of the trained tensors, drawn anew each step, for any method.

    The passes over the weights shrink to this share; the cost of a forward pass is unchanged. This helps where the
    passes over the weights are a large part of a step: short sequences and small batches. LeZO (Wang et al., arXiv
    2410.09823) and MeZO-BCD (Park et al., arXiv 2501.19099) choose whole layers; here the unit is a tensor.

    Attributes
    ----------
    share : float
        Share of the tensors, in (0, 1], rounded to a whole number of tensors, at least one.
    """

    share: float

    name: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        check_number("block", self.share, positive=True, most=1.0)

    def __call__(self, *, seed: int, step: int, count: int) -> list[int]:
        """Return the sorted indices of the tensors of one step; a pure function of the arguments.

        Parameters
        ----------
        seed, step : int
            Unsigned, 64-bit.
        count : int
            Number of tensors.
        """
        order = np.argsort(noise(count, seed=seed, tensor=BLOCK_ID, draw=step), kind="stable")
        return sorted(order[: max(1, round(self.share * count))].tolist())

    def settings(self) -> dict[str, Any]:
        """Return the name and the constructor's arguments."""
        return {"name": self.name, "share": self.share}
