"""``pocketzo eval``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pocketzo import kernels
from pocketzo.cli.command import Command
from pocketzo.cli.console import metric_text, say
from pocketzo.cli.options import (
    PATH,
    base_option,
    best_option,
    column_options,
    json_option,
    metric_names,
    step_option,
    threads_option,
)
from pocketzo.cli.runs import as_run, chosen_step
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.load import load
from pocketzo.tasks.evaluate import evaluate as evaluate_model
from pocketzo.tasks.metrics import METRICS
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import all_finite


@click.command("eval", cls=Command)
@click.argument("model", type=PATH, metavar="BUNDLE|RUN")
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Examples: .jsonl, .tsv, .csv or .npz.")
@click.option(
    "--metric",
    "metrics",
    callback=metric_names,
    multiple=True,
    metavar="NAME",
    help=f"Metrics to print: {', '.join(METRICS)}; repeatable, or comma-separated.  [default: the task's, and loss]",
)
@json_option
@step_option
@best_option
@base_option
@click.option("--batch-size", type=int, default=32, help="Examples per forward pass.")
@threads_option("the number of fast cores")
@column_options
def evaluate(
    model: Path,
    data: Path,
    metrics: tuple[str, ...],
    as_json: bool,
    step: int | None,
    best: bool,
    base: Path | None,
    batch_size: int,
    threads: int | None,
    columns: Columns,
) -> None:
    """Evaluate a bundle, or the weights after a run.

    Prints accuracy, mean loss, and the number of examples. A metric that the graph has no output for is null, or "-".

    \b
    Examples:
      pocketzo eval runs/first --data dev.tsv --json
      {"accuracy": 0.8131, "loss": 0.4302, "count": 872}
      pocketzo eval base --data dev.tsv --metric f1,matthews
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    run = as_run(model)
    if run is None and (step is not None or best or base is not None):
        raise click.UsageError(f"--step, --best and --base belong to a run; {model} is a bundle")
    number = None if run is None else chosen_step(run, step, best)
    bundle = Bundle.read(model) if run is None else run.base(base)
    examples = load_dataset(data, bundle, columns=columns)
    if threads is not None:
        kernels.set_threads(threads)
    loaded = load(bundle, threads=threads)
    if run is not None:
        run.replay_onto(loaded, step=number)
    result = evaluate_model(loaded, examples, batch_size=batch_size, metrics=metrics or None)
    names = metrics or (task_of(bundle).default_metric, "loss")
    if as_json:
        say(json.dumps(all_finite({name: result.get(name) for name in (*names, "count")})))
    else:
        say(
            " · ".join(f"{name} {metric_text(name, result)}" for name in names)
            + f" · {len(examples)} examples"
            + ("" if run is None else f" · after step {number}")
        )
