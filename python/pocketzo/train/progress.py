"""What a run reports after each step."""

from __future__ import annotations

from dataclasses import dataclass

from pocketzo.optim.optimizer import StepInfo


@dataclass(frozen=True)
class Progress:
    """Argument of the callback of :class:`Trainer`, after every step.

    Attributes
    ----------
    info : StepInfo
        Result of the step.
    steps : int
        Length of the run.
    seconds : float
        Wall time of the step.
    evaluation : dict or None
        Result of :func:`evaluate` after this step, if there was an evaluation.
    """

    info: StepInfo
    steps: int
    seconds: float
    evaluation: dict[str, float] | None
