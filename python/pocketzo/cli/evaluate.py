"""``pocketzo eval``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from pocketzo import kernels
from pocketzo.cli.command import Command
from pocketzo.cli.console import metric_text, note, out, say
from pocketzo.cli.generated import generated_shown
from pocketzo.cli.head import is_head_run, tuned
from pocketzo.cli.options import (
    PATH,
    activation_memory_option,
    average_option,
    base_option,
    best_option,
    column_options,
    json_option,
    metric_names,
    step_option,
    threads_option,
    unescaped,
)
from pocketzo.cli.runs import as_run, chosen_step, over_steps
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.errors import DataError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.load import load
from pocketzo.runtime.tokenizer import load_tokenizer
from pocketzo.tasks.evaluate import evaluate as evaluate_model
from pocketzo.tasks.exact_match import complete
from pocketzo.tasks.metrics import METRICS
from pocketzo.tasks.prompt import with_template
from pocketzo.tasks.registry import task_of
from pocketzo.train.evaluator import all_finite


@click.command("eval", cls=Command)
@click.argument("model", type=PATH, metavar="BUNDLE|RUN")
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Examples: .jsonl, .tsv, .csv, .npz or .txt.")
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
@average_option
@base_option
@click.option("--batch-size", type=int, default=32, help="Examples per forward pass.")
@click.option(
    "--templates",
    type=PATH,
    metavar="FILE",
    help="For the task prompt: evaluate with each line of FILE as the template, in which \\n is a line break.",
)
@click.option(
    "--generate",
    is_flag=True,
    help="For the task causal-lm: also continue each prompt of the data, greedily, and print exact-match, the share "
    "whose text equals the completion.",
)
@click.option(
    "--max-tokens",
    type=int,
    metavar="N",
    help="With --generate: the most tokens for a prompt.  [default: as many as its completion has]",
)
@activation_memory_option
@threads_option("the number of fast cores")
@column_options
@click.pass_context
def evaluate(
    context: click.Context,
    model: Path,
    data: Path,
    metrics: tuple[str, ...],
    as_json: bool,
    step: int | None,
    best: bool,
    average: float | None,
    base: Path | None,
    batch_size: int,
    templates: Path | None,
    generate: bool,
    max_tokens: int | None,
    activation_memory: int | None,
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
      pocketzo eval prompted --data dev.tsv --templates templates.txt
      pocketzo eval runs/first --data held-out.jsonl --generate
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    if max_tokens is not None and not generate:
        raise click.UsageError("--max-tokens needs --generate")
    if generate and templates is not None:
        raise click.UsageError("--generate and --templates belong to different tasks")
    if is_head_run(model):
        if step is not None or best or average is not None:
            raise click.UsageError(f"--step, --best and --average belong to a run of steps; {model} is a head")
        with tuned(model, base) as folder:
            context.invoke(evaluate, **{**context.params, "model": folder, "base": None})
        return
    run = as_run(model)
    if run is None and (step is not None or best or average is not None or base is not None):
        raise click.UsageError(f"--step, --best, --average and --base belong to a run; {model} is a bundle")
    number = None if run is None else chosen_step(run, step, best)
    bundle = Bundle.read(model) if run is None else run.base(base)
    variants = {"": bundle} if templates is None else _variants(bundle, templates)
    sets = {template: load_dataset(data, variant, columns=columns) for template, variant in variants.items()}
    if threads is not None:
        kernels.set_threads(threads)
    loaded = load(bundle, threads=threads, prepack=False if generate else "auto")  # one copy for both graphs
    if run is not None:
        run.replay_onto(loaded, step=number, average=average)
    completions = complete(loaded, sets[""], max_tokens=max_tokens) if generate else None
    names = metrics or (task_of(bundle).default_metric, "loss")
    results = {
        template: evaluate_model(
            loaded, examples, batch_size=batch_size, metrics=metrics or None, activation_memory=activation_memory
        )
        for template, examples in sets.items()
    }
    if templates is not None:
        _print_templates(results, names, as_json=as_json)
        return
    result, examples = results[""], sets[""]
    found = None if completions is None else generated_shown(completions)
    if as_json:
        values = {name: result.get(name) for name in names}
        if found is not None:
            values |= {"exact-match": found.share, "prompts": found.count}
        say(json.dumps(all_finite(values | {"count": result["count"]})))
        return
    say(
        " · ".join(f"{name} {metric_text(name, result)}" for name in names)
        + ("" if found is None else f" · {found}")
        + f" · {len(examples)} examples"
        + ("" if run is None or number is None else f" · {over_steps(run, number, average)}")
    )
    if found is not None:
        out.print(found.table())


def _variants(bundle: Bundle, path: Path) -> dict[str, Bundle]:
    """Return a bundle with each template of a file, by the template as written there."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    if not lines:
        raise DataError(f"{path}: no templates")
    tokenizer = load_tokenizer(bundle)
    variants = {}
    for number, line in enumerate(lines, 1):
        try:
            variants[line] = with_template(bundle, tokenizer, unescaped(line))
        except ValueError as error:
            raise DataError(f"{path}, template {number}: {error}") from None
    if bundle.task is not None and bundle.task.settings.get("calibration") is not None:
        note("the bundle is calibrated with its own template, which biases the others")
    return variants


def _print_templates(results: Mapping[str, Mapping[str, float]], names: Sequence[str], *, as_json: bool) -> None:
    """Print the results of each template."""
    if as_json:
        for template, result in results.items():
            values = all_finite({name: result.get(name) for name in (*names, "count")}) or {}
            say(json.dumps({"template": template, **values}, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("template", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for template, result in results.items():
        table.add_row(Text(template), *(metric_text(name, result) for name in names))
    out.print(table)
