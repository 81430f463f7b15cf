"""Whether a run helped: a comparison of two evaluations, or of training losses, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketzo.tasks.evaluate import Evaluation
from pocketzo.tasks.metrics import METRICS, Metric

BOOTSTRAP_SAMPLES = 200
BEYOND = 2.0  # standard errors: by chance alone, one run in twenty
WINDOW = 0.1  # of the steps: what the training losses of the beginning and the end are averaged over


@dataclass(frozen=True)
class Verdict:
    """How much better or worse a model became.

    Attributes
    ----------
    what : str
        The metric, or "training loss".
    before, after : float
    error : float
        The standard error of the difference; NaN if it is unknown.
    outcome : {"better", "worse", "not moved"}
        Whether the difference is beyond two standard errors.
    text : str
        The comparison, with its figures.
    advice : str or None
        What to try, if the model is not better.
    """

    what: str
    before: float
    after: float
    error: float
    outcome: Literal["better", "worse", "not moved"]
    text: str
    advice: str | None


def compare_evaluations(metric: Metric, before: Evaluation, after: Evaluation) -> Verdict:
    """Compare two evaluations of the same examples.

    The standard error is that of a paired bootstrap with a fixed seed. Examples are resampled; for a metric of the
    loss, batches.
    """
    differences = []
    for seed in range(BOOTSTRAP_SAMPLES):
        first, second = (metric(one.resampled(np.random.default_rng(seed))) for one in (before, after))
        differences.append(second - first)
    one_unit = metric.of_loss and before.losses.size < 2
    error = math.nan if one_unit else float(np.std(differences, ddof=1))
    return _judge(metric.name, metric, before.values[metric.name], after.values[metric.name], error)


def compare_values(metric: Metric, before: float, after: float, count: int) -> Verdict:
    """Compare two values of a metric over ``count`` examples, where nothing else is known.

    The standard error is that of a share, two independent samples, and unknown for a metric that is no share.
    """
    is_share = metric.name in ("accuracy", "subset-accuracy")
    variance = sum(value * (1 - value) / count for value in (before, after)) if is_share else math.nan
    return _judge(metric.name, metric, before, after, math.sqrt(variance))


def compare_batches(name: str, before: Sequence[float], after: Sequence[float]) -> Verdict:
    """Compare the training losses of the same batches before and after a run.

    Parameters
    ----------
    name : str
        What is minimised.
    before, after : sequence of float
        One for each batch, at least 2.
    """
    first, last = np.array(before), np.array(after)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float((last - first).std(ddof=1)) / math.sqrt(first.size)
        if last.min() > first.max() or last.max() < first.min():
            error = math.nan  # no batch is like one before: large losses vary much, and no error would exceed them
        means = float(first.mean()), float(last.mean())
    return _judge(f"training {name}", _lower_is_better(name), *means, error)


def compare_losses(name: str, losses: Sequence[float]) -> Verdict | None:
    """Compare the training losses of the first and last tenth of the steps; None for fewer than 20 steps.

    Parameters
    ----------
    name : str
        What is minimised.
    losses : sequence of float
        One for each step, each of another batch.
    """
    count = int(WINDOW * len(losses))
    if count < 2:
        return None
    first, last = np.array(losses[:count]), np.array(losses[-count:])
    with np.errstate(invalid="ignore", over="ignore"):
        error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / count)
        means = float(first.mean()), float(last.mean())
    return _judge(f"training {name}", _lower_is_better(name), *means, error)


def _lower_is_better(name: str) -> Metric:
    return Metric(name, "loss", float, higher_is_better=False, text=METRICS["loss"].text)


def _judge(what: str, metric: Metric, before: float, after: float, error: float) -> Verdict:
    gain = metric.score({metric.name: after}) - metric.score({metric.name: before})
    margin = BEYOND * error if math.isfinite(error) else 0.0
    outcome: Literal["better", "worse", "not moved"]
    if not math.isfinite(after):
        outcome = "worse"
    elif math.isnan(gain) or abs(gain) <= margin:
        outcome = "not moved"
    else:
        outcome = "better" if gain > 0 else "worse"
    figures = f"from {metric.format(before)} to {metric.format(after)}"
    beyond = ""
    if math.isfinite(error):
        figures += f" (standard error of the difference {metric.format(error)})"
        beyond = " beyond two standard errors"
    if outcome == "not moved":
        text = f"{what} did not move{beyond}: {figures}"
        return Verdict(what, before, after, error, outcome, text, "try ten times the lr, or more steps")
    text = f"{what} {'rose' if after > before else 'fell' if after < before else 'changed'} {figures}"
    advice = None if outcome == "better" else "the run made the model worse: try a tenth of the lr"
    return Verdict(what, before, after, error, outcome, text, advice)
