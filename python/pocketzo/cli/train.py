"""``pocketzo train``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal, get_args

import click
import numpy as np
from click.core import ParameterSource

from pocketzo import kernels
from pocketzo.arguments import check_integer
from pocketzo.cli.baselines import Choice, columns_of, heads_of, measure, say_heads
from pocketzo.cli.cache import RunCache
from pocketzo.cli.command import Command
from pocketzo.cli.console import (
    err,
    evaluation_table,
    evaluations_of,
    fact,
    forecast_text,
    metric_text,
    note,
    out,
    quoted,
    say,
    size_text,
)
from pocketzo.cli.head import base_of, is_given, refuse_options_of_steps, train_and_say
from pocketzo.cli.method import interval_option, own_settings, rank_option
from pocketzo.cli.options import (
    PATH,
    activation_memory_option,
    batch_size_option,
    column_options,
    group_by_length_option,
    groups_option,
    learning_rate,
    memory_size,
    schedule_option,
    threads_option,
    trainable_option,
    warmup_option,
    weight_decay_option,
)
from pocketzo.cli.progress import find_lr_shown, fit_shown
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.data.order import Order
from pocketzo.errors import BrokenPackageError, BundleError, JournalError, MemoryLimitError, MissingExtraError
from pocketzo.formats.activations import Dtype
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.cores import thread_counts
from pocketzo.optim.block import Block
from pocketzo.optim.groups import ParamGroup
from pocketzo.optim.methods import METHODS
from pocketzo.optim.optimizer import Share
from pocketzo.optim.pace import Pace
from pocketzo.optim.schedule import Schedule
from pocketzo.runtime.load import load
from pocketzo.tasks.metrics import METRICS
from pocketzo.tasks.parts import parts
from pocketzo.tasks.registry import task_of
from pocketzo.train.baselines import Majority
from pocketzo.train.differences import differences
from pocketzo.train.plot import plot_run
from pocketzo.train.recipe import Source
from pocketzo.train.resume import resume as resume_run
from pocketzo.train.resume import use_threads
from pocketzo.train.run import JOURNAL, Run, check_new
from pocketzo.train.trainer import Trainer
from pocketzo.train.tuned import load_adapter
from pocketzo.train.verdict import verdict


@click.command(cls=Command)
@click.argument("bundle", type=PATH, required=False)
@click.option("--resume", type=PATH, metavar="RUN", help="Resume a run. All settings come from its journal.")
@click.option(
    "--continue",
    "after",
    type=PATH,
    metavar="RUN",
    help="Of a side head: fit a new one to the examples of RUN and to those of --data. Examples that RUN kept cost no "
    "forward pass; else its data file is read again. BUNDLE may be left out.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Of a side head: keep labels and states of the examples in RUN, for --continue. They are personal data; the "
    "file is readable by its owner alone.",
)
@click.option("--data", type=PATH, metavar="FILE", help="Training examples: .jsonl, .tsv, .csv, .npz or .txt.")
@click.option("--eval", "eval_data", type=PATH, metavar="FILE", help="Held-out examples for evaluation.")
@click.option("-o", "--output", type=PATH, metavar="RUN", help="Folder for the run; must be new or hold this run.")
@click.option(
    "--steps", type=int, default=1000, help="Length of the run in steps.  [a side head with --objective: 300]"
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="fzoo",
    help="fzoo: 1 + --queries forward passes per step; mezo: 2 for each of --queries; momentum: as mezo, with steps of "
    "a size that does not depend on the loss, and 4 bytes of memory for each trained parameter; sign: as mezo, by the "
    "sign of the slope alone; lozo: as mezo, along directions of low rank for each matrix, which are cheaper to draw.",
)
@click.option(
    "--lr",
    callback=learning_rate,
    default="auto",
    metavar="NUMBER|auto",
    help="Learning rate. auto: found before the first step, by at most a tenth of the forward passes of the run; the "
    "journal keeps it.",
)
@click.option("--momentum", type=float, metavar="SHARE", help="Share of the mean that a step keeps.  [default: 0.9]")
@rank_option
@interval_option
@click.option("--eps", type=float, default=1e-3, help="Size of the perturbation of the weights.")
@batch_size_option()
@click.option("--seed", type=int, default=0, help="Seed of the directions and of the order of the data.")
@weight_decay_option
@click.option(
    "--init",
    type=PATH,
    metavar="DIR",
    help="Begin from an adapter of PEFT. Its rank, alpha and targets have to be those of the bundle's set lora. RUN "
    "keeps its numbers as init.safetensors, so that neither replay nor --resume needs DIR.",
)
@trainable_option
@groups_option
@click.option(
    "--distribution",
    type=click.Choice(["gaussian", "rademacher"]),
    help="Distribution of the directions' elements.  [default: rademacher for fzoo and sign, else gaussian]",
)
@click.option("--queries", type=int, metavar="N", help="Directions per step.  [default: 8 for fzoo, else 1]")
@click.option(
    "--share",
    type=click.Choice(get_args(Share)),
    help="Evaluate all directions of a step in one forward pass. batch: each on the whole batch, which is repeated; "
    "split: each on its own share of the batch, so that --queries take no more work than one. For what lora, ia3, "
    "adapter:R, prefix:N and parallel-adapter:R of --train add.  [default: one direction after the other]",
)
@click.option(
    "--pace",
    type=float,
    metavar="VARIANCE",
    help="Let a step of mezo, lozo or momentum take another --queries directions while the variance of its estimate, "
    "in units of the usual square of a slope, is above this. A usual step takes 2 / VARIANCE directions: 20 with 0.1.",
)
@click.option("--pace-most", type=int, metavar="N", help="Most directions of a step with --pace.  [default: 64]")
@click.option(
    "--candidates",
    type=int,
    metavar="M",
    help="Draw M directions a step and use the --queries of them that are most parallel to the last update, which "
    "takes no forward pass.  [default: use what is drawn]",
)
@click.option(
    "--block",
    type=float,
    metavar="SHARE",
    help="Perturb and update only a random share of the tensors each step, such as 0.25. Useful for short texts and "
    "small batches, where updating weights takes as long as the forward passes.  [default: all tensors]",
)
@schedule_option
@warmup_option
@click.option(
    "--eval-every", type=int, metavar="STEPS", help="Steps between evaluations.  [default: 10 evaluations per run]"
)
@click.option(
    "--metric",
    type=click.Choice(list(METRICS)),
    help="Metric that selects the best step.  [default: as --objective; for the loss, the task's, such as accuracy]",
)
@click.option(
    "--objective",
    type=click.Choice(list(METRICS)),
    default="loss",
    help="Metric of each step's batch to minimise; 1 - metric where higher is better. accuracy, f1 and matthews are "
    "piecewise constant: with small batches and a small --eps they do not change. A side head is fitted by the loss, "
    "and then moved by zeroth order over what is kept of the backbone.",
)
@click.option("--patience", type=int, metavar="N", help="Stop after N consecutive evaluations without improvement.")
@click.option(
    "--guard/--no-guard",
    default=True,
    help="End the run when the mean training loss of a twentieth of its steps is clearly above the lowest one: by 5 % "
    "and by 5 standard errors, and more than half of what was gained is lost. All steps stay in the journal.",
)
@click.option(
    "--snapshot-every",
    type=int,
    metavar="STEPS",
    help="Steps between snapshots of the weights, which make a resume faster.",
)
@group_by_length_option
@click.option(
    "--prepack/--no-prepack",
    default=None,
    help="Use onnxruntime's prepacked weight layout, which is faster.  [default: where possible]",
)
@click.option(
    "--max-memory",
    callback=memory_size,
    metavar="SIZE",
    help="Stop, and undo the current step, before the resident memory of this process reaches SIZE, such as 1.5G. "
    "loss.png is not drawn then, as drawing it takes 50 MB.",
)
@click.option(
    "--cache",
    default="auto",
    metavar="DIR|auto|off",
    help="Run what comes before the first trained layer once for each example, and keep the result in DIR. auto: in "
    "the user's cache folder, where that saves 30 % of a forward pass or more and fits. The folder holds what the "
    "model computes from the examples, from which texts may be guessed; only you can read it. See `pocketzo cache`.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(get_args(Dtype)),
    help="Type of the numbers that are kept. fp32: losses are those without a cache; fp16 takes half, int8 a quarter.  "
    "[default: fp32]",
)
@click.option(
    "--cache-limit",
    callback=memory_size,
    metavar="SIZE",
    help="Bytes of the whole cache, such as 2G. What was not used for the longest time is removed.  [default: 4G]",
)
@click.option(
    "--baselines",
    type=click.Choice(get_args(Choice)),
    default="auto",
    help="Measure a linear probe and a side head of the model before training, to compare the run with: one forward "
    "pass of each evaluation example, and of 1,024 training examples at most. auto: if these are no more than a tenth "
    "of the forward passes of the run.",
)
@activation_memory_option
@threads_option("all cores; for forward passes, the fastest of 1, 2, the fast cores and all, timed in a few passes")
@column_options
@click.pass_context
def train(
    context: click.Context,
    bundle: Path | None,
    resume: Path | None,
    after: Path | None,
    keep: bool,
    data: Path | None,
    eval_data: Path | None,
    output: Path | None,
    steps: int,
    method: str,
    lr: float | Literal["auto"],
    momentum: float | None,
    rank: int | None,
    interval: int | None,
    eps: float,
    batch_size: int,
    seed: int,
    weight_decay: float,
    init: Path | None,
    trainable: str | None,
    groups: tuple[ParamGroup, ...],
    distribution: str | None,
    queries: int | None,
    share: Share | None,
    pace: float | None,
    pace_most: int | None,
    candidates: int | None,
    block: float | None,
    schedule: str,
    warmup: int,
    eval_every: int | None,
    metric: str | None,
    objective: str,
    patience: int | None,
    guard: bool,
    snapshot_every: int | None,
    group_by_length: bool | None,
    prepack: bool | None,
    max_memory: int | None,
    activation_memory: int | None,
    cache: str,
    cache_dtype: Dtype | None,
    cache_limit: int | None,
    baselines: Choice,
    threads: int | None,
    columns: Columns,
) -> None:
    """Train BUNDLE on examples, and save the run as a journal in a run folder.

    The weights are updated in place, by forward passes alone. RUN gets journal.pzj, from which `pocketzo replay`
    rebuilds the tuned weights bit for bit, metrics.jsonl, and, with matplotlib, loss.png.

    Ctrl-C (or SIGTERM) ends the run after the current step, with exit code 130 (143). A second Ctrl-C ends it
    immediately. The same command, or --resume, resumes the run, also after a crash or a kill. On the same machine the
    final weights are bit for bit those of the uninterrupted run, unless --max-memory is too small for prepacked
    weights: that changes roundings, and a warning says so. With --resume only --max-memory and --no-guard may be given,
    and, if these files were moved, BUNDLE, --data and --eval.

    \b
    Examples:
      pocketzo train base --data train.tsv --eval dev.tsv -o runs/first \\
          --steps 400 --group classifier:lr=10,eps=10
      pocketzo train --resume runs/first
      pocketzo train --continue runs/head --data more.tsv -o runs/more
    """
    if resume is not None:
        allowed = {"resume", "bundle", "data", "eval_data", "max_memory", "guard"}
        for option in context.command.params:
            given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
            if given and option.expose_value and option.name not in allowed:
                raise click.UsageError(f"{option.opts[-1]} cannot be changed by --resume: it is in the run's journal")
        trainer = resume_run(resume, bundle=bundle, train=data, eval=eval_data, max_memory=max_memory)
        trainer.guarded = guard
        _train(_noted(trainer), resume)
        return
    if after is not None and bundle is None:
        bundle = base_of(after)
    if bundle is None or data is None or output is None:
        missing = "BUNDLE" if bundle is None else "--data" if data is None else "-o"
        raise click.UsageError(f"{missing} is missing: a new run needs BUNDLE, --data and -o; an old one --resume")
    own = own_settings(method, momentum=momentum, rank=rank, interval=interval)
    if share is not None and prepack is False:
        raise click.UsageError("--share prepacks what is not trained: leave --no-prepack out")
    if pace_most is not None and pace is None:
        raise click.UsageError("--pace-most needs --pace")
    if patience is not None and eval_data is None:
        raise click.UsageError("--patience needs --eval")
    past = Run(output) if (output / JOURNAL).exists() else None
    if past is None:
        check_new(output)
    read = Bundle.read(bundle)
    if objective == "loss" and read.loss is None:
        raise BundleError(
            f"{bundle}: the bundle has no loss to train by: prepare the model with --loss cross-entropy, bce or mse, "
            f"train by --objective, or by a function of your own in Python"
        )
    if read.side is not None and context.get_parameter_source("method") == ParameterSource.DEFAULT:
        refuse_options_of_steps(context)
        train_and_say(
            read,
            data,
            eval_data,
            output,
            objective=objective,
            steps=steps if is_given(context, "steps") else None,
            seed=seed,
            threads=threads,
            columns=columns,
            keep=keep,
            after=after,
        )
        return
    if keep or after is not None:
        raise click.UsageError(f"{'--keep' if keep else '--continue'} is for a side head that is fitted at once")
    check_integer("batch_size", batch_size, 1)
    check_integer("steps", steps, 1)
    examples = load_dataset(data, read, columns=columns)
    held_out = None if eval_data is None else load_dataset(eval_data, read, columns=columns)
    others: list[str] = []
    eval_every = max(1, steps // 10) if eval_every is None else eval_every
    check_integer("eval_every", eval_every, 1)
    if group_by_length is None:
        group_by_length = examples.lengths is not None
    activations = RunCache(cache, cache_dtype, cache_limit)
    cut = heads = heads_text = None
    if past is not None:  # these two are not to be compared but taken over, where they are not given
        session = past.recipe.session
        others += activations.differences(past)
        cut = activations.as_before(past, read)
        pairs = ("threads", session.threads, threads), ("prepacked", session.prepacked, prepack)
        others += [f"{name} is {there} there and {now} here" for name, there, now in pairs if now not in (None, there)]
        if lr == "auto" and past.recipe.sweep is not None:
            lr = past.recipe.method["lr"]
        threads = use_threads(session)
        prepack = prepack or (None if session.prepacked else False)
    else:
        if threads is not None:
            kernels.set_threads(threads)
        # What an adapter writes at the beginning may be in any of the layers.
        narrowed = None if init is not None else trainable
        forwards = steps * batch_size * METHODS[method].evaluations(queries, share)
        evaluations = steps // eval_every + 1
        cut = activations.plan(read, narrowed, examples, held_out, steps=forwards, evaluations=evaluations)
        whole = forwards + evaluations * (0 if held_out is None else len(held_out))
        heads, heads_text = measure(
            baselines,
            read,
            examples,
            held_out,
            forwards=whole * (1 - activations.saved),
            metric=metric or (None if objective == "loss" else objective),
            seed=seed,
            threads=threads,
            max_memory=max_memory,
        )
    # Only timing needs a batch.
    first = None
    if not threads:
        batch = examples.batch(Order(seed=seed, size=len(examples), batch_size=batch_size)(0))
        first = parts(task_of(read), batch, activation_memory)[0].batch
    with err.status("loading" if threads else f"loading, timing {' or '.join(map(str, thread_counts()))} threads"):
        model = load(
            read,
            threads=threads,
            batch=first,
            prepack="auto" if prepack is None else prepack,
            max_memory=max_memory,
            queries=share is not None,
            cut=cut,
        )
    activations.fill(model, examples, activation_memory)
    if init is not None:
        load_adapter(model, init)
    optimizer = METHODS[method](
        model,
        lr=lr,
        eps=eps,
        seed=seed,
        weight_decay=weight_decay,
        trainable=trainable,
        groups=groups,
        distribution=distribution,  # type: ignore[arg-type]  # click has checked it
        queries=queries,
        share=share,
        pace=None if pace is None else Pace(pace) if pace_most is None else Pace(pace, pace_most),
        candidates=candidates,
        schedule=Schedule(schedule, steps, warmup),  # type: ignore[arg-type]
        subset=None if block is None else Block(block),
        **own,
    )
    trainer = Trainer(
        model,
        optimizer,
        examples,
        eval=held_out,
        batch_size=batch_size,
        steps=steps,
        run=output,
        eval_every=eval_every,
        metric=metric,
        objective=objective,
        patience=patience,
        snapshot_every=snapshot_every,
        group_by_length=group_by_length,
        activation_memory=activation_memory,
    )
    if past is not None:
        others += differences(past, trainer.optimizer, trainer.loop)
        begun = past.init()
        if begun.keys() != model.init.keys() or not all(
            np.array_equal(begun[name], model.init[name]) for name in begun
        ):
            others.append(f"it began from {'an' if begun else 'no'} adapter there, and from {init or 'none'} here")
        if others:
            raise JournalError(
                f"{output}: holds a run with other settings: {'; '.join(others)}. Give those to go on with it, or "
                f"choose another place"
            )
        trainer = Trainer.resume(output, examples, eval=held_out, model=model)
        trainer.guarded = guard
        _train(_noted(trainer), output)
        return
    if heads is not None:
        trainer.log_baselines(heads)
    if heads_text is not None:
        note(heads_text)
    trainer.guarded = guard
    trainer.source = Source.of(data, eval_data, columns)
    for path, read_data in ((data, examples), (eval_data, held_out)):
        if read_data is not None and read_data.cut and read_data.lengths is not None:
            note(f"{path}: {read_data.cut} of {len(read_data)} texts were cut to {int(read_data.lengths.max())} tokens")
    if init is not None:
        note(f"{init}: begins from {len(model.init)} tensors of this adapter")
    timed = fact("forward_seconds", model.forward_seconds)
    note(
        f"{len(examples)} examples, {optimizer.parameters:,} parameters to train, {kernels.isa()} kernels, "
        f"{'prepacked' if model.prepacked else 'plain'} weights, "
        f"{model.threads} thread{'s' if model.threads > 1 else ''}" + (f" ({timed} a forward)" if timed else "")
    )
    _train(trainer, output)


def _noted(trainer: Trainer) -> Trainer:
    """Print how far a resumed run is."""
    step = trainer.optimizer.step_number
    if step >= trainer.loop.steps:
        note(f"{trainer.run}: all {trainer.loop.steps} steps are done")
    else:
        note(f"{trainer.run}: going on after step {step} of {trainer.loop.steps}")
    return trainer


def _train(trainer: Trainer, run: Path) -> None:
    again = f"pocketzo train --resume {quoted(run)}"
    try:
        if trainer.optimizer.step_number < trainer.loop.steps:
            with err.status("trying the largest batch"):
                forecast = trainer.rehearse()
            note(forecast_text(trainer, forecast))
            _note_untrained(trainer)
            if math.isnan(trainer.optimizer.lr):
                find_lr_shown(trainer)
        stopped_by = fit_shown(trainer, again)
    except MemoryLimitError as error:
        if not (run / JOURNAL).exists():
            raise MemoryLimitError(f"{error}. Stopped before the first step, so that there is no journal") from None
        done = Run(run).steps
        raise MemoryLimitError(
            f"{error}. Stopped after step {done} of {trainer.loop.steps}; to go on: {again} --max-memory SIZE"
        ) from None
    done = trainer.optimizer.step_number
    past = Run(run)
    if trainer.model.max_memory is None:  # matplotlib takes some 50 MB
        plot_or_note(run)
    _print_summary(past, trainer)
    if stopped_by is not None and done < trainer.loop.steps:
        say(f"stopped after step {done} of {trainer.loop.steps}; to go on: {again}")
        sys.exit(128 + stopped_by)
    rise = trainer.rise
    if rise is not None:
        say(
            f"ended after step {done} of {trainer.loop.steps}: {rise.text(trainer.loop.minimised)}; "
            f"to go on all the same: {again} --no-guard"
        )
    elif done < trainer.loop.steps:
        say(
            f"ended after step {done} of {trainer.loop.steps}: {trainer.loop.patience} evaluations without a better one"
        )
    data = past.recipe.data.source.eval or "FILE"
    best = "" if past.best_step in (None, past.steps) else " --best"
    if rise is not None and past.best_step is None:
        best = f" --step {rise.best_step}"
    say(f"evaluate:  pocketzo eval {quoted(run)} --data {quoted(data)}{best}")
    say(f"get the tuned bundle:  pocketzo replay {quoted(run)} -o tuned{best}")


def plot_or_note(run: Path) -> None:
    """Draw ``loss.png``, or note that matplotlib is missing."""
    try:
        plot_run(run)
    except BrokenPackageError as error:
        note(f"note: no loss.png: {error}")
    except MissingExtraError:
        note("note: no loss.png without matplotlib: pip install 'pocketzo[plot]'")


def _note_untrained(trainer: Trainer) -> None:
    """Print what the base achieves, if it knows the task before the run."""
    name = trainer.objective.task.untrained
    if name is None or trainer.optimizer.step_number:
        return
    on = "" if trainer.samples.get(0) is None else " on some training examples"
    found = trainer.evaluations.get(0) or trainer.samples.get(0) or {}
    values = ", ".join(f"{metric} {metric_text(metric, found)}" for metric in METRICS if metric in found)
    if values:
        note(f"{name}{on}: {values}")


def _print_summary(past: Run, trainer: Trainer) -> None:
    heads = heads_of(past)
    if columns := evaluations_of(past, trainer.objective.task.untrained):
        out.print(evaluation_table(columns | columns_of(heads)))
    for line in verdict(past, ended=trainer.rise is not None):
        say(line)
    journal = past.path / JOURNAL
    say(f"{past.path}: {past.steps} steps, journal of {size_text(journal.stat().st_size)}")
    found = past.evaluations()
    majority = Majority.of(trainer.train, trainer.eval)
    if majority is not None and found:
        say(majority.text(trainer.model.bundle.labels, found[max(found)]))
    if heads is not None:
        say_heads(heads, past, trainer.model.bundle)
