"""The linear probe and the side head beside a run of `pocketzo train`: measured before it, compared after it."""

from __future__ import annotations

from typing import Final, Literal

from pocketzo import kernels
from pocketzo.arguments import check_integer
from pocketzo.cli.console import duration, err, metric_text, quoted, say
from pocketzo.data.dataset import Dataset
from pocketzo.errors import BundleError, DataError, NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.machine.cores import fast
from pocketzo.tasks.metrics import metric_named
from pocketzo.tasks.prompt import Prompt
from pocketzo.tasks.registry import task_of
from pocketzo.train.baselines import MOST, Heads, Measured, cost, measure_heads, why_none
from pocketzo.train.run import METRICS as METRICS_FILE
from pocketzo.train.run import Run

Choice = Literal["auto", "on", "off"]

_NAMES: Final = "linear probe and side head"
_TASKS: Final = {"classes": "classification", "label sets": "multi-label", "numbers": "regression"}


def measure(
    choice: Choice,
    bundle: Bundle,
    train: Dataset,
    held_out: Dataset | None,
    *,
    forwards: float,
    metric: str | None,
    seed: int,
    threads: int | None,
    max_memory: int | None,
) -> tuple[Heads | None, str | None]:
    """Measure both before a run, and return them and a line that says so; else None, and why not.

    Parameters
    ----------
    choice : {"auto", "on", "off"}
        ``--baselines``.
    bundle : Bundle
    train, held_out : Dataset
    forwards : float
        Forward passes of an example that the run will take, in units of a whole one.
    metric : str or None
        That of the run, if it was given.
    seed : int
    threads, max_memory : int or None
        As for loading the bundle.
    """
    if choice == "off":
        return None, None
    check_integer("seed", seed, 0, 2**64 - 1)
    reason = why_none(bundle, train)
    needed = cost(train, held_out)
    if reason is None and choice == "auto":
        again = "; --baselines on measures them all the same"
        if needed > MOST * forwards:
            reason = (
                f"they take {needed:,} forward passes of an example, and a tenth of those of the run are "
                f"{int(MOST * forwards):,}{again}"
            )
        elif max_memory is not None:
            reason = f"--max-memory does not watch them{again}"
    if reason is None:
        try:
            with err.status(f"measuring {_NAMES}") as status:

                def told(done: int, count: int, left: float) -> None:
                    status.update(f"measuring {_NAMES}: {done:,} of {count:,} examples, {duration(left)} left")

                found = measure_heads(
                    bundle,
                    train,
                    held_out,
                    metric=metric,
                    seed=seed,
                    threads=threads or min(fast(), kernels.threads()),
                    told=told,
                )
        except (BundleError, DataError, NotPrepackableError) as error:
            reason = str(error)
        else:
            name = metric or task_of(bundle).metric().name
            share = found.forwards / max(forwards, 1)
            text = (
                f"{_NAMES} of the model before training, by {found.forwards:,} forward passes of an example "
                f"({share:.2%} of those of the run) and {found.seconds:.0f} s in all: {name} "
                f"{metric_text(name, found.probe.validated)} and {metric_text(name, found.head.validated)} in "
                "cross-validation"
            )
            return found, text
    return None, f"no {_NAMES} beside the run: {reason}"


def heads_of(run: Run) -> Heads | None:
    """Return what a run keeps of them."""
    return Heads.of_run(run.metrics(), run.path / METRICS_FILE)


def say_heads(found: Heads, run: Run, bundle: Bundle) -> None:
    """Print both, and whether the side head would have been better than a run, with the commands that make it."""
    metric = metric_named(run.recipe.loop.metric)
    name = metric.name

    def of(title: str, one: Measured, more: str) -> str:
        value = metric_text(name, one.validated)
        return f"{title}, {one.reads}{more}: {name} {value} in cross-validation on {found.examples:,} training examples"

    say(of("linear probe", found.probe, ""))
    say(of("side head", found.head, ", without attention pooling"))
    best = run.best_step
    if best is None or found.head.evaluated is None:
        say("to compare the run with them, give --eval")
        return
    reached = run.evaluations()[best]
    values = f"{name} {metric_text(name, found.head.evaluated)}, and the run {metric_text(name, reached)} at its best"
    if metric.score(found.head.evaluated) <= metric.score(reached):
        say(f"on the evaluation data the side head has {values}")
        return
    say(f"the side head would have been better: on the evaluation data it has {values}. To make it:")
    for command in _commands(run, bundle):
        say(f"  {command}")


def _commands(run: Run, bundle: Bundle) -> list[str]:
    """Return the commands that prepare a bundle for its side head, which takes the package onnx, and fit it."""
    task = task_of(bundle)
    base, out = (path.with_name(f"{path.name}-head") for path in (bundle.path.absolute(), run.path))
    words = ["pocketzo prepare", quoted(bundle.model_path), "-o", quoted(base), "--task"]
    spec = bundle.task
    if spec is not None and isinstance(task, Prompt) and task.mask_token is None:
        words += ["prompt", "--template", quoted(spec.settings["template"])]
    else:
        words.append(_TASKS[task.predicts])
    if bundle.labels is not None:
        words += ["--labels", quoted(",".join(bundle.labels))]
    if bundle.max_length is not None:
        words += ["--max-length", str(bundle.max_length)]
    source = run.recipe.data.source
    fit = ["pocketzo train", quoted(base), "--data", quoted(source.train or "FILE")]
    fit += ["--eval", quoted(source.eval or "FILE"), "-o", quoted(out)]
    return [" ".join(words), " ".join(fit)]


def columns_of(found: Heads | None) -> dict[str, dict[str, float | None]]:
    """Return the columns of a table of evaluations."""
    both = {} if found is None else {"linear probe": found.probe.evaluated, "side head": found.head.evaluated}
    return {name: values for name, values in both.items() if values is not None}
