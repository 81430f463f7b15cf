"""Plot of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.formats.staging import staged_file
from pocketzo.packages import require
from pocketzo.tasks.metrics import METRICS
from pocketzo.train.run import Run

PLOT: Final = "loss.png"
_RAW, _LINE, _EVAL = "#c3cfe2", "#1f4e9c", "#c8551b"


def smooth(values: NDArray[np.float64], weight: float = 0.95) -> NDArray[np.float64]:
    """Return the exponential moving average with decay ``weight``; values that are not finite are ignored."""
    out = np.empty(len(values))
    total = count = 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, count = weight * total + value, weight * count + 1
        out[i] = total / count if count else np.nan
    return out


def plot_run(run: str | os.PathLike[str]) -> Path:
    """Plot the minimised values, and the run's metric if there were evaluations, to ``loss.png``.

    If the metric is the loss, accuracy or another metric that was evaluated is plotted in its place.

    Parameters
    ----------
    run : path-like
        The run's folder.

    Returns
    -------
    Path
        ``loss.png`` in the run's folder.

    Raises
    ------
    MissingExtraError, BrokenPackageError
        matplotlib is not installed, or cannot be imported.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    past = Run(run)
    lines = past.metrics()
    steps, losses = _series([(line["step"], line["loss"]) for line in lines if "loss" in line])
    evaluations = sorted(past.evaluations().items())
    loop = past.recipe.loop
    eval_steps, eval_costs = _series([(step, _cost(result, loop.objective)) for step, result in evaluations])
    shown = next((name for name in (loop.metric, *METRICS) if name != "loss" and _known(evaluations, name)), None)
    panels = 1 if shown is None else 2

    figure = Figure(figsize=(7.2, 1.2 + 2.5 * panels), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: list[Any] = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0].tolist()
    method = past.recipe.method
    name = os.fsencode(past.path.resolve().name).decode(errors="replace")
    figure.suptitle(
        f"{name}: {method['method'].upper()}, lr {method['lr']:g}, eps {method['eps']:g}, "
        f"batch {loop.batch_size}, seed {method['seed']}",
        fontsize=10,
    )
    axes[0].plot(steps, losses, color=_RAW, linewidth=0.8, label="training, each step's batch")
    axes[0].plot(steps, smooth(losses), color=_LINE, linewidth=1.8, label="training, smoothed")
    if np.isfinite(eval_costs).any():
        axes[0].plot(eval_steps, eval_costs, "o-", color=_EVAL, markersize=4, linewidth=1.2, label="evaluation")
    axes[0].set_ylabel(loop.minimised)
    axes[0].legend(fontsize=8, frameon=False)
    if shown is not None:
        metric = METRICS[shown]
        _, values = _series([(step, result.get(shown)) for step, result in evaluations])
        axes[1].plot(eval_steps, values, "o-", color=_EVAL, markersize=4, linewidth=1.2)
        best = int(np.nanargmax(values if metric.higher_is_better else -values))
        axes[1].annotate(
            metric.format(float(values[best])),
            (eval_steps[best], values[best]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        axes[1].margins(y=0.15)
        axes[1].set_ylabel(f"evaluation {shown}")
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: metric.format(value)))
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    out = past.path / PLOT
    with staged_file(out) as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]
    return out


def _cost(evaluation: Mapping[str, float | None], objective: str | None) -> float | None:
    """Return the value of the minimised objective on the evaluation data."""
    value = None if objective is None else evaluation.get(objective)
    return None if value is None or objective is None else METRICS[objective].cost(value)


def _known(evaluations: list[tuple[int, dict[str, float | None]]], name: str) -> bool:
    """Whether at least one evaluation of a metric was finite."""
    return any(result.get(name) is not None for _, result in evaluations)


def _series(pairs: list[tuple[int, float | None]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return steps and values; values that were not finite (None in the file) are NaN."""
    steps = np.array([step for step, _ in pairs], np.int64)
    return steps, np.array([np.nan if value is None else value for _, value in pairs], np.float64)
