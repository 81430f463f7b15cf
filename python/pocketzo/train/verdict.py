"""What a run achieved: whether its evaluation or its loss moved by more than noise, and what to try if it did not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pocketzo.tasks.metrics import METRICS, metric_named
from pocketzo.train.run import EVAL, SAMPLE, Run

_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, 97.5 %, 1 to 10 degrees of freedom
_RUIN = 100.0  # times its value: a loss that rose so far is no noise, though a few examples may have most of it
_ROUNDING = 1e-6  # relative; a change below it may come from roundings of the forward pass
_LEAST_STEPS = 8  # below it, the losses of the first and the last steps are not compared
_WINDOW = 0.2, 100  # share of the steps, and most steps, that are the first or the last ones


@dataclass(frozen=True)
class Change:
    """A value before and after a run.

    Attributes
    ----------
    name : str
        What changed.
    before, after : float
        NaN for a value that was not finite.
    error : float or None
        Standard error of the difference; None if it is not known.
    significance : float
        Number of standard errors beyond which a difference is no noise (5 % two-sided).
    higher_is_better : bool
    text : callable
        ``text(value) -> str``.
    """

    name: str
    before: float
    after: float
    error: float | None
    significance: float
    higher_is_better: bool
    text: Callable[[float], str]

    @property
    def verdict(self) -> Literal["better", "worse", "unmoved"]:
        """Whether the value is better, worse, or within the noise; one that is no longer finite is worse."""
        if not math.isfinite(self.after):
            return "worse" if math.isfinite(self.before) else "unmoved"
        if not math.isfinite(self.before):
            return "better"
        if not self.higher_is_better and self.after > _RUIN * self.before > 0:
            return "worse"
        difference = self.after - self.before
        if abs(difference) <= _ROUNDING * abs(self.before) or (
            self.error is not None and abs(difference) <= self.significance * self.error
        ):
            return "unmoved"
        return "better" if (difference > 0) == self.higher_is_better else "worse"

    @property
    def is_slight(self) -> bool:
        """Whether a value that is to be small moved by less than 1 %."""
        return not self.higher_is_better and abs(self.after - self.before) < 0.01 * abs(self.before)

    def __str__(self) -> str:
        before, after = (self.text(value) if math.isfinite(value) else "nan" for value in (self.before, self.after))
        if not (math.isfinite(self.before) and math.isfinite(self.after)):
            return f"{self.name} went from {before} to {after}"
        difference = self.after - self.before
        if difference == 0:
            return f"{self.name} did not move: {after}"
        moved = "did not move beyond its noise" if self.verdict == "unmoved" else "rose" if difference > 0 else "fell"
        error = "unknown" if self.error is None else self._small(self.error)
        return (
            f"{self.name} {moved}: from {before} to {after}, a difference of {self._small(abs(difference))} with a "
            f"standard error of {error}"
        )

    def _small(self, value: float) -> str:
        """Return a value as text that may be too small for the digits of the metric."""
        text = self.text(value)
        return text if re.search("[1-9]", text) else f"{value:.2g}"


def verdict(run: Run, *, ended: bool = False) -> list[str]:
    """Return in sentences what a run achieved, and what to try if it did not improve.

    Parameters
    ----------
    run : Run
    ended : bool
        Whether the training loss has risen clearly above its best (:mod:`pocketzo.train.guard`).

    Returns
    -------
    list of str
        A line for each value that was compared, and one for each thing to try.
    """
    changes = evaluation_changes(run, run.steps)
    if not changes and (change := training_change(run)) is not None:
        changes = [change]
    best = run.best_step if run.evaluations() else None
    lines = [str(change) for change in changes]
    if not changes and run.steps:
        lines.append("too few steps to say whether the loss moved beyond its noise")
    return lines + [f"try: {advice}" for advice in _advice(run, changes, best, ended)]


def worse_than_before(run: Run, step: int) -> str | None:
    """Return a sentence if the last evaluation up to a step was worse than the one before the run, else None.

    The metric of the run decides; if it did not move, another metric.
    """
    changes = evaluation_changes(run, step)
    worse = [change for change in changes if change.verdict == "worse"]
    if not worse or changes[0].verdict == "better":
        return None
    return f"the weights after step {step} are worse than those before the run: {worse[0]}"


def evaluation_changes(run: Run, step: int) -> list[Change]:
    """Compare the last evaluation up to a step with the one before the run; the metric of the run comes first.

    Without evaluation data, these are the evaluations on some training data; without these either, nothing is returned.
    The standard error is that of the delete-a-group jackknife of the difference, which is paired: both evaluations use
    the same examples.
    """
    kind = EVAL if run.evaluations() else SAMPLE
    lines = {line["step"]: line for line in run.metrics() if kind in line and line["step"] <= step}
    if 0 not in lines or len(lines) < 2:
        return []
    before, after = lines[0], lines[max(lines)]
    judged = run.recipe.loop.metric
    names = [name for name in METRICS if name in before[kind] and name in after[kind]]
    of = "" if kind == EVAL else " of some training examples"
    changes = []
    for name in sorted(names, key=lambda name: name != judged):
        metric = metric_named(name)
        error, parts = _jackknife(*(line.get("without", {}).get(name, ()) for line in (before, after)))
        first, last = (_number(line[kind][name]) for line in (before, after))
        significance = _significance(parts - 1)
        changes.append(Change(name + of, first, last, error, significance, metric.higher_is_better, metric.text))
    return changes


def training_change(run: Run) -> Change | None:
    """Compare the losses of the first and of the last steps, each of its own batch; None if there are too few."""
    losses = np.array([_number(line["loss"]) for line in run.metrics() if "loss" in line and line["step"] <= run.steps])
    losses = losses[np.isfinite(losses)]
    if losses.size < _LEAST_STEPS:
        return None
    count = max(_LEAST_STEPS // 2, min(_WINDOW[1], round(_WINDOW[0] * losses.size)))
    first, last = losses[:count], losses[-count:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count)
    name = f"{run.recipe.loop.minimised} of the first and the last {count} steps"
    significance, text = _significance(2 * count - 2), "{:.4g}".format
    return Change(name, float(first.mean()), float(last.mean()), error, significance, False, text)


def _advice(run: Run, changes: Sequence[Change], best: int | None, ended: bool) -> list[str]:
    method, loop = run.recipe.method, run.recipe.loop
    if method["lr"] == 0:
        return ["a --lr above 0"]
    advice: list[str] = []
    verdicts = [change.verdict for change in changes]
    updates = [entry for entry in run.entries if entry.lr]
    blind = sum(not any(entry.coefficients.values()) for entry in updates)
    if blind > len(updates) / 2 and "worse" not in verdicts:
        coarse = "" if loop.objective in (None, "loss", "perplexity") else " and a larger --batch-size"
        return [
            f"a larger --eps{coarse}: in {blind} of {run.steps} steps all losses were equal with an eps of "
            f"{method['eps']:g}, so that nothing was learnt"
        ]
    undone = run.steps - len(updates)
    if undone:
        advice.append(f"a smaller --lr or --eps: {undone} of {run.steps} steps were undone, as losses were not finite")
    if ended and "worse" not in verdicts:
        return [*advice, f"a third of the lr, --lr {method['lr'] / 3:.2g}"]
    if not changes:
        return advice
    if verdicts[0] == "worse" or (verdicts[0] == "unmoved" and "worse" in verdicts):
        kept = ""
        if best not in (None, run.steps) and worse_than_before(run, best) is None:
            kept = f", or --best, which gives step {best}"
        advice.append(f"a tenth of the lr, --lr {method['lr'] / 10:g}{kept}: {_named(changes, 'worse')} got worse")
    elif verdicts[0] == "unmoved" and "better" in verdicts:
        advice.append(
            f"more --steps, or, if {_named(changes, 'better')} improved too slowly, ten times the lr, "
            f"--lr {10 * method['lr']:g}"
        )
    elif verdicts[0] == "unmoved":
        larger = "" if best is None else ", or more examples in --eval, if less than this noise matters"
        advice.append(f"more --steps, or ten times the lr, --lr {10 * method['lr']:g}{larger}")
    elif changes[0].is_slight:
        advice.append(f"ten times the lr, --lr {10 * method['lr']:g}: {changes[0].name} moved by less than 1 %")
    elif "worse" in verdicts:
        advice.append(
            f"a smaller --lr, if {_named(changes, 'worse')} matters, which got worse while {changes[0].name} improved"
        )
    return advice


def _named(changes: Sequence[Change], verdict: str) -> str:
    return " and ".join(change.name for change in changes if change.verdict == verdict)


def _jackknife(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[float | None, int]:
    """Return the standard error of a difference, from its values without each part of the data, and their number."""
    parts = len(before)
    if parts < 2 or parts != len(after):
        return None, 0
    differences = np.array([_number(a) - _number(b) for a, b in zip(after, before, strict=True)])
    if not np.isfinite(differences).all():
        return None, 0
    return float(np.sqrt((parts - 1) / parts * np.sum((differences - differences.mean()) ** 2))), parts


def _significance(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, within 1 %."""
    return _T[degrees - 1] if 1 <= degrees <= len(_T) else 1.96 + 2.6 / max(degrees, 1)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
