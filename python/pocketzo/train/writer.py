"""Writing a run folder: journal, metrics and snapshots."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from pocketzo.formats.files import atomic_file
from pocketzo.formats.journal import Entry, Journal
from pocketzo.formats.snapshot import write_snapshot
from pocketzo.optim.optimizer import Optimizer
from pocketzo.train.recipe import Recipe
from pocketzo.train.run import JOURNAL, METRICS, SNAPSHOTS, Run

_SYNC_SECONDS = 30.0


class RunWriter:
    """Writes a run; create with :meth:`begin` or :meth:`resume`. The journal is locked against other processes."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        self._journal = journal
        self._metrics: TextIO = (path / METRICS).open("a", buffering=1)
        self._synced = time.monotonic()

    @classmethod
    def begin(cls, path: Path, recipe: Recipe) -> Self:
        """Begin a run; raise :class:`pocketzo.JournalError` if the folder already holds one."""
        path.mkdir(parents=True, exist_ok=True)
        journal = Journal.create(path / JOURNAL, recipe.header())
        (path / METRICS).unlink(missing_ok=True)
        shutil.rmtree(path / SNAPSHOTS, ignore_errors=True)
        return cls(path, journal)

    @classmethod
    def resume(cls, run: Run, steps: int) -> Self:
        """Resume a run after its first ``steps`` steps."""
        journal = Journal.open(run.path / JOURNAL)
        if journal.notice:
            warnings.warn(journal.notice, stacklevel=4)
        journal.truncate(steps)
        lines = [line for line in run.metrics() if line["step"] <= steps]
        with atomic_file(run.path / METRICS) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        for pattern in ".*.part", f"{SNAPSHOTS}/.*.part":  # left by a process that was killed while writing
            for left in run.path.glob(pattern):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        return cls(run.path, journal)

    @property
    def steps(self) -> int:
        """Number of steps in the journal."""
        return self._journal.count

    def append(self, entry: Entry) -> None:
        """Append a step to the journal; sync the journal if the last sync was over half a minute ago."""
        self._journal.append(entry)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._journal.sync()
            self._synced = time.monotonic()

    def truncate(self, steps: int) -> None:
        """Drop all steps after the first ``steps`` from the journal."""
        self._journal.truncate(steps)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        self._metrics.write(json.dumps(line) + "\n")

    def snapshot(self, optimizer: Optimizer) -> None:
        """Save the weights and the optimizer's state; only the last snapshot is kept."""
        position = self._journal.position(optimizer.step_number)
        write_snapshot(self.path / SNAPSHOTS, position, optimizer.model.weights.save, optimizer.state())

    def close(self) -> None:
        """Write everything to storage and release the run."""
        self._metrics.close()
        self._journal.sync()
        self._journal.close()

    def discard(self) -> None:
        """Remove the journal and metrics of a run without steps, as they would block a run with other settings."""
        for name in JOURNAL, METRICS:
            (self.path / name).unlink(missing_ok=True)
