"""Arguments that are a bundle or a run."""

from __future__ import annotations

from pathlib import Path

import click

from pocketzo.cli.console import note
from pocketzo.errors import BundleError, JournalError
from pocketzo.train.run import Run


def as_run(path: Path) -> Run | None:
    """Return the run at a path, or None if there is a bundle."""
    if (path / "journal.pzj").is_file():
        run = Run(path)
        if run.notice:
            note(f"note: {run.notice}")
        return run
    if (path / "bundle.json").is_file():
        return None
    if not path.exists():
        raise BundleError(f"{path}: no such bundle or run")
    raise BundleError(f"{path}: neither a bundle (there is no bundle.json in it) nor a run (no journal.pzj)")


def chosen_step(run: Run, step: int | None, best: bool) -> int:
    """Return the number of steps that ``--step`` or ``--best`` selects."""
    if step is not None and best:
        raise click.UsageError("--step and --best exclude each other")
    if step is not None and not 0 <= step <= run.steps:
        raise ValueError(f"--step must be 0 to {run.steps}, the steps in the journal of {run.path}; got {step}")
    if best:
        found = run.best_step
        if found is None:
            raise JournalError(f"{run.path}: --best chooses by evaluations, and the run has none with a finite value")
        return found
    return run.steps if step is None else step


def over_steps(run: Run, step: int, average: float | None) -> str:
    """Return in words the steps whose weights are used."""
    first = run.averaged(step, average) + 1
    return f"after step {step}" if first >= step else f"mean after steps {first} to {step}"
