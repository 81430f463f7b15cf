"""``pocketzo train``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click  # noqa: TID253
from click.core import ParameterSource  # noqa: TID253

from pocketzo import kernels
from pocketzo.cli.command import Command
from pocketzo.cli.console import err, evaluation_table, fact, for_json, note, out, quoted, say, size_text
from pocketzo.cli.options import PATH, column_options, groups_option, memory_size, regex, threads_option
from pocketzo.cli.progress import fit_shown
from pocketzo.data.columns import Columns
from pocketzo.data.load import load_dataset
from pocketzo.data.order import Order
from pocketzo.errors import JournalError, MemoryLimitError, MissingExtraError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.cores import thread_counts
from pocketzo.optim.fzoo import FZOO
from pocketzo.optim.groups import Group
from pocketzo.optim.mezo import MeZO
from pocketzo.optim.optimizer import Optimizer
from pocketzo.optim.schedule import Schedule
from pocketzo.runtime.load import load
from pocketzo.tasks.evaluate import evaluate
from pocketzo.train.plot import plot_run
from pocketzo.train.run import Run, recorded_packing
from pocketzo.train.trainer import Trainer

_METHODS: Mapping[str, type[Optimizer]] = {"mezo": MeZO, "fzoo": FZOO}
_LR = {"fzoo": 5e-4, "mezo": 1e-5}


@click.command(cls=Command)
@click.argument("bundle", type=PATH, required=False)
@click.option("--resume", type=PATH, metavar="RUN", help="Go on with a run. All settings come from its record.")
@click.option("--data", type=PATH, metavar="FILE", help="Examples to learn: .jsonl, .tsv, .csv or .npz.")
@click.option("--eval", "eval_data", type=PATH, metavar="FILE", help="Held-out examples to evaluate.")
@click.option("-o", "--output", type=PATH, metavar="RUN", help="Folder for the run; must be new, or hold this run.")
@click.option("--steps", type=int, default=1000, help="Length of the run in steps.")
@click.option(
    "--method",
    type=click.Choice(sorted(_METHODS)),
    default="fzoo",
    help="fzoo: 1 + --directions forwards a step, one direction each; mezo: 2 forwards a step, one direction.",
)
@click.option("--lr", type=float, help="Learning rate.  [default: 5e-4 for fzoo, 1e-5 for mezo]")
@click.option("--eps", type=float, default=1e-3, help="How far weights are shifted to see the loss change.")
@click.option("--batch-size", type=int, default=32, help="Examples a step.")
@click.option("--seed", type=int, default=0, help="Fixes every direction and the order of the data.")
@click.option("--weight-decay", type=float, default=0.0, help="lr times this share of each matrix is taken off a step.")
@click.option(
    "--trainable",
    callback=regex,
    metavar="REGEX",
    help="Train only weights whose names it is found in.  [default: all]",
)
@click.option(
    "--group",
    "groups",
    callback=groups_option,
    multiple=True,
    metavar="PATTERN:lr=X,eps=Y",
    help="Factors of --lr and --eps for weights whose names match; repeatable, the first that matches counts. "
    "A new head wants more than a pretrained body: --group classifier:lr=10,eps=10",
)
@click.option(
    "--direction",
    type=click.Choice(["gaussian", "rademacher"]),
    help="How directions are drawn.  [default: rademacher for fzoo, gaussian for mezo]",
)
@click.option("--directions", type=int, default=8, help="Directions a step (fzoo).")
@click.option("--schedule", type=click.Choice(["constant", "linear", "cosine"]), default="constant", help="Of the lr.")
@click.option("--warmup", type=int, default=0, help="Steps over which the lr first rises.")
@click.option("--eval-every", type=int, metavar="STEPS", help="Evaluate so often.  [default: 10 times a run]")
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "loss"]),
    help="What the best is judged by.  [default: accuracy; loss for a graph without logits]",
)
@click.option("--patience", type=int, metavar="N", help="Stop after N evaluations in a row without a better one.")
@click.option(
    "--snapshot-every", type=int, metavar="STEPS", help="Save the weights so often: a resume is quicker then."
)
@click.option(
    "--group-by-length", is_flag=True, help="Batches of texts of similar length: less padding to compute with."
)
@click.option(
    "--packed/--unpacked",
    default=None,
    help="Whether weights lie as the runtime multiplies fastest.  [default: packed where it can be]",
)
@click.option(
    "--max-memory",
    callback=memory_size,
    metavar="SIZE",
    help="Stop, and undo the step under way, before this process has so much memory resident, such as 1.5G. There is "
    "no loss.png then, as drawing it takes 50 MB.",
)
@threads_option("all cores; for forwards, what is quickest in a few with 1, 2, the fast cores and all")
@column_options
@click.pass_context
def train(
    context: click.Context,
    bundle: Path | None,
    resume: Path | None,
    data: Path | None,
    eval_data: Path | None,
    output: Path | None,
    steps: int,
    method: str,
    lr: float | None,
    eps: float,
    batch_size: int,
    seed: int,
    weight_decay: float,
    trainable: str | None,
    groups: tuple[Group, ...],
    direction: str | None,
    directions: int,
    schedule: str,
    warmup: int,
    eval_every: int | None,
    metric: str | None,
    patience: int | None,
    snapshot_every: int | None,
    group_by_length: bool,
    packed: bool | None,
    max_memory: int | None,
    threads: int | None,
    columns: Columns,
) -> None:
    """Train BUNDLE on examples, and keep the record in a run folder.

    The weights are moved in place, by forward passes alone. RUN gets journal.pzj, from which `pocketzo replay` rebuilds
    the tuned weights bit for bit, metrics.jsonl, and, with matplotlib, loss.png.

    Ctrl-C (or SIGTERM) ends the run after the step that is under way, with exit code 130 (143); the same command, or
    --resume, goes on from there, and also after a crash or a kill, to the very weights that the uninterrupted run would
    have reached (a --max-memory too small for packed weights changes roundings, and says so). With --resume only
    BUNDLE, --data and --eval may be given, if these files were moved, and --max-memory. A second Ctrl-C ends at once.

    \b
    Examples:
      pocketzo train base --data train.tsv --eval dev.tsv -o runs/first \\
          --steps 400 --group classifier:lr=10,eps=10
      pocketzo train --resume runs/first
    """  # noqa: D301
    if resume is not None:
        allowed = {"resume", "bundle", "data", "eval_data", "max_memory"}
        for option in context.command.params:
            given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
            if given and option.expose_value and option.name not in allowed:
                raise click.UsageError(f"{option.opts[-1]} cannot be changed by --resume: it is in the run's record")
        _train(*_resumed(resume, bundle, data, eval_data, max_memory))
        return
    if bundle is None or data is None or output is None:
        missing = "BUNDLE" if bundle is None else "--data" if data is None else "-o"
        raise click.UsageError(f"{missing} is missing: a new run needs BUNDLE, --data and -o; an old one --resume")
    if method != "fzoo" and context.get_parameter_source("directions") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--directions belongs to --method fzoo")
    if patience is not None and eval_data is None:
        raise click.UsageError("--patience needs --eval")
    past = Run(output) if (output / "journal.pzj").exists() else None
    if past is None and os.path.lexists(output) and not _is_empty_folder(output):
        raise JournalError(f"{output}: already exists and is no empty folder: choose another place for the run")
    read = Bundle.read(bundle)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    examples = load_dataset(data, read, columns=columns)
    held_out = None if eval_data is None else load_dataset(eval_data, read, columns=columns)
    others: list[str] = []
    if past is not None:  # these two are not to be compared but taken over, where they are not given
        recorded = past.header["trainer"]
        pairs = ("threads", recorded["threads"], threads), ("packed", bool(recorded_packing(recorded)), packed)
        others = [f"{name} is {there} there and {now} here" for name, there, now in pairs if now not in (None, there)]
        threads = _recorded_threads(recorded)
        packed = packed or (None if recorded_packing(recorded) else False)
    elif threads is not None:
        kernels.set_threads(threads)
    # Only what is to be timed needs a batch.
    first = None if threads else examples.batch(Order(seed=seed, size=len(examples), batch_size=batch_size)(0))
    with err.status("loading" if threads else f"loading, timing {' or '.join(map(str, thread_counts()))} threads"):
        model = load(
            read, threads=threads, batch=first, packed="auto" if packed is None else packed, max_memory=max_memory
        )
    settings: dict[str, Any] = {"directions": directions} if method == "fzoo" else {}
    optimizer = _METHODS[method](
        model,
        lr=_LR[method] if lr is None else lr,
        eps=eps,
        seed=seed,
        weight_decay=weight_decay,
        trainable=trainable,
        groups=groups,
        direction=direction,  # type: ignore[arg-type]  # click has checked it
        schedule=Schedule(schedule, steps, warmup),  # type: ignore[arg-type]
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
        patience=patience,
        snapshot_every=snapshot_every,
        group_by_length=group_by_length,
    )
    if past is not None:
        others += trainer.differences(past)
        if others:
            raise JournalError(
                f"{output}: holds a run with other settings: {'; '.join(others)}. Give those to go on with it, or "
                f"choose another place"
            )
        _train(_noted(Trainer.resume(output, examples, eval=held_out, model=model)), output)
        return
    before = None if held_out is None else for_json(evaluate(model, held_out, batch_size=batch_size))
    source = {"train": data.resolve(), "eval": None if eval_data is None else eval_data.resolve()}
    trainer.source = {name: None if path is None else os.fspath(path) for name, path in source.items()}
    trainer.source |= {"columns": asdict(columns), "before": before}
    timed = fact("forward_seconds", model.forward_seconds)
    note(
        f"{len(examples)} examples, {optimizer.parameters:,} parameters to train, {kernels.isa()} kernels, "
        f"{'packed' if model.packed else 'unpacked'} weights, {model.threads} thread{'s' if model.threads > 1 else ''}"
        + (f" ({timed} a forward)" if timed else "")
    )
    _train(trainer, output)


def _recorded_threads(recorded: Mapping[str, Any]) -> int:
    """Return the threads of a run's forwards, and have the kernels use as many where the user had chosen them."""
    threads = int(recorded["threads"])
    if recorded.get("forward_seconds") is None:
        kernels.set_threads(threads)
    return threads


