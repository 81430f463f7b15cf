"""Train the side head of a bundle, from a data file to the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from pocketzo._core import threads as kernel_threads
from pocketzo.arguments import check_integer
from pocketzo.data.columns import Columns
from pocketzo.data.dataset import Dataset
from pocketzo.data.load import load_dataset
from pocketzo.data.names import class_names, in_order
from pocketzo.errors import BundleError, JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.files import make_folder
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.cores import fast
from pocketzo.machine.paths import local_path, portable_path
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fit, Fitter, Told
from pocketzo.train.head.kept import Kept
from pocketzo.train.head.run import KEPT, HeadRun, with_labels
from pocketzo.train.head.zeroth import STEPS
from pocketzo.train.run import check_new


@dataclass(frozen=True)
class TrainedHead:
    """A side head, and the folder of its run.

    Attributes
    ----------
    path : Path
        The folder.
    bundle : Bundle
        The one that was trained, with the labels of the data.
    fit : Fit
        The head, and what it was chosen by.
    evaluation, probe : dict or None
        Results on the held-out examples, and those of a linear probe.
    """

    path: Path
    bundle: Bundle
    fit: Fit
    evaluation: dict[str, float] | None
    probe: dict[str, float] | None

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> Bundle:
        """Write the tuned bundle, which ends behind the last layer that the head reads.

        Parameters
        ----------
        out : path-like
            The folder to write.
        overwrite : bool
            Whether a bundle may be there, which is replaced.
        """
        described, head = HeadRun.read(self.path)
        described.write_bundle(head, Path(out), bundle=self.bundle.path, overwrite=overwrite)
        return Bundle.read(Path(out))


def train_head(
    bundle: Bundle | str | os.PathLike[str],
    data: Dataset | str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    eval: Dataset | str | os.PathLike[str] | None = None,  # noqa: A002
    objective: str = "loss",
    steps: int = STEPS,
    seed: int = 0,
    threads: int | None = None,
    columns: Columns | None = None,
    keep: bool = False,
    after: str | os.PathLike[str] | None = None,
    told: Told | None = None,
) -> TrainedHead:
    """Fit the side head of a bundle to examples, and write the run.

    The backbone runs once for each example. Layers, pooling and penalty are chosen by 5-fold cross-validation on the
    training data, and so is whether attention pooling pays, and zeroth order with a metric as objective.

    Parameters
    ----------
    bundle : Bundle or path-like
        Prepared with ``train="side-head"``.
    data : Dataset or path-like
        Training examples. The names of the classes are those of this file, where the bundle has none; a dataset needs
        the bundle's.
    run : path-like
        The folder to write: new, or empty.
    eval : Dataset or path-like, optional
        Held-out examples.
    objective : str
        ``"loss"``, or a metric of the task such as ``"f1"``: then the queries and the bias are moved by zeroth order
        over the kept states, which needs no gradient, and stay moved if that is better on held-out fifths of the
        training data.
    steps : int
        Of zeroth order; each evaluates the head on 8 points.
    seed : int
        Of the folds, the order of the examples, the dropped tokens and the directions.
    threads : int, optional
        Of the backbone; by default as many as the machine has fast cores.
    columns : Columns, optional
        The columns of the data files.
    keep : bool
        Whether the run keeps the labels and states of the examples, in a file that its owner alone may read: 2 bytes x
        layers x size x tokens. They are personal data: texts can be guessed from them.
    after : path-like, optional
        The run of a head of the same bundle: the new head learns from its examples too, which come first. They cost no
        forward if that run kept them; else its data file is read again, and the backbone runs over it. Its own classes
        stay, and new ones are added where the bundle names none.
    told : callable, optional
        ``told(stage, done, count, seconds_left)`` reports progress; the last is None where it is not known.

    Returns
    -------
    TrainedHead

    Raises
    ------
    BundleError
        The bundle has no side head.
    DataError
        The data cannot be used, or has less than 5 examples or 2 classes.
    JournalError
        There is something at `run`; or at `after` there is no run of this bundle, or it has learnt from these examples
        already.
    ValueError
        The metric is not one of the task.
    """
    base = bundle if isinstance(bundle, Bundle) else Bundle.read(Path(bundle))
    if base.side is None:
        raise BundleError(f'{base.path}: there is no side head in its graph: prepare it with train="side-head"')
    check_new(Path(run))
    check_integer("steps", steps, 1)
    columns = Columns() if columns is None else columns
    threads = threads or min(fast(), kernel_threads())
    report: Told = told or (lambda *_: None)
    past = None if after is None else _Past.read(Path(after), base)
    labels = base.labels
    if labels is None and isinstance(task_of(base), Classification):
        if isinstance(data, Dataset):
            raise BundleError(f"{base.path}: no names of classes: prepare it with labels, or give the data as a file")
        labels = class_names(Path(data), base, columns)
        if past is not None:
            labels = in_order([*labels, *(past.run.labels or ())])
    named = base if labels is None else with_labels(base, labels)
    examples = _read(data, named, columns)
    held_out = None if eval is None else _read(eval, named, columns)
    if past is not None and examples.fingerprint in past.data:
        raise JournalError(f"{past.folder}: has learnt from these examples already")
    out = Path(run).resolve()
    make_folder(out.parent)
    with scratch_folder(out.parent) as scratch:

        def run_over(one: Dataset) -> Kept:
            return Kept.of(named, one, threads=threads, folder=scratch, told=lambda *done: report("backbone", *done))

        kept = run_over(examples)
        if past is not None:
            kept = Kept.joined([*past.examples(named, run_over), kept], scratch)
        fit = Fitter(named, kept, seed=seed, told=report, objective=objective, steps=steps).fit()
        evaluation = probe = None
        if held_out is not None:
            evaluation, probe = evaluate_heads(
                named,
                [fit.head, fit.probe],
                held_out,
                threads=threads,
                told=lambda *done: report("evaluation", *done),
                metrics=[objective],
            )
        results = _results(fit, seed)
        results["data"] = [*(past.data if past else ()), examples.fingerprint]
        path = None if isinstance(data, Dataset) else portable_path(os.fspath(Path(data).resolve()))
        results["files"] = [*(past.files if past else ()), {"path": path, "columns": asdict(columns)}]
        if held_out is not None:
            results |= {"eval": evaluation, "probe_eval": probe}
        HeadRun.of(base, fit.head, labels, results).write(out, fit.head, kept if keep else None)
    return TrainedHead(out, named, fit, evaluation, probe)


class _Past(NamedTuple):
    """A run that goes on with new examples."""

    folder: Path
    run: HeadRun

    @classmethod
    def read(cls, folder: Path, base: Bundle) -> Self:
        run, _ = HeadRun.read(folder)
        run.base(base.path)  # it is the same
        return cls(folder, run)

    @property
    def data(self) -> list[str]:
        return list(self.run.results.get("data", []))

    @property
    def files(self) -> list[dict[str, Any]]:
        return list(self.run.results.get("files", []))

    def examples(self, bundle: Bundle, run_over: Callable[[Dataset], Kept]) -> list[Kept]:
        """Return what is kept of its examples, with the classes of a bundle; else run the backbone over its files."""
        if (self.folder / KEPT).is_file():
            kept = Kept.read(self.folder / KEPT, bundle)
            if self.run.labels is not None and isinstance(task_of(bundle), Classification):
                numbers = np.array([(bundle.labels or ()).index(name) for name in self.run.labels])
                kept = replace(kept, labels=numbers[kept.labels])
            return [kept]
        if not self.files:
            raise JournalError(f"{self.folder}: neither keeps its examples nor names their files")
        found = []
        for file, fingerprint in zip(self.files, self.data, strict=True):
            if file["path"] is None:
                raise JournalError(f"{self.folder}: its examples came from no file and were not kept (keep=True)")
            path = Path(local_path(file["path"]))
            data = load_dataset(path, bundle, columns=Columns(**file["columns"]))
            if self.run.labels == bundle.labels and data.fingerprint != fingerprint:
                raise JournalError(f"{path}: not the examples that {self.folder} has learnt from; it has changed since")
            found.append(run_over(data))
        return found


def _read(data: Dataset | str | os.PathLike[str], bundle: Bundle, columns: Columns) -> Dataset:
    return data if isinstance(data, Dataset) else load_dataset(data, bundle, columns=columns)


def _results(fit: Fit, seed: int) -> dict[str, Any]:
    """Return what the choice was made by, as JSON."""
    trials = [
        {"layers": one.features.layers, "pooling": one.features.pooling, "l2": one.l2, "loss": one.loss}
        for one in fit.trials
    ]
    attention = None if fit.attention is None else {"loss": float(fit.attention.mean()), "kept": fit.pays}
    found: dict[str, Any] = {"seed": seed, "trials": trials, "attention": attention}
    if (by := fit.by_metric) is not None:
        moved = {"metric": by.metric.name, "before": by.before, "after": by.after, "kept": by.pays}
        found["zeroth_order"] = {**moved, "evaluations": by.evaluations}
    return found
