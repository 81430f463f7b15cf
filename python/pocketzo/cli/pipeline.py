"""``pocketzo pipeline``: a model that no device holds alone is cut into stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import click

from pocketzo.cli.command import Command, Commands
from pocketzo.cli.console import evaluation_table, evaluations_of, forecast_text, note, out, quoted, say, size_text
from pocketzo.cli.options import (
    PATH,
    activation_memory_option,
    batch_size_option,
    column_options,
    group_by_length_option,
    groups_option,
    memory_size,
    schedule_option,
    threads_option,
    trainable_option,
    warmup_option,
    weight_decay_option,
)
from pocketzo.cli.progress import fit_shown
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.errors import BundleError, JournalError
from pocketzo.formats.bundle import Bundle
from pocketzo.optim.groups import ParamGroup
from pocketzo.optim.methods import METHODS
from pocketzo.optim.schedule import Schedule
from pocketzo.packages import require
from pocketzo.pipeline.chain import busy, chain_of, pooled_model
from pocketzo.pipeline.optimizer import Pooled, pooled_method
from pocketzo.pipeline.split import split as split_bundle
from pocketzo.pipeline.split import stage_path
from pocketzo.tasks.metrics import METRICS
from pocketzo.train.differences import differences
from pocketzo.train.recipe import Source
from pocketzo.train.run import JOURNAL, Run, check_new
from pocketzo.train.trainer import Trainer


def shares(_: click.Context, __: click.Parameter, value: str | None) -> list[float] | None:
    """Parse numbers between commas."""
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} are not numbers between commas, such as 1,2") from None


@click.group(cls=Commands)
def pipeline() -> None:
    """Train a model that no device holds alone: each device has a stage of it.

    `split` cuts a bundle into stages. Copy each stage to its device, start Ray there, and `run` trains over all of
    them. Only activations go forward and losses come back. docs/federated.md shows all commands.

    \b
    Example, on one machine:
      pocketzo pipeline split base -o stages --stages 2
      pocketzo pipeline run base stages --data train.tsv -o runs/first --lr 1e-3
    """


@pipeline.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="STAGES", help="Gets stage-0, stage-1 and so on.")
@click.option("--stages", "count", type=int, default=2, metavar="N", help="How many stages.")
@click.option(
    "--shares",
    callback=shares,
    metavar="X,Y,...",
    help="Share of each stage in the weights in memory, in any unit, such as the devices' free memory.  "
    "[default: equal]",
)
def split(bundle: Path, output: Path, count: int, shares: list[float] | None) -> None:
    """Cut BUNDLE into stages, each a folder that a device can load without the others.

    A cut is made where few values cross it. A table that both ends of a model read is in both stages.

    \b
    Example:
      pocketzo pipeline split base -o stages --stages 3 --shares 1,2,1
    """
    for number, stage in enumerate(split_bundle(Bundle.read(bundle), output, count, shares)):
        trained = sum(tensor.trainable for tensor in stage.tensors)
        gives = "" if stage.stage is None or stage.stage.is_last else f"; gives {', '.join(stage.stage.gives)}"
        say(
            f"{stage_path(output, number)}: {len(stage.tensors)} tensors, {trained} of them trainable, "
            f"{size_text(stage.weights_nbytes)}{gives}"
        )


@pipeline.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.argument("stages", type=PATH)
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Training examples, as for train.")
@click.option("--eval", "eval_data", type=PATH, metavar="FILE", help="Held-out examples for evaluation.")
@click.option("-o", "--output", type=PATH, required=True, metavar="RUN", help="Folder of the run; new, or holds it.")
@click.option(
    "--address", metavar="HOST:PORT", help="Of the Ray cluster.  [default: all stages are processes on this machine]"
)
@click.option("--stages", "count", type=int, metavar="N", help="How many stages.  [default: those in STAGES]")
@click.option("--steps", type=int, default=1000, help="Length of the run in steps.")
@click.option("--method", type=click.Choice(list(METHODS)), default="fzoo", help="Method, as for train.")
@click.option("--lr", type=float, required=True, help="Learning rate.")
@click.option("--eps", type=float, default=1e-3, help="Size of the perturbation of the weights.")
@click.option("--queries", type=int, metavar="N", help="Directions per step.  [default: that of the method]")
@batch_size_option()
@click.option(
    "--microbatches", type=int, default=1, metavar="N", help="Parts in which a batch goes through the stages."
)
@click.option("--seed", type=int, default=0, help="Seed of the directions and of the order of the data.")
@weight_decay_option
@trainable_option
@groups_option
@schedule_option
@warmup_option
@click.option("--objective", type=click.Choice(list(METRICS)), default="loss", help="What is minimised.")
@click.option("--metric", type=click.Choice(list(METRICS)), help="Metric that selects the best evaluation.")
@click.option("--eval-every", type=int, metavar="STEPS", help="Steps between evaluations.  [default: a tenth of them]")
@group_by_length_option
@activation_memory_option
@click.option("--max-memory", callback=memory_size, metavar="SIZE", help="Limit of each stage's process, such as 1.5G.")
@threads_option("of each stage, as many as its device has fast cores")
@column_options
def run(
    bundle: Path,
    stages: Path,
    data: Path,
    eval_data: Path | None,
    output: Path,
    address: str | None,
    count: int | None,
    steps: int,
    method: str,
    lr: float,
    batch_size: int,
    schedule: str,
    warmup: int,
    objective: str,
    metric: str | None,
    eval_every: int | None,
    group_by_length: bool | None,
    activation_memory: int | None,
    max_memory: int | None,
    threads: int | None,
    columns: Columns,
    trainable: str | None,
    groups: tuple[ParamGroup, ...],
    **settings: Any,
) -> None:
    """Train BUNDLE on examples, over the stages that `split` wrote to STAGES.

    This device leads: it needs BUNDLE on its disk, not in its memory, and the data. A device of the cluster needs the
    folder of its own stage alone, at the same path. RUN is that of `pocketzo train` on one device: `replay`, `eval` and
    `info` take it. The same command goes on with a run that was ended, or whose device was lost.

    \b
    Examples:
      pocketzo pipeline run base stages --data train.tsv -o runs/first --lr 1e-3
      pocketzo pipeline run base stages --data train.tsv -o runs/first --lr 1e-3 --address 192.168.1.2:6379
    """
    require("ray")
    from pocketzo.pipeline.actors import Actors

    read = Bundle.read(bundle)
    past = Run(output) if (output / JOURNAL).exists() else None
    if past is None:
        check_new(output)
    if count is None:
        count = sum(1 for path in stages.glob("stage-*") if path == stage_path(stages, int(path.name[6:])))
    if count < 2:
        raise BundleError(f"{stages}: has no stages; make them with 'pocketzo pipeline split', or say --stages")
    examples = load_dataset(data, read, columns=columns)
    held_out = None if eval_data is None else load_dataset(eval_data, read, columns=columns)
    each = None if threads is None else [threads] * count
    with Actors(stages, count, address=address, threads=each, max_memory=max_memory) as workers:
        model = pooled_model(read, workers)
        optimizer = pooled_method(method)(
            model,
            lr=lr,
            trainable=trainable,
            groups=groups,
            schedule=Schedule(schedule, steps, warmup),  # type: ignore[arg-type]  # click has checked it
            **settings,
        )
        trainer = Trainer(
            model,
            optimizer,
            examples,
            eval=held_out,
            batch_size=batch_size,
            steps=steps,
            run=output,
            eval_every=max(1, steps // 10) if eval_every is None else eval_every,
            metric=metric,
            objective=objective,
            group_by_length=examples.lengths is not None if group_by_length is None else group_by_length,
            activation_memory=activation_memory,
            source=Source.of(data, eval_data, columns),
        )
        if past is not None:
            if others := differences(past, optimizer, trainer.loop):
                raise JournalError(f"{output}: holds a run with other settings: {'; '.join(others)}")
            methods = {name: pooled_method(name) for name in METHODS}
            trainer = Trainer.resume(output, examples, eval=held_out, model=model, methods=methods)
            cast(Pooled, trainer.optimizer).microbatches = optimizer.microbatches  # changes roundings only
        passes = optimizer.forwards * optimizer.microbatches
        note(
            f"{len(examples)} examples, {optimizer.parameters:,} parameters to train in {count} stages, each busy for "
            f"{busy(count, passes):.0%} of a step of {passes} forward passes if they are equally fast"
        )
        if trainer.optimizer.step_number < steps:
            note(forecast_text(trainer, trainer.rehearse()))
        stopped_by = fit_shown(trainer, "the same command")
        for number, peak in enumerate(map(chain_of(model).result, chain_of(model).every("peak"))):
            say(f"stage {number}: {'unknown memory' if peak is None else size_text(peak)} at most")
    past = Run(output)
    if columns_ := evaluations_of(past, trainer.objective.task.untrained):
        out.print(evaluation_table(columns_))
    if stopped_by is not None and past.steps < steps:
        say(f"stopped after step {past.steps} of {steps}; to go on: the same command")
        sys.exit(128 + stopped_by)
    say(f"get the tuned bundle:  pocketzo replay {quoted(output)} -o tuned")
