"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pocketzo.arguments import check_integer


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run, as a factor of its peak.

    Attributes
    ----------
    kind : {"constant", "linear", "cosine"}
        Constant, or decay to 0 at ``steps`` along a line or half a cosine.
    steps : int
        Length of the run; ignored for "constant".
    warmup : int
        Steps over which the rate first rises linearly from 0.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be 'constant', 'linear' or 'cosine', got {self.kind!r}")
        check_integer("steps", self.steps, 0)
        check_integer("warmup", self.warmup, 0)
        if self.kind != "constant" and self.steps <= self.warmup:
            raise ValueError(f"a {self.kind} schedule needs 0 <= warmup < steps, got {self.warmup} and {self.steps}")

    def __call__(self, step: int) -> float:
        """Return the factor for step number ``step``, which counts from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