def _is_empty_folder(path: Path) -> bool:
    """Whether nothing is in it but a file that a killed process had begun to write."""
    return path.is_dir() and all(re.fullmatch(r"\..*\.part", entry.name) for entry in path.iterdir())


def _resumed(
    run: Path, bundle: Path | None, data: Path | None, eval_data: Path | None, max_memory: int | None
) -> tuple[Trainer, Path]:
    past = Run(run)
    recorded = past.header["data"]["source"]
    if "train" not in recorded and data is None:
        raise JournalError(f"{run}: its record does not say where the data is: name it with --data")
    columns = Columns(**recorded.get("columns", {}))
    read = Bundle.read(past.header["model"]["bundle"] if bundle is None else bundle)
    examples = load_dataset(recorded["train"] if data is None else data, read, columns=columns)
    held_out_path = recorded.get("eval") if eval_data is None else eval_data
    held_out = None if held_out_path is None else load_dataset(held_out_path, read, columns=columns)
    threads = _recorded_threads(past.header["trainer"])
    packed = recorded_packing(past.header["trainer"])
    model = None
    if bundle is not None or max_memory is not None:
        model = load(read, threads=threads, packed=packed, max_memory=max_memory)
    return _noted(Trainer.resume(run, examples, eval=held_out, model=model)), run


