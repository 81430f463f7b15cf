"""``pocketzo train`` of a side head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pocketzo._core import threads as kernel_threads
from pocketzo.cli.console import duration, err, evaluation_table, note, out, quoted, say, size_text
from pocketzo.cli.runs import check_new
from pocketzo.data.columns import COLUMN_ROLES, Columns
from pocketzo.data.load import load_dataset
from pocketzo.data.names import class_names
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.files import make_folder
from pocketzo.formats.staging import scratch_folder
from pocketzo.machine.cores import fast
from pocketzo.tasks.classification import Classification
from pocketzo.tasks.registry import task_of
from pocketzo.train.head.choose import standard_error
from pocketzo.train.head.evaluate import evaluate_heads
from pocketzo.train.head.fit import Fit, Fitter
from pocketzo.train.head.run import PARAMETERS, RECORD, HeadRun, with_labels

_SHOWN = 3
_OPTIONS = {"bundle", "data", "eval_data", "output", "seed", "threads"}


def refuse_options_of_steps(context: click.Context) -> None:
    """Raise an error for an option of `pocketzo train` that a head has no use for."""
    columns = {"delimiter", *(f"{role}_column" for role in COLUMN_ROLES)}
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE
        if given and option.name not in _OPTIONS | columns:
            raise click.UsageError(
                f"{option.opts[-1]} is for training in steps, and a side head is fitted at once: leave it out, or name "
                "a --method"
            )


def train_head(
    base: Bundle,
    data: Path,
    eval_data: Path | None,
    output: Path,
    *,
    seed: int,
    threads: int | None,
    columns: Columns,
) -> None:
    """Fit the side head of a bundle to examples, print what was chosen and what it achieves, and write the run."""
    check_new(output)
    threads = threads or min(fast(), kernel_threads())
    labels = base.labels
    if labels is None and isinstance(task_of(base), Classification):
        labels = class_names(data, base, columns)
        note(f"{len(labels)} classes in {data}: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}")
    bundle = base if labels is None else with_labels(base, labels)
    examples = load_dataset(data, bundle, columns=columns)
    held_out = None if eval_data is None else load_dataset(eval_data, bundle, columns=columns)
    make_folder(output.resolve().parent)
    with scratch_folder(output.resolve().parent) as scratch, err.status("loading") as status:

        def told(stage: str, done: int, count: int, left: float | None) -> None:
            rest = "" if left is None else f", {duration(left)} left"
            status.update(f"{stage}: {done:,} of {count:,}{rest}")

        fit = Fitter(bundle, examples, seed=seed, threads=threads, folder=scratch, told=told).fit()
        evaluations = []
        if held_out is not None:
            evaluations = evaluate_heads(
                bundle, [fit.head, fit.probe], held_out, threads=threads, told=lambda *done: told("evaluation", *done)
            )
    _say_choice(bundle, fit)
    if evaluations:
        out.print(evaluation_table({"linear probe": evaluations[1], "side head": evaluations[0]}))
    results = _results(fit, seed, examples.fingerprint)
    if evaluations:
        results |= {"eval": evaluations[0], "probe_eval": evaluations[1]}
    HeadRun.of(base, fit.head, labels, results).write(output, fit.head)
    size = sum((output / name).stat().st_size for name in (RECORD, PARAMETERS))
    say(f"{output}: a head of {size_text(size)}")
    say(f"get the tuned bundle:  pocketzo replay {quoted(output)} -o tuned")


def _say_choice(bundle: Bundle, fit: Fit) -> None:
    best = fit.trials[0]
    assert bundle.side is not None
    say(f"chosen by the loss of held-out fifths of the training data, of {len(fit.trials)} choices of layers:")
    for trial in fit.trials[:_SHOWN]:
        error = standard_error(trial.losses, best.losses)
        more = "" if trial is best else f", {trial.loss - best.loss:.4f} more, standard error {error:.4f}"
        say(f"  {trial.features.text}, penalty {trial.l2:g}: loss {trial.loss:.4f}{more}")
    probe = fit.probe_trial
    say(f"  linear probe ({probe.features.text}, penalty {probe.l2:g}): loss {probe.loss:.4f}")
    if fit.attention is not None:
        error = standard_error(fit.attention, best.losses)
        kept = "kept" if fit.pays else "left out"
        loss = fit.attention.mean()
        say(f"  attention pooling: loss {loss:.4f}, standard error of the difference {error:.4f}: {kept}")
    say(f"the tuned model runs {fit.head.layers[-1]} of {bundle.side.layers} layers")


def _results(fit: Fit, seed: int, fingerprint: str) -> dict[str, Any]:
    trials = [
        {"layers": one.features.layers, "pooling": one.features.pooling, "l2": one.l2, "loss": one.loss}
        for one in fit.trials
    ]
    attention = None if fit.attention is None else {"loss": float(fit.attention.mean()), "kept": fit.pays}
    return {"seed": seed, "data": fingerprint, "trials": trials, "attention": attention}


def is_head_run(path: Path) -> bool:
    """Return whether there is the run of a head at a path."""
    return (path / RECORD).is_file()


def write_tuned(run: Path, out_path: Path, *, bundle: Path | None, overwrite: bool) -> None:
    """Write the bundle of a head's run."""
    described, head = HeadRun.read(run)
    described.write_bundle(head, out_path, bundle=bundle, overwrite=overwrite)


@contextmanager
def tuned(run: Path, bundle: Path | None) -> Iterator[Path]:
    """Write the bundle of a head's run to a temporary folder."""
    with scratch_folder() as folder:
        write_tuned(run, folder / "tuned", bundle=bundle, overwrite=False)
        yield folder / "tuned"
