"""Reading and replaying a run folder: journal, metrics and snapshots."""

from __future__ import annotations

import math
import os
import reprlib
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pocketzo.arguments import check_number
from pocketzo.errors import BundleError, JournalError
from pocketzo.formats import strict_json
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.bundle_writer import check_target, copy_bundle
from pocketzo.formats.journal import Journal
from pocketzo.formats.safetensors import file_sha256, map_tensors
from pocketzo.formats.snapshot import check_snapshot, snapshots
from pocketzo.formats.staging import is_staged
from pocketzo.optim.groups import Tunable
from pocketzo.optim.methods import METHODS, from_settings
from pocketzo.optim.optimizer import Optimizer
from pocketzo.runtime.frozen import trained_weights
from pocketzo.tasks.metrics import metric_named
from pocketzo.train.recipe import Recipe

JOURNAL = "journal.pzj"
METRICS = "metrics.jsonl"
INIT = "init.safetensors"
EVAL, SAMPLE = "eval", "sample"  # kinds of its lines: evaluations on evaluation data, or on some training data
SNAPSHOTS = "snapshots"


def check_new(output: Path) -> None:
    """Refuse a place for a run where there is something; what a killed process has not finished does not count."""
    entries = output.iterdir() if output.is_dir() else ()
    unfinished = output.is_dir() and all(is_staged(entry.name) or entry.name == INIT for entry in entries)
    if os.path.lexists(output) and not unfinished:
        raise JournalError(f"{output}: already exists and is no empty folder: choose another place for the run")


