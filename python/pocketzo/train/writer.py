"""Writing a run folder: journal, metrics and snapshots."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from pocketzo.errors import JournalError
from pocketzo.formats.files import append, make_folder, named, sync_folder
from pocketzo.formats.journal import Entry, Journal
from pocketzo.formats.safetensors import file_sha256, write
from pocketzo.formats.snapshot import prune_snapshots, write_snapshot
from pocketzo.formats.staging import staged_file
from pocketzo.optim.optimizer import Optimizer
from pocketzo.train.recipe import Recipe
from pocketzo.train.run import INIT, JOURNAL, METRICS, SNAPSHOTS, Run

_SYNC_SECONDS = 30.0


class RunWriter:
    """Writes a run; create with :meth:`begin` or :meth:`resume`. The journal is locked against other processes."""

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        self._journal = journal
        self._metrics = (path / METRICS).open("ab", buffering=0)
        self._synced = time.monotonic()

    @classmethod
    def begin(cls, path: Path, recipe: Recipe, init: Mapping[str, NDArray[Any]] | None = None) -> Self:
        """Begin a run; raise :class:`pocketzo.JournalError` if the folder already holds one.

        ``init`` are the weights that begin with other values than the bundle's, which the folder keeps.
        """
        make_folder(path)
        for name in METRICS, SNAPSHOTS:
            if os.path.lexists(path / name) and not (path / JOURNAL).exists():
                raise JournalError(f"{path / name} is there already, of a run without a journal: choose another folder")
        if init and not (path / JOURNAL).exists():
            write(path / INIT, init.items())  # before the journal, which is of no use without it
            recipe = replace(recipe, model=replace(recipe.model, init_sha256=file_sha256(path / INIT)))
        writer = cls(path, Journal.create(path / JOURNAL, recipe.header()))
        sync_folder(path)
        return writer

    @classmethod
    def resume(cls, run: Run, steps: int) -> Self:
        """Resume a run after its first ``steps`` steps."""
        journal = Journal.open(run.path / JOURNAL)
        if journal.notice:
            warnings.warn(journal.notice, stacklevel=4)
        journal.truncate(steps)
        lines = [line for line in run.metrics() if line["step"] <= steps]
        with staged_file(run.path / METRICS) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        prune_snapshots(run.path / SNAPSHOTS, journal.position, steps)
        return cls(run.path, journal)

    @property
    def steps(self) -> int:
        """Number of steps in the journal."""
        return self._journal.count

    def append(self, entry: Entry) -> None:
        """Append a step to the journal; sync the journal if the last sync was over half a minute ago."""
        self._journal.append(entry)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Flush the journal to storage."""
        self._journal.sync()
        self._synced = time.monotonic()

    def truncate(self, steps: int) -> None:
        """Drop all steps after the first ``steps`` from the journal."""
        self._journal.truncate(steps)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the metrics. An evaluation, which no later line repeats, is on storage at once."""
        path = self.path / METRICS
        append(self._metrics, json.dumps(line).encode() + b"\n", os.fstat(self._metrics.fileno()).st_size, path)
        if "without" in line:
            with named(path):
                os.fsync(self._metrics)

    def snapshot(self, optimizer: Optimizer) -> None:
        """Save the weights and the optimizer's state; only the last snapshot is kept."""
        self.sync()  # a snapshot of steps that a power cut took from the journal could not be used
        position = self._journal.position(optimizer.step_number)
        write_snapshot(self.path / SNAPSHOTS, position, optimizer.model.weights.save, optimizer.state())

    def close(self) -> None:
        """Write everything to storage and release the run."""
        try:
            with self._metrics, named(self.path / METRICS):
                os.fsync(self._metrics)
            self._journal.sync()
        finally:
            self._journal.close()

    def discard(self) -> None:
        """Remove the journal and metrics of a run without steps, as they would block a run with other settings."""
        for name in METRICS, JOURNAL, INIT:  # while there is a journal, it is a run
            (self.path / name).unlink(missing_ok=True)
