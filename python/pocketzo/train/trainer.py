"""The training loop, its run folder, and resuming a run."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.order import Data, Order
from pocketzo.errors import JournalError, TrainingError
from pocketzo.formats.safetensors import file_sha256
from pocketzo.machine import cores
from pocketzo.optim.optimizer import Optimizer, StepInfo
from pocketzo.runtime.load import load
from pocketzo.runtime.model import Batch, Model
from pocketzo.tasks.evaluate import Evaluation, evaluate_in_detail
from pocketzo.tasks.metrics import metric_named
from pocketzo.tasks.objective import MetricObjective, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.forecast import Forecast, check_longest, forecast
from pocketzo.train.guard import check_weights
from pocketzo.train.history import History
from pocketzo.train.recipe import BaseModel, DataUsed, Loop, Recipe, Session, Source
from pocketzo.train.run import Run, finite, for_json
from pocketzo.train.writer import RunWriter

BatchObjective = Callable[[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]], float]


@dataclass(frozen=True)
class Progress:
    """Argument of the callback of :class:`Trainer`, after every step.

    Attributes
    ----------
    info : StepInfo
        Result of the step.
    steps : int
        Length of the run.
    seconds : float
        Wall time of the step.
    evaluation : dict or None
        Result of :func:`evaluate` after this step, if there was an evaluation.
    """

    info: StepInfo
    steps: int
    seconds: float
    evaluation: dict[str, float] | None


class Trainer:
    """Trains a model on data and writes the journal.

    Parameters
    ----------
    model : Model
        Its weights are updated in place.
    optimizer : Optimizer
        Made for this model; it has taken no step yet.
    train : Data
        Training data.
    eval : Data, optional
        Evaluation data.
    batch_size : int
        Examples per step.
    steps : int
        Length of the run.
    run : path, optional
        Folder for the journal; by default none is written.
    objective : str or callable
        Minimised on each step's batch. A name is that of a metric (1 - metric is minimised where higher is better). A
        callable is ``objective(outputs, batch) -> float``; it gets the graph's outputs and inputs, both mappings of
        arrays by name. It needs no gradient. Resuming a run with a callable needs that callable again.
    eval_every : int, optional
        Number of steps between evaluations. There is always one at the end; by default that is the only one.
    metric : str, optional
        Metric that selects the best evaluation. By default that of the objective, unless it is the loss or a callable;
        else the task's (accuracy), if the graph has logits; else the loss.
    patience : int, optional
        Stop after this many consecutive evaluations without improvement.
    snapshot_every : int, optional
        Number of steps between snapshots of the weights, which make a resume fast. Only the last one is kept.
    group_by_length : bool
        Batch examples of similar length, which reduces padding. ``train.lengths`` must hold the lengths, an integer
        array of shape [n].
    max_skipped : int
        The run ends with an error after this many consecutive steps whose loss is not finite.
    source : Source, optional
        Location of the data, saved in the header.
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
        objective: str | BatchObjective = "loss",
        eval_every: int | None = None,
        metric: str | None = None,
        patience: int | None = None,
        snapshot_every: int | None = None,
        group_by_length: bool = False,
        max_skipped: int = 10,
        source: Source | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> None:
        task = task_of(model.bundle)
        minimised = objective if isinstance(objective, str) else None
        if metric is None:
            metric = task.metric().name if minimised in (None, "loss") else minimised
        judge = metric_named(metric) if eval is None else task.metric(metric)
        loop = Loop(
            steps=steps,
            batch_size=batch_size,
            eval_every=eval_every,
            metric=judge.name,
            patience=patience,
            snapshot_every=snapshot_every,
            group_by_length=group_by_length,
            max_skipped=max_skipped,
            objective=minimised,
        )
        if not len(train):
            raise ValueError("train has no examples")
        if patience is not None and (eval is None or eval_every is None):
            raise ValueError("patience needs eval and eval_every")
        if optimizer.model is not model:
            raise ValueError("the optimizer moves the weights of another model")
        if minimised == "loss" and model.bundle.loss is None:
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
        self.run = None if run is None else Path(run)
        self.objective = metric_objective(objective, model.bundle) if isinstance(objective, str) else objective
        self.loop = loop
        more = {judge.name} if minimised is None else {judge.name, minimised}
        self._metrics = None if more <= set(task.shown) else (*task.shown, *sorted(more - set(task.shown)))
        self.source = source or Source()
        self.callback = callback
        self.stop_requested = False
        self._order = Order(seed=optimizer.seed, size=len(train), batch_size=batch_size, lengths=lengths)
        self.history = History(loop)
        self._before: Evaluation | None = None
        self._forecast: Forecast | None = None
        self._writer: RunWriter | None = None

    @classmethod
    def resume(
        cls,
        run: str | os.PathLike[str],
        train: Data,
        *,
        eval: Data | None = None,  # noqa: A002
        model: Model | None = None,
        objective: BatchObjective | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Trainer:
        """Resume a run after its last step; on the same machine the final weights equal those of an unbroken run.

        To that end the session uses the number of threads and the weight layout in the journal; a warning names any
        difference.

        Parameters
        ----------
        run : path
            The run's folder.
        train, eval : Data
            The data of the run; the fingerprints are checked.
        model : Model, optional
            The base bundle, loaded, with its weights unchanged. By default it is loaded from the path in the journal.
        objective : callable, optional
            The function that the run minimised, if it did not minimise a metric.
        callback : callable, optional
            Called after every step with a :class:`Progress`.
        """
        past = Run(run)
        recipe = past.recipe
        for name, data, expected in ("train", train, recipe.data.train), ("eval", eval, recipe.data.eval):
            got = None if data is None else data.fingerprint
            if got != expected:
                raise JournalError(
                    f"{past.path}: the {name} data is not that of the run: expected {expected or 'none'}, got "
                    f"{got or 'none'}"
                )
        base = past.base(None if model is None else model.bundle.path)
        if model is None:
            model = load(base, threads=recipe.session.threads, prepack=recipe.session.prepack)
        _warn_of_differences(model, past)
        loop = asdict(recipe.loop)
        minimised: str | BatchObjective | None = loop.pop("objective")
        if minimised is not None and objective is not None:
            raise JournalError(f"{past.path}: the run minimised the metric {minimised!r}, and no function")
        minimised = minimised or objective
        if minimised is None:
            raise JournalError(f"{past.path}: the run minimised a function of its caller: give it as the objective")
        trainer = cls(
            model,
            past.replay_onto(model),
            train,
            eval=eval,
            run=run,
            objective=minimised,
            source=recipe.data.source,
            callback=callback,
            **loop,
        )
        trainer._take_up(past)
        return trainer

    def _take_up(self, past: Run) -> None:
        steps = self.optimizer.step_number
        self._writer = RunWriter.resume(past, steps)
        self.history.take_up(past, steps)
        if steps and self.loop.snapshot_every and steps % self.loop.snapshot_every == 0:
            self._writer.snapshot(self.optimizer)  # a killed run may have missed it

    def differences(self, past: Run) -> list[str]:
        """Return the settings in which a saved run and this trainer differ; :meth:`resume` uses those of the run.

        The data and the base bundle are not compared, as :meth:`resume` checks them. Threads and prepacking are not
        compared either.
        """
        method = json.loads(json.dumps(self.optimizer.settings()))  # as the journal has it: lists, no tuples
        there = {**past.recipe.method, **asdict(past.recipe.loop)}
        here = {**method, **asdict(self.loop)}
        implied = set()
        if there["steps"] != here["steps"]:
            implied |= {"schedule", "eval_every"}
        if there["method"] != here["method"]:
            implied |= {"distribution", "queries"}
        return [
            f"other weights are trained ({len(there[name])} there, {len(here[name])} here)"
            if name == "trained"
            else f"{name} is {there[name]} there and {here[name]} here"
            for name in here
            if there[name] != here[name] and name not in implied
        ]

    def fit(self) -> None:
        """Train until the last step, until :attr:`stop_requested` is set or until ``patience`` runs out.

        An exception in the objective ends the run. The journal then ends before that step, and :meth:`resume` repeats
        the step. If it was the first step of the run, no journal is left.

        Raises
        ------
        TrainingError
            Too many losses in a row were not finite.
        JournalError
            The run folder holds a run already.
        """
        if self.optimizer.step_number < self.loop.steps:
            check_weights(self.optimizer)
            self.forecast()
        if self.optimizer.step_number == 0:
            if self.eval is not None:
                self.before()
            else:
                self.history.batches = self._sampled_losses(), []
        began = self.run is not None and self._writer is None
        if began:
            self._writer = self._begin()
        try:
            with ThreadPoolExecutor(1) as helper:
                self._train(helper)
        except Exception:
            if began and self._writer is not None and not self._writer.steps:
                self._writer.discard()
            raise
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        if self.history.batches[0]:
            self.history.batches = self.history.batches[0], self._sampled_losses()

    def _sampled_losses(self) -> list[float]:
        """Return the losses of 2 to 8 batches, some hundredth of the run's forward passes; none for a short run."""
        if self.loop.steps < 20 or not isinstance(self.objective, MetricObjective):
            return []
        count = min(8, max(2, self.loop.steps * self.optimizer.forwards // 200))
        return [self._loss(self.model, self._batch(step)) for step in range(count)]

    def _train(self, helper: ThreadPoolExecutor) -> None:
        optimizer, loop = self.optimizer, self.loop
        ahead: Future[Batch] | None = None
        while True:
            step = optimizer.step_number
            # A killed run may have missed the evaluation after its last step.
            if step and self._eval_due(step) and step not in self.history.evaluations:
                self._evaluate(step)
            if step >= loop.steps or self.stop_requested or self.history.out_of_patience:
                return
            started = time.perf_counter()
            batch = (ahead or helper.submit(self._batch, step)).result()
            ahead = helper.submit(self._batch, step + 1) if step + 1 < loop.steps else None
            info = self._step(batch)
            if ahead is not None:
                ahead.exception()  # waits; the step that needs the batch raises its exception
            seconds = time.perf_counter() - started
            self.history.add_loss(info.loss, skipped=info.skipped)
            self._log({"step": step + 1, "loss": finite(info.loss), "lr": info.lr, "seconds": round(seconds, 6)})
            evaluation = self._evaluate(step + 1) if self._eval_due(step + 1) else None
            if loop.snapshot_every and (step + 1) % loop.snapshot_every == 0 and self._writer is not None:
                self._writer.snapshot(optimizer)
            if self.callback is not None:
                self.callback(Progress(info, loop.steps, seconds, evaluation))
            if self.history.skipped >= loop.max_skipped:
                raise TrainingError(self.history.ruined(self.run, fp16=self.model.bundle.is_fp16))

    def _step(self, batch: Batch) -> StepInfo:
        step, writer = self.optimizer.step_number, self._writer
        try:
            return self.optimizer.step(
                lambda model: self._loss(model, batch), None if writer is None else writer.append
            )
        except Exception:
            # The step was undone except for rounding. The journal ends before it, so a resumed run repeats it.
            if writer is not None:
                writer.truncate(step)
            raise

    def _batch(self, step: int) -> Batch:
        return self.train.batch(self._order(step))

    def _loss(self, model: Model, batch: Batch) -> float:
        if self.loop.objective == "loss":
            return model.loss(batch)
        return float(self.objective(self._run(batch), batch))

    def _run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run the model on a batch for the outputs that the objective needs."""
        outputs = self.objective.outputs if isinstance(self.objective, MetricObjective) else None
        return self.model.run(batch, outputs)

    def _begin(self) -> RunWriter:
        assert self.run is not None
        if self.optimizer.step_number:
            raise ValueError("the optimizer has taken steps already, which a new journal would not hold")
        bundle = self.model.bundle
        base_sha256 = file_sha256(bundle.weights_path)
        if self.model.weights.sha256() != base_sha256:
            raise ValueError(
                f"the weights in memory are not those of {bundle.path}, from which the journal would be replayed: save "
                f"the model, load what was saved, and train that"
            )
        model = self.model
        recipe = Recipe(
            model=BaseModel(os.fspath(bundle.path.resolve()), bundle.graph_sha256, base_sha256),
            method=self.optimizer.settings(),
            loop=self.loop,
            session=Session(
                threads=model.threads,
                forward_seconds={str(n): seconds for n, seconds in model.forward_seconds.items()} or None,
                prepacked=model.prepacked,
            ),
            data=DataUsed(
                train=self.train.fingerprint,
                eval=None if self.eval is None else self.eval.fingerprint,
                source=self.source,
            ),
        )
        return RunWriter.begin(self.run, recipe)

    def _eval_due(self, step: int) -> bool:
        if self.eval is None:
            return False
        every = self.loop.eval_every
        return step == self.loop.steps or (every is not None and step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Run :func:`evaluate` on the evaluation data now, with the metric and the objective."""
        return self._detailed().values

    def _detailed(self) -> Evaluation:
        if self.eval is None:
            raise ValueError("the trainer has no eval data")
        return evaluate_in_detail(self.model, self.eval, batch_size=self.loop.batch_size, metrics=self._metrics)

    def before(self) -> dict[str, float]:
        """Return the evaluation at step 0; it is made once, before the first step, and is among those of the run."""
        if self._before is None:
            if self.optimizer.step_number:
                raise ValueError("the optimizer has taken steps already")
            if self.eval is not None:
                check_longest(self.eval, self.loop.batch_size, self._run)
            self._before = self._detailed()
            self.history.add(0, self._before)
            self.source = replace(self.source, before=for_json(self._before.values))
        return self._before.values

    def _evaluate(self, step: int) -> dict[str, float]:
        details = self._detailed()
        self.history.add(step, details)
        self._log({"step": step, "eval": for_json(details.values)})
        return details.values

    def forecast(self) -> Forecast | None:
        """Evaluate the longest batch, once, and estimate what the steps that are left will take.

        Returns
        -------
        Forecast or None
            None if the data does not give the lengths of its examples.

        Raises
        ------
        DataError
            An example is too long for the model; names it.
        """
        if self._forecast is None:
            steps = range(self.optimizer.step_number + 1, self.loop.steps + 1)
            self._forecast = forecast(
                optimizer=self.optimizer,
                data=self.train,
                order=self._order,
                steps=self.loop.steps,
                forward=self._run,
                evaluations=0 if self.loop.eval_every is None else len(steps) // self.loop.eval_every,
                eval_data=self.eval,
                batch_size=self.loop.batch_size,
            )
        return self._forecast

    def _log(self, line: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.log(line)


def _warn_of_differences(model: Model, past: Run) -> None:
    session = past.recipe.session
    usable = len(cores.usable())
    if model.threads > usable:
        warnings.warn(
            f"{past.path}: goes on with the {model.threads} threads of its journal, on which the roundings of losses "
            f"may depend, though that is slow with fewer cores to use ({usable})",
            stacklevel=3,
        )
    if model.prepacked != session.prepacked:
        became = "prepacked" if model.prepacked else f"not prepacked ({model.not_prepacked_because})"
        warnings.warn(
            f"{past.path}: goes on with weights that are {became}, unlike its journal: losses round otherwise, so that "
            f"the run ends near where it would have ended, but not at the same bits",
            stacklevel=3,
        )