class Run:
    """A run folder, opened for reading.

    Parameters
    ----------
    path : path
        The folder.

    Attributes
    ----------
    recipe : Recipe
        The header of the journal.
    entries : list of Entry
        One per step.
    notice : str or None
        Damage at the end of the journal that is ignored.

    Raises
    ------
    JournalError
        There is no journal, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        journal = Journal.open(self.path / JOURNAL, write=False)
        self.recipe = Recipe.read(journal.header, journal.path)
        self.spec = int(journal.header["spec"])
        self._journal = journal
        self.entries = journal.entries
        self.notice = journal.notice

    @property
    def steps(self) -> int:
        """Number of steps in the journal."""
        return len(self.entries)

    def evaluations(self, kind: str = EVAL) -> dict[int, dict[str, float | None]]:
        """Return the evaluations of a kind by the number of steps before them; 0 is that of the base."""
        before = self.recipe.data.source.before if kind == EVAL else None
        found = {} if before is None else {0: before}
        lines = (line for line in self.metrics() if kind in line and line["step"] <= self.steps)
        return found | {line["step"]: line[kind] for line in lines}

    @property
    def best_step(self) -> int | None:
        """Number of steps before the best evaluation, 0 for the base; None if none was finite."""
        metric, evaluations = metric_named(self.recipe.loop.metric), self.evaluations()
        best = max(evaluations, key=lambda step: metric.score(evaluations[step]), default=None)
        return None if best is None or metric.score(evaluations[best]) == -math.inf else best

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, which is read once; an incomplete last line is ignored.

        Raises
        ------
        JournalError
            Another line is damaged; names it.
        """
        return self._lines

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(_metrics_line(line))
            except ValueError as error:
                if number < len(lines):
                    raise JournalError(
                        f"{path}, line {number}: damaged: {error}; without this file the run resumes all the same, but "
                        "its evaluations are lost"
                    ) from None
        return found

    def base(self, bundle: str | os.PathLike[str] | None = None) -> Bundle:
        """Return the base bundle of the run, after checking the SHA-256 of its graph and weights.

        Parameters
        ----------
        bundle : path, optional
            Its path, if it was moved.
        """
        recorded = self.recipe.model
        base = Bundle.read(Path(recorded.bundle) if bundle is None else Path(bundle))
        files = [("graph", base.model_path, recorded.graph_sha256)]
        if recorded.adapter_sha256 is not None:
            files.append(("adapter", base.trained_path, recorded.adapter_sha256))
        files.append(("weights", base.weights_path, recorded.weights_sha256))
        for what, path, expected in files:
            check_file(path, expected, f"{what} that the run {self.path} started from")
        return base

    def init(self) -> dict[str, NDArray[Any]]:
        """Return the weights that began with other values than the bundle's, by name.

        Raises
        ------
        JournalError
            The run's file of them is missing, or is another one.
        """
        expected = self.recipe.model.init_sha256
        if expected is None:
            return {}
        path = self.path / INIT
        if not path.is_file():
            raise JournalError(f"{path}: missing; the run began from an adapter, and replay needs that file, too")
        if (got := file_sha256(path)) != expected:
            raise JournalError(f"{path}: not the values that the run began with: SHA-256 is {got}, expected {expected}")
        return map_tensors(path)

    def averaged(self, step: int, average: float | None) -> int:
        """Return the number of steps before the last share of ``step`` steps, which is at least one of them."""
        if average is None:
            return step
        check_number("average", average, positive=True, most=1.0)
        return step - min(step, max(1, round(average * step)))

    def replay_onto(
        self,
        model: Tunable,
        *,
        step: int | None = None,
        average: float | None = None,
        methods: Mapping[str, type[Optimizer]] = METHODS,
    ) -> Optimizer:
        """Set a model's weights to those after ``step`` steps, in one pass over them.

        The replay begins at the last usable snapshot that is not past what is needed, else at the base bundle.

        Parameters
        ----------
        model : Tunable
        step : int, optional
            By default all steps.
        average : float, optional
            Set them to the mean of the weights after each step of the last share of these steps, 0 < average <= 1.
            No copy is needed: each update counts by the share of the steps that come after it.
        methods : mapping of str to type
            The optimizers by name.

        Returns
        -------
        Optimizer
            Its state after ``step`` steps. From an average no step can be taken.
        """
        step = self.steps if step is None else step
        if not 0 <= step <= self.steps:
            raise ValueError(f"step must be in 0 .. {self.steps}, the steps in the journal of {self.path}; got {step}")
        try:
            optimizer = from_settings(model, self.recipe.method, methods)
        except ValueError as error:
            raise JournalError(f"{self._journal.path}: header.method: {error}") from None
        start = self.averaged(step, average)
        for number, path in snapshots(self.path / SNAPSHOTS):
            if number > start:
                continue
            try:
                weights, state = check_snapshot(path, self._journal.position(number))
                model.weights.read(weights)
            except (JournalError, BundleError) as error:  # the journal alone gives the same weights
                warnings.warn(f"passed over: {error}", stacklevel=3)
                continue
            optimizer.set_state(state)
            optimizer.skip(self.entries[:number])
            break
        else:
            model.weights.read()
            for name, values in self.init().items():
                model.weights[name] = values
        optimizer.replay(self.entries[optimizer.step_number : start])
        if start < step:
            optimizer.replay(self.entries[start:step], average=True)
        return optimizer

    def replay(
        self,
        out: str | os.PathLike[str],
        *,
        step: int | None = None,
        average: float | None = None,
        bundle: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the bundle after ``step`` steps (by default all), bit for bit as training left it.

        With ``average``, write the mean over the last share of these steps, see :meth:`replay_onto`. With
        ``overwrite``, a bundle at ``out`` is replaced, unless it is the base bundle of the run.
        """
        base = self.base(bundle)
        check_target(out, overwrite=overwrite, base=base)
        model = Unloaded(base)
        self.replay_onto(model, step=step, average=average)
        copy_bundle(base, out, model.weights.save, overwrite=overwrite)


def check_file(path: Path, expected: str, what: str) -> None:
    """Check the SHA-256 of a file of a run's base.

    Parameters
    ----------
    path : Path
    expected : str
        In hexadecimal, as the run recorded it.
    what : str
        What the file should be, as errors call it.

    Raises
    ------
    JournalError
        It is another file.
    """
    got = file_sha256(path)
    if got != expected:
        raise JournalError(f"{path}: not the {what}: SHA-256 is {got}, expected {expected}")


def _metrics_line(text: bytes) -> dict[str, Any]:
    line = strict_json.parse(text)
    if type(line.get("step")) is not int:
        raise ValueError(f"'step' is {reprlib.repr(line.get('step'))}, expected an integer")
    for kind in EVAL, SAMPLE:
        evaluation = line.get(kind, {})
        if not isinstance(evaluation, dict) or not all(map(_is_number, evaluation.values())):
            raise ValueError(f"{kind!r} is {reprlib.repr(evaluation)}, expected numbers by name")
    without = line.get("without", {})
    if not isinstance(without, dict) or not all(
        isinstance(values, list) and all(map(_is_number, values)) for values in without.values()
    ):
        raise ValueError(f"'without' is {reprlib.repr(without)}, expected lists of numbers by name")
    return line


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


class Unloaded:
    """A bundle's weights without a session, which is enough to replay.

    Attributes
    ----------
    bundle : Bundle
    weights : Weights
        In the plain layout.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.weights = trained_weights(bundle)
        self.weights.read()
