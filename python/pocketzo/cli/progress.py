"""Training with a live display and signal handling."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Self

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pocketzo.cli.console import duration, err, metric_text, note, size_text, sweep_text
from pocketzo.machine.memory import process_memory
from pocketzo.train.progress import Progress
from pocketzo.train.trainer import Trainer


def fit_shown(trainer: Trainer, again: str) -> int | None:
    """Train with a display; return the signal that ended training early, or None."""
    with _Display(trainer) as display, _Signals(trainer, again) as signals:
        trainer.callback = display.update
        trainer.fit()
    return signals.received


def find_lr_shown(trainer: Trainer) -> None:
    """Find the learning rate of a run with a display; print what it has cost, and the choice."""
    with _Counted("finding the learning rate", "forward passes") as shown:
        sweep = trainer.find_lr(shown.update)
    note(f"{sweep_text(sweep)}; it took {duration(shown.seconds)}" if sweep.forwards else sweep_text(sweep))


class _Signals:
    """The first Ctrl-C or SIGTERM ends training after the current step, the second immediately."""

    def __init__(self, trainer: Trainer, again: str) -> None:
        self.received: int | None = None
        self._trainer = trainer
        self._again = again

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        # After a first signal, a second one that comes late may not end the process before it has said how to go on.
        for number, handler in self._before.items():
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            cursor = "\x1b[?25h" if err.is_terminal else ""  # the display has hidden it
            _write(f"{cursor}\npocketzo: ended at once; to go on: {self._again}")
            # Like a kill: an exception in the middle of a step would add it to the journal as one that moved nothing.
            os._exit(128 + number)
        self.received = number
        self._trainer.stop_requested = True
        text = "stopping after this step; again to end at once"
        try:
            note(text)
        except RuntimeError:  # the signal has come in the middle of a write to the same stream
            _write(text)


def _write(text: str) -> None:
    """Print a line to standard error from a handler that may have interrupted a write to it."""
    os.write(2, f"{text}\n".encode(errors="replace"))


def _live() -> Live | None:
    """Return a live display; None where the terminal has none."""
    return Live(console=err, auto_refresh=False) if err.is_terminal and not err.is_dumb_terminal else None


def _bar(done: int, total: int, text: str) -> Table:
    table = Table.grid(expand=True)
    table.add_row(ProgressBar(total=total, completed=done))
    table.add_row(Text(text))
    return table


class _Counted:
    """Progress of what is counted: live on a terminal; elsewhere a plain line every ``seconds_between_lines``."""

    def __init__(self, title: str, unit: str, seconds_between_lines: float = 10.0) -> None:
        self._title, self._unit = title, unit
        self._live = _live()
        self._interval = 0.1 if self._live else seconds_between_lines
        self._started = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, most: int) -> None:
        """Show how much is done, of so much at most, if that is due."""
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        left = duration(self.seconds / done * (most - done))
        line = f"{self._title}: {done:,} of at most {most:,} {self._unit} · at most {left} left"
        if self._live is not None:
            self._live.update(_bar(done, most, line), refresh=True)
        else:
            note(line)


class _Display:
    """Progress of training: live on a terminal; elsewhere a plain line every ``seconds_between_lines``."""

    def __init__(self, trainer: Trainer, seconds_between_lines: float = 10.0) -> None:
        self._steps = trainer.loop.steps
        self._metric = trainer.loop.metric
        self._minimised = trainer.loop.minimised
        self._first = trainer.optimizer.step_number
        self._interval = seconds_between_lines
        self._live = _live()
        self._loss = _Smoothed(0.95)
        self._seconds = _Smoothed(0.9)
        self._evaluation = ""
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None and self._first < self._steps:
            self._live.start()
            self._live.update(_bar(self._first, self._steps, "the first step"), refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Add a step; refresh the display if due."""
        done = progress.info.step + 1
        self._loss.add(progress.info.loss)
        self._seconds.add(progress.seconds)
        if progress.evaluation is not None:
            text = metric_text(self._metric, progress.evaluation)
            self._evaluation = f"evaluation at {done}: {self._metric} {text}"
        now = time.monotonic()
        due = now - self._shown >= (0.1 if self._live else self._interval)
        if due or done == self._steps or (self._live is None and progress.evaluation is not None):
            self._shown = now
            if self._live is not None:
                self._live.update(_bar(done, self._steps, self._line(done, now)), refresh=True)
            else:
                note(self._line(done, now))

    def _line(self, done: int, now: float) -> str:
        per_step = max(self._seconds.value, 1e-9)
        left = (now - self._started) / max(done - self._first, 1) * (self._steps - done)
        resident, peak = process_memory()
        memory = [] if resident is None else [size_text(resident)]
        memory += [] if peak is None else [f"peak {size_text(peak)}"]
        parts = [
            f"step {done}/{self._steps}",
            f"{self._minimised} {self._loss.value:.4f}",
            f"{1 / per_step:.1f} steps/s" if per_step < 1 else f"{per_step:.1f} s/step",
            ", ".join(memory),
            f"{duration(left)} left",
            self._evaluation,
        ]
        return " · ".join(part for part in parts if part)


class _Smoothed:
    """Exponential moving average with decay ``weight``; ignores values that are not finite."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._total = self._count = 0.0

    def add(self, value: float) -> None:
        if abs(value) < float("inf"):
            self._total = self._weight * self._total + value
            self._count = self._weight * self._count + 1

    @property
    def value(self) -> float:
        return self._total / self._count if self._count else float("nan")
