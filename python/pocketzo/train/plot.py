"""The picture of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.errors import MissingExtraError
from pocketzo.formats.files import atomic_file
from pocketzo.train.run import Run

_RAW, _LINE, _EVAL = "#c3cfe2", "#1f4e9c", "#c8551b"


def smooth(values: NDArray[np.float64], weight: float = 0.95) -> NDArray[np.float64]:
    """Return the running mean in which each older value counts ``weight`` times the next; NaN counts nothing."""
    out = np.empty(len(values))
    total = count = 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, count = weight * total + value, weight * count + 1
        out[i] = total / count if count else np.nan
    return out


def plot_run(run: str | os.PathLike[str]) -> Path:
    """Draw the loss, and the accuracy where there were evaluations, from ``metrics.jsonl`` into ``loss.png``.

    Parameters
    ----------
    run : path-like
        The run's folder.

    Returns
    -------
    Path
        The picture.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error

    past = Run(run)
    lines = list(past.metrics())
    steps, losses = _series([(line["step"], line["loss"]) for line in lines if "loss" in line])
    evaluations = [(line["step"], line["eval"]) for line in lines if "eval" in line]
    before = past.recipe.data.source.before
    if before:
        evaluations.insert(0, (0, before))
    eval_steps, eval_losses = _series([(step, result.get("loss")) for step, result in evaluations])
    _, accuracies = _series([(step, result.get("accuracy")) for step, result in evaluations])
    panels = 2 if np.isfinite(accuracies).any() else 1

    figure = Figure(figsize=(7.2, 1.2 + 2.5 * panels), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: list[Any] = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0].tolist()
    method = past.recipe.method
    figure.suptitle(
        f"{past.path.resolve().name}: {method['method'].upper()}, lr {method['lr']:g}, eps {method['eps']:g}, "
        f"batch {past.recipe.loop.batch_size}, seed {method['seed']}",
        fontsize=10,
    )
    axes[0].plot(steps, losses, color=_RAW, linewidth=0.8, label="training, each step's batch")
    axes[0].plot(steps, smooth(losses), color=_LINE, linewidth=1.8, label="training, smoothed")
    if np.isfinite(eval_losses).any():
        axes[0].plot(eval_steps, eval_losses, "o-", color=_EVAL, markersize=4, linewidth=1.2, label="evaluation")
    axes[0].set_ylabel("loss")
    axes[0].legend(fontsize=8, frameon=False)
    if panels == 2:
        axes[1].plot(eval_steps, accuracies, "o-", color=_EVAL, markersize=4, linewidth=1.2)
        best = int(np.nanargmax(accuracies))
        axes[1].annotate(
            f"{100 * accuracies[best]:.1f} %",
            (eval_steps[best], accuracies[best]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        axes[1].margins(y=0.15)
        axes[1].set_ylabel("evaluation accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    out = past.path / "loss.png"
    with atomic_file(out) as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]
    return out


def _series(pairs: list[tuple[int, float | None]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return steps and values; what was not finite, None in the file, is NaN."""
    steps = np.array([step for step, _ in pairs], np.int64)
    return steps, np.array([np.nan if value is None else value for _, value in pairs], np.float64)
