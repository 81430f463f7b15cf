"""Formatting and printing of the commands' output."""

from __future__ import annotations

import codecs
import io
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pocketzo.formats.files import named
from pocketzo.tasks.metrics import METRICS
from pocketzo.train.rehearsal import Forecast
from pocketzo.train.run import Run
from pocketzo.train.sweep import NOISE, Sweep
from pocketzo.train.trainer import Trainer


class _Output(Console):
    """Standard output; an error in writing to it names it."""

    def print(self, *objects: Any, **options: Any) -> None:
        with named("standard output"):
            super().print(*objects, **options)


out = _Output(highlight=False, markup=False, emoji=False)
err = Console(highlight=False, markup=False, emoji=False, stderr=True)


def print_any_text(stream: Any) -> None:
    """Make a stream print every character and every file name, in any locale.

    As in PEP 540, the C locale is taken for UTF-8. A byte of a file name that is not UTF-8 is printed as it is.
    """
    if isinstance(stream, io.TextIOWrapper) and "PYTHONIOENCODING" not in os.environ:
        if codecs.lookup(stream.encoding).name in ("ascii", "utf-8"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
        else:
            stream.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    """Print a line to standard error."""
    err.print(text, soft_wrap=True)


def say(text: str = "") -> None:
    """Print a line to standard output."""
    out.print(text, soft_wrap=True)


def write(text: str) -> None:
    """Print a text to standard output as it is, at once."""
    with named("standard output"):
        sys.stdout.write(text)
        sys.stdout.flush()


def evaluation_table(columns: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Return a table of evaluations, one per column."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for metric in METRICS:
        if any(result.get(metric) is not None for result in columns.values()):
            table.add_row(metric, *(metric_text(metric, result) for result in columns.values()))
    return table


def evaluations_of(run: Run, untrained: str | None = None) -> dict[str, dict[str, float | None]]:
    """Return the first, the last and the best evaluation of a run, by what they are called.

    Parameters
    ----------
    run : Run
    untrained : str, optional
        What the first one is called, if the base knows its task.
    """
    found, best = run.evaluations(), run.best_step
    last = max(found, default=0)
    columns = {untrained or "before": found[0]} if 0 in found else {}
    columns |= {f"after step {last}": found[last]} if last else {}
    return columns | ({f"best, step {best}": found[best]} if best else {})


def metric_text(name: str, evaluation: Mapping[str, float | None]) -> str:
    """Return one result of an evaluation as text."""
    return METRICS[name].format(evaluation.get(name))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values as a table."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), fact(name, value))
    out.print(table)


def fact(name: str, value: Any) -> str:
    """Return a value as text."""
    if name.endswith("bytes"):
        return size_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if name == "forward_seconds" and value:
        return ", ".join(f"{threads}: {_milliseconds(seconds)}" for threads, seconds in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(key, item)}" for key, item in value.items() if item not in (None, []))
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], dict) and "dtype" in value[0]:
            return ", ".join(f"{item['name']} {item['dtype']}[{', '.join(map(str, item['shape']))}]" for item in value)
        return ", ".join(fact("", item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def size_text(count: float) -> str:
    """Return a number of bytes as text."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.0f} {unit}" if count >= 100 * size else f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _milliseconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def forecast_text(trainer: Trainer, forecast: Forecast) -> str:
    """Return what is known of a run before its first step, in two lines."""
    longest = ""
    if forecast.longest is not None:
        longest = f"the longest example has {forecast.longest} tokens ({forecast.where}); "
    memory = "" if forecast.memory is None else f", peak memory {size_text(forecast.memory)}"
    left = trainer.loop.steps - trainer.optimizer.step_number
    about = "about " if trainer.optimizer.pace is not None else ""
    steps = f"{left:,} step{'s' * (left > 1)} of {about}{trainer.optimizer.forwards} forward passes"
    together = ""
    if trainer.optimizer.share is not None:
        steps, together = f"{left:,} step{'s' * (left > 1)}", ", all directions at once,"
    evaluations = f" and {forecast.evaluations} evaluations" if forecast.evaluations else ""
    time = f"about {duration(forecast.seconds)}" if forecast.seconds >= 1 else "less than a second"
    forward = _milliseconds(forecast.forward_seconds)
    return (
        f"{longest}a forward pass of the largest batch{together} takes {forward}{memory}\n"
        f"{steps}{evaluations} will take {time}"
    )


def sweep_text(sweep: Sweep) -> str:
    """Return how a learning rate was found."""
    if sweep.because is not None:
        return f"lr {sweep.lr:g}, the default: {sweep.because}"
    limits = (
        f"one step is best at {sweep.minimum:g}, the noise of the run costs {NOISE:.0%} of the loss at {sweep.noise:g}"
    )
    return f"lr {sweep.lr:g}, found in {sweep.forwards} forward passes: {limits}"


def duration(seconds: float) -> str:
    """Return seconds as [hours:]minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quoted(path: str | os.PathLike[str]) -> str:
    """Return a path quoted for a shell."""
    return shlex.quote(os.fspath(path))
