"""``pocketzo train`` of a side head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.core import ParameterSource

from pocketzo.cli.console import duration, err, evaluation_table, note, out, quoted, say, size_text
from pocketzo.data.columns import COLUMN_ROLES, Columns
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.staging import scratch_folder
from pocketzo.train.head.choose import standard_error
from pocketzo.train.head.fit import Fit
from pocketzo.train.head.run import KEPT, PARAMETERS, RECORD, HeadRun
from pocketzo.train.head.train import train_head
from pocketzo.train.head.zeroth import STEPS

_SHOWN = 3
_OPTIONS = {"bundle", "data", "eval_data", "output", "objective", "seed", "threads", "after", "keep"}


def refuse_options_of_steps(context: click.Context) -> None:
    """Raise an error for an option of `pocketzo train` that a head has no use for."""
    columns = {"delimiter", *(f"{role}_column" for role in COLUMN_ROLES)}
    by_metric = {"steps"} if context.params["objective"] != "loss" else set()
    for option in context.command.params:
        if is_given(context, option.name or "") and option.name not in _OPTIONS | columns | by_metric:
            raise click.UsageError(
                f"{option.opts[-1]} is for training in steps, and a side head is fitted at once: leave it out, or name "
                "a --method"
            )


def is_given(context: click.Context, name: str) -> bool:
    """Return whether an option is on the command line."""
    return context.get_parameter_source(name) == ParameterSource.COMMANDLINE


def base_of(run: Path) -> Path:
    """Return the bundle that the head of a run belongs to."""
    described, _ = HeadRun.read(run)
    return described.base().path


def train_and_say(
    base: Bundle,
    data: Path,
    eval_data: Path | None,
    output: Path,
    *,
    objective: str,
    steps: int | None,
    seed: int,
    threads: int | None,
    columns: Columns,
    keep: bool,
    after: Path | None,
) -> None:
    """Fit the side head of a bundle to examples, print what was chosen and what it achieves, and write the run."""
    if after is not None and not (after / KEPT).is_file():
        note(f"{after}: has kept no states (--keep): its data is read again, and costs its forward passes")
    with err.status("loading") as status:

        def told(stage: str, done: int, count: int, left: float | None) -> None:
            rest = "" if left is None else f", {duration(left)} left"
            status.update(f"{stage}: {done:,} of {count:,}{rest}")

        found = train_head(
            base,
            data,
            output,
            eval=eval_data,
            objective=objective,
            steps=STEPS if steps is None else steps,
            seed=seed,
            threads=threads,
            columns=columns,
            keep=keep,
            after=after,
            told=told,
        )
    labels = found.bundle.labels
    if base.labels is None and labels is not None:
        note(f"{len(labels)} classes in {data}: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}")
    _say_choice(found.bundle, found.fit)
    if found.evaluation is not None and found.probe is not None:
        out.print(evaluation_table({"linear probe": found.probe, "side head": found.evaluation}))
    size = sum((output / name).stat().st_size for name in (RECORD, PARAMETERS))
    say(f"{output}: a head of {size_text(size)}")
    if keep:
        size = (output / KEPT).stat().st_size
        say(f"{output / KEPT}: labels and states of the examples, {size_text(size)}: personal data, of mode 0600")
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
    if (by := fit.by_metric) is not None:
        name, text = by.metric.name, by.metric.format
        say(
            f"  zeroth order, {by.evaluations:,} evaluations of the head: {name} of held-out fifths from "
            f"{text(by.before)} to {text(by.after)}: {'kept' if by.pays else 'left out'}"
        )
    say(f"the tuned model runs {fit.head.layers[-1]} of {bundle.side.layers} layers")


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
