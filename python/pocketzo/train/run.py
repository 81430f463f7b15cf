"""A run folder, to read and to replay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pocketzo.errors import JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.journal import Journal
from pocketzo.formats.safetensors import file_sha256
from pocketzo.optim.groups import Tunable
from pocketzo.optim.methods import restore
from pocketzo.optim.optimizer import Optimizer
from pocketzo.runtime.weights import Weights


class Run:
    """A run folder, to read.

    Parameters
    ----------
    path : path
        The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        journal = Journal.open(self.path / "journal.pzj", write=False)
        self.header = journal.header
        self.records = journal.records
        self.notice = journal.notice

    @property
    def steps(self) -> int:
        """Steps that are recorded whole."""
        return len(self.records) // int(self.header["trainer"]["draws"])

    @property
    def best_step(self) -> int:
        """The number of steps after which the evaluation was best; all steps where there was none."""
        evaluations = [line for line in self.metrics() if "eval" in line and line["step"] <= self.steps]
        if not evaluations:
            return self.steps
        name = self.header["trainer"]["metric"]
        return int(max(evaluations, key=lambda line: score(line["eval"], name))["step"])

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Read the lines of ``metrics.jsonl``; an incomplete last one is passed over."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return

    def base(self, bundle: str | os.PathLike[str] | None = None) -> Bundle:
        """Return the bundle that the run started from, which must have the weights of that moment.

        Parameters
        ----------
        bundle : path, optional
            Where it is now; by default where it was.
        """
        recorded = self.header["model"]
        base = Bundle.read(Path(recorded["bundle"]) if bundle is None else Path(bundle))
        for what, path in (("graph", base.model_path), ("weights", base.weights_path)):
            got = file_sha256(path)
            if got != recorded[f"{what}_sha256"]:
                raise JournalError(
                    f"{path}: not the {what} that the run {self.path} started from: SHA-256 is {got}, expected "
                    f"{recorded[f'{what}_sha256']}"
                )
        return base

    def rebuild(self, model: Tunable, *, step: int | None = None) -> Optimizer:
        """Bring the weights of the base bundle to where they were after ``step`` steps, in one pass over them.

        Begins from the last snapshot that is not past ``step``.

        Returns
        -------
        Optimizer
            As it stood then.
        """
        step = self.steps if step is None else step
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be in 0 .. {self.steps}, which is what {self.path} has recorded; got {step}")
        optimizer = restore(model, self.header["method"])
        for number, path in self._snapshots():
            if number <= step and self._is_whole(path):
                model.weights.read(path)
                optimizer.step_number = number
                break
        else:
            model.weights.read()
        optimizer.replay(self.records[optimizer.step_number * optimizer.draws : step * optimizer.draws])
        return optimizer

    def replay(
        self,
        out: str | os.PathLike[str],
        *,
        step: int | None = None,
        bundle: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the bundle as it was after ``step`` steps (all of them by default), bit for bit."""
        model = _Unloaded(self.base(bundle))
        self.rebuild(model, step=step)
        model.bundle.copy_to(Path(out), model.weights.save)

    def _is_whole(self, snapshot: Path) -> bool:
        """Whether a snapshot is what this run has saved; if not, the record alone has to do."""
        whole = False
        with contextlib.suppress(OSError, ValueError):
            seal = json.loads(snapshot.with_suffix(".json").read_text())
            whole = bool(seal == run_seal(self.header, file_sha256(snapshot)))
        if not whole:
            warnings.warn(f"{snapshot}: damaged or of another run, and passed over", stacklevel=4)
        return whole

    def _snapshots(self) -> list[tuple[int, Path]]:
        """Return the snapshots by number of steps, the latest first."""
        found = (
            (re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in self.path.glob("snapshots/step-*")
        )
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


class _Unloaded:
    """A bundle's weights without a session: enough to replay."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.weights = Weights(bundle)
        self.weights.read()


def recorded_packing(settings: Mapping[str, Any]) -> Literal["auto", False]:
    """Return what :func:`load` needs to compute the losses that a run would have had, from its recorded settings."""
    return "auto" if settings.get("packed") else False


def run_seal(header: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    """Return what stands beside a snapshot: what it is, and of which run."""
    return {"sha256": sha256, "run": hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()}


def score(evaluation: Mapping[str, float | None], metric: str) -> float:
    """Return a number that is larger the better the evaluation is."""
    value = evaluation.get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if metric == "loss" else value


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
