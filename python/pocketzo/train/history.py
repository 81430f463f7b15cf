"""What a run has seen so far: its losses and evaluations, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pocketzo.tasks.evaluate import Evaluation
from pocketzo.tasks.metrics import metric_named
from pocketzo.train.recipe import Loop
from pocketzo.train.run import Run
from pocketzo.train.verdict import Verdict, compare_batches, compare_evaluations, compare_losses, compare_values


class History:
    """The losses and evaluations of a run.

    Attributes
    ----------
    evaluations : dict of int to mapping
        The values of each evaluation, by the number of steps before it.
    losses : list of float
        One for each step.
    batches : tuple of list of float
        The losses of some batches of the training data, before the first step and after the last.
    skipped : int
        The number of the last steps that were undone, as a loss was not finite.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.evaluations: dict[int, Mapping[str, float | None]] = {}
        self.losses: list[float] = []
        self.skipped = 0
        self.batches: tuple[list[float], list[float]] = [], []
        self._details: dict[int, Evaluation] = {}  # of the first and the last evaluation, if this process made them

    def take_up(self, past: Run, steps: int) -> None:
        """Take the first steps of a run that is resumed."""
        self.evaluations = {step: result for step, result in past.evaluations().items() if step <= steps}
        losses = [line["loss"] for line in past.metrics() if "loss" in line and line["step"] <= steps]
        self.losses = [math.nan if loss is None else loss for loss in losses]
        for entry in reversed(past.entries[:steps]):
            if entry.lr or any(entry.coefficients.values()):
                break
            self.skipped += 1

    def add_loss(self, loss: float, *, skipped: bool) -> None:
        """Add a step."""
        self.losses.append(loss)
        self.skipped = self.skipped + 1 if skipped else 0

    def add(self, step: int, evaluation: Evaluation) -> None:
        """Add an evaluation."""
        self.evaluations[step] = evaluation.values
        self._details = {number: one for number, one in self._details.items() if not number} | {step: evaluation}

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations as the run's patience brought nothing better."""
        if self._loop.patience is None or not self.evaluations:
            return False
        steps = sorted(self.evaluations)
        metric = metric_named(self._loop.metric)
        best = max(steps, key=lambda step: metric.score(self.evaluations[step]))
        return len(steps) - 1 - steps.index(best) >= self._loop.patience

    def verdict(self) -> Verdict | None:
        """Compare the first and last evaluation, or else the training losses; None where there is too little."""
        metric, last = metric_named(self._loop.metric), max(self.evaluations, default=0)
        if not last or 0 not in self.evaluations:
            if all(self.batches):
                return compare_batches(self._loop.minimised, *self.batches)
            return compare_losses(self._loop.minimised, self.losses)
        if {0, last} <= self._details.keys():
            return compare_evaluations(metric, self._details[0], self._details[last])
        values = [self.evaluations[step].get(metric.name) for step in (0, last)]
        first, second = (math.nan if value is None else value for value in values)
        return compare_values(metric, first, second, int(self.evaluations[last].get("count") or 1))

    def ruined(self, run: Path | None, *, fp16: bool) -> str:
        """Return what to say after too many steps without a finite loss: since when, and where good weights are."""
        steps = len(self.losses)
        good = steps - self.skipped
        other = ", or a bundle in float32: fp16 ends at 65504" if fp16 else ""
        text = f"the loss was not finite in the last {self.skipped} steps (up to step {steps}), which moved nothing. "
        if not good:
            return f"{text}It was not at the weights that the run began with: try a smaller eps{other}"
        text += f"It was last finite in step {good}, whose update ruined the weights: try a smaller lr or eps{other}"
        if run is None:
            return f"{text}. The weights in memory are ruined: load the model again"
        return f"{text}. The weights before that step: pocketzo replay {run} --step {good - 1} -o OUT"