def _noted(trainer: Trainer) -> Trainer:
    """Say where a run that is taken up stands."""
    step = trainer.optimizer.step_number
    if step >= trainer.steps:
        note(f"{trainer.run}: all {trainer.steps} steps are done")
    else:
        note(f"{trainer.run}: going on after step {step} of {trainer.steps}")
    return trainer


def _train(trainer: Trainer, run: Path) -> None:
    again = f"pocketzo train --resume {quoted(run)}"
    try:
        stopped_by = fit_shown(trainer, again)
    except MemoryLimitError as error:
        done = Run(run).steps
        if not done:  # a record of nothing would only be in the way of other settings
            for name in "journal.pzj", "metrics.jsonl":
                (run / name).unlink(missing_ok=True)
            raise MemoryLimitError(f"{error}. Stopped in the first step, so that there is no record") from None
        raise MemoryLimitError(
            f"{error}. Stopped after step {done} of {trainer.steps}; to go on: {again} --max-memory SIZE"
        ) from None
    done = trainer.optimizer.step_number
    past = Run(run)
    if trainer.model.max_memory is None:  # matplotlib takes some 50 MB
        plot_or_note(run)
    _print_summary(past)
    if stopped_by is not None and done < trainer.steps:
        say(f"stopped after step {done} of {trainer.steps}; to go on: {again}")
        sys.exit(128 + stopped_by)
    if done < trainer.steps:
        say(f"ended after step {done} of {trainer.steps}: {trainer.patience} evaluations without a better one")
    data = past.header["data"]["source"].get("eval") or "FILE"
    best = "" if past.best_step == past.steps else " --best"
    say(f"evaluate:  pocketzo eval {quoted(run)} --data {quoted(data)}{best}")
    say(f"get the tuned bundle:  pocketzo replay {quoted(run)} -o tuned{best}")


def plot_or_note(run: Path) -> None:
    """Draw ``loss.png``, or note that matplotlib is missing."""
    try:
        plot_run(run)
    except MissingExtraError:
        note("note: no loss.png without matplotlib: pip install 'pocketzo[plot]'")


def _print_summary(past: Run) -> None:
    evaluations = {line["step"]: line["eval"] for line in past.metrics() if "eval" in line}
    before = past.header["data"]["source"].get("before")
    if evaluations:
        last, best = max(evaluations), past.best_step
        columns = {"before": before} if before else {}
        columns |= {f"after step {last}": evaluations[last], f"best, step {best}": evaluations[best]}
        out.print(evaluation_table(columns))
    journal = past.path / "journal.pzj"
    say(f"{past.path}: {past.steps} steps, journal of {size_text(journal.stat().st_size)}")
