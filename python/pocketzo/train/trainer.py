"""The training loop, its run folder, and how a run is taken up again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.order import Data, Order
from pocketzo.errors import JournalError, TrainingError
from pocketzo.formats.files import atomic_file
from pocketzo.formats.journal import Journal
from pocketzo.formats.safetensors import file_sha256
from pocketzo.machine import cores
from pocketzo.optim.optimizer import Optimizer, StepInfo
from pocketzo.runtime.model import Batch, Model
from pocketzo.tasks.evaluate import evaluate
from pocketzo.train.run import Run, finite, recorded_packing, run_seal, score

# The settings of a trainer that its record holds and a resumed one takes over.
_OPTIONS = "batch_size", "steps", "eval_every", "metric", "patience", "snapshot_every", "max_skipped", "group_by_length"


@dataclass(frozen=True)
class Progress:
    """What a callback of :class:`Trainer` gets after every step.

    Attributes
    ----------
    info : StepInfo
        What the step found.
    steps : int
        Length of the run.
    seconds : float
        Time that the step took.
    evaluation : dict or None
        What :func:`evaluate` found after this step, where it was called.
    """

    info: StepInfo
    steps: int
    seconds: float
    evaluation: dict[str, float] | None


class Trainer:
    """Trains a model on data and keeps the record.

    Parameters
    ----------
    model : Model
        Its weights are moved in place.
    optimizer : Optimizer
        Made for this model; fresh.
    train : Data
        What is learnt from.
    eval : Data, optional
        What is evaluated.
    batch_size : int
        Examples a step.
    steps : int
        Length of the run.
    run : path, optional
        Folder for the record; without it there is none.
    objective : callable, optional
        ``objective(outputs, batch) -> float``, to be minimised, from the graph's outputs and its inputs, both dicts of
        arrays; it needs no gradient. By default the graph's loss. A resumed run needs it again.
    eval_every : int, optional
        Evaluate after so many steps, and at the end; by default at the end only.
    metric : str, optional
        Which result of :func:`evaluate` counts: "accuracy" or "loss"; by default accuracy, if the graph has logits.
    patience : int, optional
        Stop after so many evaluations in a row without a better one.
    snapshot_every : int, optional
        Save the weights after so many steps, which makes a resume quick; only the last is kept.
    group_by_length : bool
        Put examples of similar length into a batch, so that less of it is padding. ``train.lengths`` must hold the
        lengths, an array of shape [n].
    max_skipped : int
        So many steps in a row with a loss that is not finite end the run with an error.
    source : dict, optional
        Kept in the header as ``data``: where the data came from.
    callback : callable, optional
        Called after every step with a :class:`Progress`.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        train: Data,
        *,
        eval: Data | None = None,  # noqa: A002
        batch_size: int = 16,
        steps: int = 1000,
        run: str | os.PathLike[str] | None = None,
        objective: Callable[[Mapping[str, NDArray[Any]], Batch], float] | None = None,
        eval_every: int | None = None,
        metric: str | None = None,
        patience: int | None = None,
        snapshot_every: int | None = None,
        group_by_length: bool = False,
        max_skipped: int = 10,
        source: Mapping[str, Any] | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("steps", steps),
            ("max_skipped", max_skipped),
            ("eval_every", 1 if eval_every is None else eval_every),
            ("patience", 1 if patience is None else patience),
            ("snapshot_every", 1 if snapshot_every is None else snapshot_every),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if metric is None:
            metric = "loss" if model.bundle.logits is None else "accuracy"
        if metric not in ("accuracy", "loss"):
            raise ValueError(f"metric must be 'accuracy' or 'loss', got {metric!r}")
        if {"accuracy": model.bundle.logits, "loss": model.bundle.loss}[metric] is None and patience is not None:
            raise ValueError(f"{model.bundle.path}: the graph has no output that gives the metric {metric!r}")
        if not len(train):
            raise ValueError("train has no examples")
        if patience is not None and (eval is None or eval_every is None):
            raise ValueError("patience needs eval and eval_every")
        if optimizer.model is not model:
            raise ValueError("the optimizer moves the weights of another model")
        if objective is None and model.bundle.loss is None:
            raise ValueError(f"{model.bundle.path}: the graph has no loss output; give an objective")
        lengths = None
        if group_by_length:
            lengths = np.asarray(getattr(train, "lengths", None))
            if lengths.shape != (len(train),) or lengths.dtype.kind not in "iu":
                raise ValueError(
                    f"group_by_length needs train.lengths, the number of tokens of each of {len(train)} examples; got "
                    f"{lengths.dtype} of shape {list(lengths.shape)}"
                )
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.eval = eval
        self.batch_size = batch_size
        self.steps = steps
        self.run = None if run is None else Path(run)
        self.objective = objective
        self.eval_every = eval_every
        self.metric = metric
        self.patience = patience
        self.snapshot_every = snapshot_every
        self.group_by_length = group_by_length
        self.max_skipped = max_skipped
        self.source = dict(source or {})
        self.callback = callback
        self.stop_requested = False
        self._order = Order(seed=optimizer.seed, size=len(train), batch_size=batch_size, lengths=lengths)
        self._evaluations: dict[int, dict[str, float]] = {}
        self._skipped = 0
        self._journal: Journal | None = None
        self._metrics: TextIO | None = None

    @classmethod
    def resume(
        cls,
        run: str | os.PathLike[str],
        train: Data,
        *,
        eval: Data | None = None,  # noqa: A002
        model: Model | None = None,
        objective: Callable[[Mapping[str, NDArray[Any]], Batch], float] | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Trainer:
        """Take a run up where its record ends; on the same machine the final weights are the same as without a break.

        That takes the threads and the packing of the record, and a warning says where they are others.

        Parameters
        ----------
        run : path
            The run's folder.
        train, eval : Data
            The same data as before, which is checked.
        model : Model, optional
            The base bundle, loaded, with its weights untouched; by default it is loaded from where it was.
        objective, callback
            As before.
        """
        past = Run(run)
        settings = past.header["trainer"]
        for name, data in (("train", train), ("eval", eval)):
            expected = past.header["data"][name]
            got = None if data is None else data.fingerprint
            if got != expected:
                raise JournalError(
                    f"{past.path}: the {name} data is not that of the run: expected {expected or 'none'}, got "
                    f"{got or 'none'}"
                )
        base = past.base(None if model is None else model.bundle.path)
        if model is None:
            from pocketzo.runtime.load import load

            model = load(base, threads=settings["threads"], packed=recorded_packing(settings))
        usable = len(cores.usable())
        if model.threads > usable:
            warnings.warn(
                f"{past.path}: goes on with the {model.threads} threads of its record, on which the roundings of "
                f"losses may depend, though that is slow with fewer cores to use ({usable})",
                stacklevel=2,
            )
        if model.packed != bool(settings.get("packed")):
            became = "packed" if model.packed else f"not packed ({model.unpacked_because})"
            warnings.warn(
                f"{past.path}: goes on with weights that are {became}, unlike its record: losses round otherwise, so "
                f"that the run ends near where it would have ended, but not at the same bits",
                stacklevel=2,
            )
        optimizer = past.rebuild(model)
        trainer = cls(
            model,
            optimizer,
            train,
            eval=eval,
            run=run,
            objective=objective,
            source=past.header["data"]["source"],
            callback=callback,
            **{name: settings[name] for name in _OPTIONS if name in settings},  # older records have no group_by_length
        )
        trainer._take_up(past)
        return trainer

    def differences(self, past: Run) -> list[str]:
        """Say in which settings a recorded run and this trainer differ; :meth:`resume` would take those of the record.

        The data and the base bundle are not compared, as resuming checks them, and neither are threads and packing.
        """
        here = json.loads(json.dumps(self._settings()))  # as the record has it: lists, no tuples
        method, settings = past.header["method"], past.header["trainer"]
        pairs = [(name, method.get(name), here["method"].get(name)) for name in {**method, **here["method"]}]
        pairs += [(name, settings[name], here["trainer"][name]) for name in _OPTIONS if name in settings]
        implied: set[str] = set()  # by others, which are named
        if settings["steps"] != self.steps:
            implied |= {"schedule", "eval_every"}
        if method["method"] != here["method"]["method"]:
            implied |= set(method) ^ set(here["method"])
        return [
            f"other weights are trained ({len(there)} there, {len(now)} here)"
            if name == "trained"
            else f"{name} is {there} there and {now} here"
            for name, there, now in pairs
            if there != now and name not in implied
        ]

    def fit(self) -> None:
        """Train to the end, or until :attr:`stop_requested` is set or evaluations stop improving.

        An exception of the objective ends the run; the record ends before that step, and :meth:`resume` takes it again.

        Raises
        ------
        TrainingError
            Too many losses in a row were not finite.
        JournalError
            The run folder holds a run already.
        """
        if self.run is not None and self._journal is None:
            self._begin()
        try:
            with ThreadPoolExecutor(1) as helper, contextlib.ExitStack() as stack:
                if self.run is not None:
                    self._metrics = stack.enter_context((self.run / "metrics.jsonl").open("a", buffering=1))
                self._loop(helper)
        finally:
            self._metrics = None
            self.optimizer.journal = None
            if self._journal is not None:
                self._journal.sync()
                self._journal.close()
                self._journal = None

    def _loop(self, helper: ThreadPoolExecutor) -> None:
        optimizer = self.optimizer
        ahead: Future[Batch] | None = None
        synced = time.monotonic()
        while True:
            step = optimizer.step_number
            # What a killed run owed after its last step.
            if step and self._eval_due(step) and step not in self._evaluations:
                self._evaluate(step)
            if step >= self.steps or self.stop_requested or self._out_of_patience():
                return
            started = time.perf_counter()
            batch = (ahead or helper.submit(self._batch, step)).result()
            ahead = helper.submit(self._batch, step + 1) if step + 1 < self.steps else None
            try:
                info = optimizer.step(lambda model, batch=batch: self._loss(model, batch))  # type: ignore[misc]
            except Exception:
                # The step was undone but for roundings. Without it on record, a resume takes it again.
                if self._journal is not None:
                    self._journal.truncate(step * optimizer.draws)
                raise
            if ahead is not None:
                ahead.exception()  # waits, and leaves what was raised to the step that needs the batch
            seconds = time.perf_counter() - started
            self._log({"step": step + 1, "loss": finite(info.loss), "lr": info.lr, "seconds": round(seconds, 6)})
            self._skipped = self._skipped + 1 if info.skipped else 0
            if self._journal is not None and time.monotonic() - synced > 30:
                self._journal.sync()
                synced = time.monotonic()
            evaluation = self._evaluate(step + 1) if self._eval_due(step + 1) else None
            if self.snapshot_every and (step + 1) % self.snapshot_every == 0 and self.run is not None:
                self._snapshot(step + 1)
            if self.callback is not None:
                self.callback(Progress(info, self.steps, seconds, evaluation))
            if self._skipped >= self.max_skipped:
                raise TrainingError(
                    f"the loss was not finite in the last {self._skipped} steps (up to step {step + 1}); the weights "
                    f"are as before them. Try a smaller lr or eps"
                    + (", or a bundle in float32: fp16 ends at 65504" if self.model.bundle.is_half else "")
                )

    def _batch(self, step: int) -> Batch:
        return self.train.batch(self._order(step))

    def _loss(self, model: Model, batch: Batch) -> float:
        if self.objective is None:
            return model.loss(batch)
        return float(self.objective(model.run(batch), batch))

    def _begin(self) -> None:
        assert self.run is not None
        if self.optimizer.step_number:
            raise ValueError("the optimizer has taken steps already, which a new record would not hold")
        bundle = self.model.bundle
        base_sha256 = file_sha256(bundle.weights_path)
        if self.model.weights.sha256() != base_sha256:
            raise ValueError(
                f"the weights in memory are not those of {bundle.path}, from which the record would be replayed: save "
                f"the model, load what was saved, and train that"
            )
        header = {
            "model": {
                "bundle": os.fspath(bundle.path.resolve()),
                "graph_sha256": bundle.graph_sha256,
                "weights_sha256": base_sha256,
            },
            **self._settings(),
            "data": {
                "train": self.train.fingerprint,
                "eval": None if self.eval is None else self.eval.fingerprint,
                "source": self.source,
            },
        }
        self.run.mkdir(parents=True, exist_ok=True)
        self._journal = Journal.create(self.run / "journal.pzj", header)
        self.optimizer.journal = self._journal
        (self.run / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.run / "snapshots", ignore_errors=True)

    def _settings(self) -> dict[str, dict[str, Any]]:
        return {
            "method": self.optimizer.settings(),
            "trainer": {
                "draws": self.optimizer.draws,
                **{name: getattr(self, name) for name in _OPTIONS},
                "threads": self.model.threads,
                "forward_seconds": dict(self.model.forward_seconds) or None,
                "packed": self.model.packed,
                "objective": "loss" if self.objective is None else getattr(self.objective, "__qualname__", "custom"),
            },
        }

    def _take_up(self, past: Run) -> None:
        journal = Journal.open(past.path / "journal.pzj")
        if journal.notice:
            warnings.warn(journal.notice, stacklevel=3)
        steps = self.optimizer.step_number
        journal.truncate(steps * self.optimizer.draws)
        self._journal = self.optimizer.journal = journal
        lines = [line for line in past.metrics() if line["step"] <= steps]
        with atomic_file(past.path / "metrics.jsonl") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        for pattern in ".*.part", "snapshots/.*.part":  # left by a process that was killed while it wrote
            for left in past.path.glob(pattern):
                left.unlink(missing_ok=True)
        self._evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
        whole = journal.records["lr"].reshape(steps, self.optimizer.draws)[:, 0]
        coefficients = journal.records["coefficient"].reshape(steps, self.optimizer.draws)
        while self._skipped < steps and not whole[-1 - self._skipped] and not coefficients[-1 - self._skipped].any():
            self._skipped += 1

    def _eval_due(self, step: int) -> bool:
        if self.eval is None:
            return False
        return step == self.steps or (self.eval_every is not None and step % self.eval_every == 0)

    def _evaluate(self, step: int) -> dict[str, float]:
        assert self.eval is not None
        result = evaluate(self.model, self.eval, batch_size=self.batch_size)
        self._evaluations[step] = result
        self._log({"step": step, "eval": {name: finite(value) for name, value in result.items()}})
        return result

    def _out_of_patience(self) -> bool:
        if self.patience is None or not self._evaluations:
            return False
        steps = sorted(self._evaluations)
        best = max(steps, key=lambda step: score(self._evaluations[step], self.metric))
        return len(steps) - 1 - steps.index(best) >= self.patience

    def _snapshot(self, step: int) -> None:
        assert self.run is not None
        folder = self.run / "snapshots"
        folder.mkdir(exist_ok=True)
        assert self._journal is not None
        path = folder / f"step-{step:08d}.safetensors"
        self.model.weights.save(path)
        with atomic_file(path.with_suffix(".json")) as file:
            file.write(json.dumps(run_seal(self._journal.header, self.model.weights.sha256())).encode())
        for other in folder.glob("step-*"):
            if other.stem != path.stem:
                other.unlink()

    def _log(self, line: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(json.dumps(line) + "\n")
