"""The training loop, its run folder, and resuming a run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketzo.data.order import BATCH_SIZE, Data, Order
from pocketzo.errors import JournalError, TrainingError
from pocketzo.optim.methods import METHODS
from pocketzo.optim.optimizer import Optimizer, StepInfo
from pocketzo.runtime.model import Batch, Model
from pocketzo.tasks.culprit import naming_culprit
from pocketzo.tasks.metrics import metric_named
from pocketzo.tasks.objective import BatchObjective, Objective, OnBatch, metric_objective
from pocketzo.tasks.registry import task_of
from pocketzo.train.baselines import Heads
from pocketzo.train.cached import described, load_as
from pocketzo.train.differences import warn_of_another_session
from pocketzo.train.evaluator import Evaluator, Sample, all_finite, finite, line_of
from pocketzo.train.guard import Guard, Rise
from pocketzo.train.progress import Progress
from pocketzo.train.recipe import DataUsed, Loop, Recipe, Session, Source
from pocketzo.train.rehearsal import Forecast, Rehearsal, lengths_of
from pocketzo.train.ruin import explain
from pocketzo.train.run import EVAL, SAMPLE, Run
from pocketzo.train.soundness import base_of, check_start
from pocketzo.train.sweep import Sweep, find_lr
from pocketzo.train.writer import RunWriter


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
        Evaluation data, evaluated before the first step, every ``eval_every`` steps and at the end.
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
        Number of steps between evaluations. There is always one before the first step and one at the end; by default
        these are all.
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
    activation_memory : int, optional
        Bytes that logits and activations may take: each batch is run in parts to that end, whose losses are summed. By
        default only the logits of language models are limited, to 32 MB.
    source : Source, optional
        Location of the data, saved in the header.
    callback : callable, optional
        Called after every step with a :class:`Progress`.

    Attributes
    ----------
    forecast : Forecast or None
        Result of :meth:`rehearse`; None before it.
    sweep : Sweep or None
        Result of :meth:`find_lr`; None if the learning rate was given.
    evaluations : dict of int to mapping
        The values of each evaluation, by the number of steps before it.
    samples : dict of int to mapping
        The same on some training data, which takes the place of evaluation data where there is none.
    guarded : bool
        Whether :meth:`fit` ends when the training loss has risen clearly above its best (:mod:`pocketzo.train.guard`).
        It is False, and may be set at any time; the journal does not depend on it.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        train: Data,
        *,
        eval: Data | None = None,  # noqa: A002
        batch_size: int = BATCH_SIZE,
        steps: int = 1000,
        run: str | os.PathLike[str] | None = None,
        objective: str | BatchObjective = "loss",
        eval_every: int | None = None,
        metric: str | None = None,
        patience: int | None = None,
        snapshot_every: int | None = None,
        group_by_length: bool = False,
        max_skipped: int = 10,
        activation_memory: int | None = None,
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
            activation_memory=activation_memory,
        )
        if not len(train):
            raise ValueError("train has no examples")
        if patience is not None and (eval is None or eval_every is None):
            raise ValueError("patience needs eval and eval_every")
        if optimizer.model is not model:
            raise ValueError("the optimizer moves the weights of another model")
        if optimizer.share is not None and not model.takes_queries:
            raise ValueError(f"share={optimizer.share!r} needs a model that was loaded with queries=True")
        if optimizer.share == "split" and batch_size < optimizer.queries:
            raise ValueError(
                f"share='split' needs an example for each of {optimizer.queries} directions, batch_size is {batch_size}"
            )
        if minimised == "loss" and model.bundle.loss is None:
            raise ValueError(f"{model.bundle.path}: the graph has no loss output; give an objective")
        lengths = None
        if group_by_length:
            lengths = lengths_of(train)
            if lengths is None:
                got = np.asarray(getattr(train, "lengths", None))
                raise ValueError(
                    f"group_by_length needs train.lengths, the number of tokens of each of {len(train)} examples; got "
                    f"{got.dtype} of shape {list(got.shape)}"
                )
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.eval = eval
        self.run = None if run is None else Path(run)
        function = metric_objective(objective, model.bundle) if isinstance(objective, str) else objective
        self.objective = Objective(function, task, activation_memory)
        self.loop = loop
        more = {judge.name} if minimised is None else {judge.name, minimised}
        metrics = None if more <= set(task.shown) else (*task.shown, *sorted(more - set(task.shown)))
        self._evaluator = None if eval is None else Evaluator(model, eval, batch_size, metrics, activation_memory)
        self._sampler: Evaluator | None = None
        self.source = source or Source()
        self.callback = callback
        self.stop_requested = False
        self.guarded = False
        self._guard = Guard(steps)
        self._order = Order(seed=optimizer.seed, size=len(train), batch_size=batch_size, lengths=lengths)
        self.forecast: Forecast | None = None
        self.sweep: Sweep | None = None
        self.evaluations: dict[int, Mapping[str, float | None]] = {}
        self.samples: dict[int, Mapping[str, float | None]] = {}
        self._unlogged: list[Mapping[str, Any]] = []
        self._skipped = 0
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
        methods: Mapping[str, type[Optimizer]] = METHODS,
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
        methods : mapping of str to type
            The optimizers by name.
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
            model = load_as(base, recipe)
        warn_of_another_session(model, past)
        loop = asdict(recipe.loop)
        minimised: str | BatchObjective | None = loop.pop("objective")
        if minimised is not None and objective is not None:
            raise JournalError(f"{past.path}: the run minimised the metric {minimised!r}, and no function")
        minimised = minimised or objective
        if minimised is None:
            raise JournalError(f"{past.path}: the run minimised a function of its caller: give it as the objective")
        trainer = cls(
            model,
            past.replay_onto(model, methods=methods),
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

    def _forward(self, batch: Batch) -> object:
        """Run the model as a step does, at the weights as they are or at the step's points."""
        if self.optimizer.share is None:
            return self.objective.forward(self.model, batch)
        return self._on(batch).forward(self.model, *self.optimizer.points())

    def _on(self, batch: Batch) -> OnBatch:
        return OnBatch(self.objective, batch, self.optimizer.queries)

    def _take_up(self, past: Run) -> None:
        steps = self.optimizer.step_number
        self._writer = RunWriter.resume(past, steps)
        self.evaluations = {step: values for step, values in past.evaluations().items() if step <= steps}
        if not steps and not any(EVAL in line for line in past.metrics()):  # killed between header and first line
            self.evaluations.clear()
        self.samples = {step: values for step, values in past.evaluations(SAMPLE).items() if step <= steps}
        self._guard = Guard(self.loop.steps, (line for line in past.metrics() if line["step"] <= steps))
        for entry in reversed(past.entries[:steps]):
            if entry.lr or any(entry.coefficients.values()):
                break
            self._skipped += 1
        if steps and self.loop.snapshot_every and steps % self.loop.snapshot_every == 0:
            self._writer.snapshot(self.optimizer)  # a killed run may have missed it

    def rehearse(self) -> Forecast:
        """Check what the run starts from, try its largest batch, evaluate, and estimate the time; :meth:`fit` does it.

        Nothing is written, and no weight is changed. A custom objective is not called.

        Raises
        ------
        BundleError
            A weight is not finite; names it.
        DataError
            The model cannot be run on an example; names file, line and reason.
        MemoryLimitError
            The largest batch takes more memory than the model's ``max_memory``.
        ValueError
            eps is too large or too small for the weights.
        """
        optimizer, loop = self.optimizer, self.loop
        step = optimizer.step_number
        if not step:
            check_start(optimizer, loop.steps)
        rehearsal = Rehearsal(self.model, self.train, loop.batch_size, self._forward)
        due = [at for at in range(step, loop.steps + 1) if self._eval_due(at) and at not in self.evaluations]
        seconds = None
        if 0 in due:
            started = time.perf_counter()
            self._evaluate(due.pop(0))
            seconds = time.perf_counter() - started
        if not step:
            self._sample(step)
        examples = 0 if self.eval is None else len(self.eval)
        left = range(step, loop.steps)
        self.forecast = rehearsal.forecast(optimizer, left, self._order, len(due), examples, seconds)
        return self.forecast

    def find_lr(self, told: Callable[[int, int], None] | None = None) -> Sweep:
        """Find the learning rate of the run, and give it to the optimizer; :meth:`fit` does so if it is "auto".

        It takes at most a tenth of the forward passes of the run's steps; of a run that is too short, it is the default
        of the method. The weights are then those before, bit for bit. The journal keeps the rate and how it was found,
        so that neither replay nor resuming needs another sweep. A custom objective is called.

        Parameters
        ----------
        told : callable, optional
            Called with how many forward passes of a batch are done, and how many there may be.

        Raises
        ------
        ValueError
            The optimizer has taken steps, or the weights in memory are not those of the bundle. They are read again
            from its file, unless few are trained (``exact``).
        """
        optimizer, loop = self.optimizer, self.loop
        if optimizer.step_number:
            raise ValueError("the optimizer has taken steps already: its learning rate is found before the first one")
        self.sweep = find_lr(
            optimizer,
            self.model,
            self.train,
            self._on,
            lambda batch: self.objective(self.model, batch),
            batch_size=loop.batch_size,
            steps=loop.steps,
            lengths=lengths_of(self.train) if loop.group_by_length else None,
            told=told,
        )
        optimizer.lr = self.sweep.lr
        return self.sweep

    def fit(self) -> None:
        """Train until the last step, until :attr:`stop_requested` is set or until ``patience`` runs out.

        :meth:`rehearse` comes first, if it was not called before. An exception in the objective ends the run. The
        journal then ends before that step, and :meth:`resume` repeats the step. If it was the first step of the run,
        no journal is left.

        Raises
        ------
        BundleError, DataError, MemoryLimitError, ValueError
            As for :meth:`rehearse`.
        TrainingError
            Too many losses in a row were not finite. If the update of a step ruined the weights, the journal ends
            before that step, and with a journal the model's weights are set to those before it.
        JournalError
            The run folder holds a run already.
        """
        began = self.run is not None and self._writer is None
        try:
            if self.forecast is None and self.optimizer.step_number < self.loop.steps:
                self.rehearse()
            if math.isnan(self.optimizer.lr):
                self.find_lr()
            if began:
                self._writer = self._begin()
            while self._unlogged and self._writer is not None:
                self._writer.log(self._unlogged.pop(0))
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
            if self.model.halves is not None:
                self.model.halves.store.flush()

    @property
    def rise(self) -> Rise | None:
        """How the training loss has risen, if the run is guarded and has therefore ended; else None."""
        return self._guard.rise if self.guarded and self.optimizer.step_number < self.loop.steps else None

    def _train(self, helper: ThreadPoolExecutor) -> None:
        optimizer, loop = self.optimizer, self.loop
        ahead: Future[Batch] | None = None
        while True:
            step = optimizer.step_number
            # A killed run may have missed the evaluation after its last step.
            if self._eval_due(step) and step not in self.evaluations:
                self._evaluate(step)
            ends = step >= loop.steps or self.stop_requested or loop.out_of_patience(self.evaluations)
            if ends or self.rise is not None:
                if step >= loop.steps:
                    self._sample(step)
                return
            started = time.perf_counter()
            batch = (ahead or helper.submit(self._batch, step)).result()
            ahead = helper.submit(self._batch, step + 1) if step + 1 < loop.steps else None
            info = self._step(batch)
            if ahead is not None:
                ahead.exception()  # waits; the step that needs the batch raises its exception
            seconds = time.perf_counter() - started
            self._guard.add(step + 1, info.loss)
            self._log({"step": step + 1, "loss": finite(info.loss), "lr": info.lr, "seconds": round(seconds, 6)})
            self._skipped = self._skipped + 1 if info.skipped else 0
            evaluation = self._evaluate(step + 1) if self._eval_due(step + 1) else None
            if loop.snapshot_every and (step + 1) % loop.snapshot_every == 0 and self._writer is not None:
                self._writer.snapshot(optimizer)
            if self.callback is not None:
                self.callback(Progress(info, loop.steps, seconds, evaluation))
            if self._skipped >= loop.max_skipped:
                raise self._not_finite(
                    f"the loss was not finite in the last {self._skipped} steps (up to step {step + 1})"
                )

    def _step(self, batch: Batch) -> StepInfo:
        step, writer = self.optimizer.step_number, self._writer
        examples = getattr(batch, "examples", np.empty(0, np.int64))
        try:
            with naming_culprit(self.model, self.train, examples):
                return self.optimizer.step(self._on(batch), None if writer is None else writer.append)
        except Exception:
            # The step was undone except for rounding. The journal ends before it, so a resumed run repeats it.
            if writer is not None:
                writer.truncate(step)
            raise

    def _batch(self, step: int) -> Batch:
        return self.train.batch(self._order(step))

    def _sample(self, step: int) -> None:
        """Without evaluation data, evaluate the objective on some training data; a function of the caller is not."""
        loop, metric = self.loop, self.objective.metric
        if self.eval is not None or step in self.samples or metric is None:
            return
        if self._sampler is None:
            task = self.objective.task
            metrics = list({metric.name: None, task.metric().name: None} if task.untrained else {metric.name: None})
            sample = Sample.of_run(self.train, self._order, loop.steps, self.optimizer.forwards)
            self._sampler = Evaluator(self.model, sample, loop.batch_size, metrics, loop.activation_memory)
        evaluation = self._sampler()
        self.samples[step] = evaluation.values
        self._log(line_of(SAMPLE, step, evaluation))
        updated = step - self._skipped
        if updated and not math.isfinite(self._loss_at(updated)):  # no step measures the last update
            raise self._not_finite(f"the loss is not finite after step {updated}")

    def _not_finite(self, said: str) -> TrainingError:
        updated = self.optimizer.step_number - self._skipped
        return explain(said, updated, self._loss_at, self._go_back, is_fp16=self.model.bundle.is_fp16)

    def _loss_at(self, step: int) -> float:
        return self.objective(self.model, self._batch(step - 1))

    def _go_back(self, steps: int) -> bool:
        if self._writer is None:
            return False
        self._writer.truncate(steps)
        Run(self._writer.path).replay_onto(self.model)
        return True

    def _begin(self) -> RunWriter:
        assert self.run is not None
        if self.optimizer.step_number:
            raise ValueError("the optimizer has taken steps already, which a new journal would not hold")
        model = self.model
        recipe = Recipe(
            model=base_of(model),
            method=self.optimizer.settings(),
            loop=self.loop,
            session=Session(
                threads=model.threads,
                forward_seconds={str(n): seconds for n, seconds in model.forward_seconds.items()} or None,
                prepacked=model.prepacked,
                **described(model),
            ),
            data=DataUsed(
                train=self.train.fingerprint,
                eval=None if self.eval is None else self.eval.fingerprint,
                source=replace(self.source, before=all_finite(self.evaluations.get(0))),
            ),
            sweep=None if self.sweep is None else self.sweep.settings(),
        )
        return RunWriter.begin(self.run, recipe, model.init)

    def _eval_due(self, step: int) -> bool:
        return self.eval is not None and self.loop.evaluates_after(step)

    def evaluate(self) -> dict[str, float]:
        """Run :func:`evaluate` on the evaluation data now, with the metric and the objective."""
        if self._evaluator is None:
            raise ValueError("the trainer has no eval data")
        return self._evaluator().values

    def _evaluate(self, step: int) -> dict[str, float]:
        assert self._evaluator is not None
        evaluation = self._evaluator()
        self.evaluations[step] = evaluation.values
        self._log(line_of(EVAL, step, evaluation))
        return evaluation.values

    def log_baselines(self, found: Heads) -> None:
        """Have the metrics of the run keep what it is to be compared with; before :meth:`fit`."""
        self._log(found.line())

    def _log(self, line: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.log(line)
        elif self.run is not None:
            self._unlogged.append(line)
