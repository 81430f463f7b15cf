"""``pocketzo replay``."""

from __future__ import annotations

from pathlib import Path

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import note, say
from pocketzo.cli.head import is_head_run, write_tuned
from pocketzo.cli.options import PATH, average_option, base_option, best_option, bundle_out, force_option, step_option
from pocketzo.cli.prepare import check_output
from pocketzo.cli.runs import chosen_step, over_steps
from pocketzo.train.run import Run
from pocketzo.train.verdict import worse_than_before


@click.command(cls=Command)
@click.argument("run", type=PATH)
@bundle_out
@step_option
@best_option
@average_option
@base_option
@force_option
def replay(
    run: Path, output: Path, step: int | None, best: bool, average: float | None, base: Path | None, force: bool
) -> None:
    """Rebuild the tuned bundle of RUN from its base bundle and its journal, bit for bit.

    \b
    Example:
      pocketzo replay runs/first -o tuned --best
    """
    check_output(output, force=force)
    if is_head_run(run):
        if step is not None or best or average is not None:
            raise click.UsageError(f"--step, --best and --average belong to a run of steps; {run} is a head")
        write_tuned(run, output, bundle=base, overwrite=force)
        say(f"{output}: the bundle with the head of {run}")
        return
    past = Run(run)
    if past.notice:
        note(f"note: {past.notice}")
    number = chosen_step(past, step, best)
    past.replay(output, step=number, average=average, bundle=base, overwrite=force)
    if worse := worse_than_before(past, number):
        note(f"note: {worse}. See --best and --step")
    say(f"{output}: {run} {over_steps(past, number, average)} of {past.recipe.loop.steps}")
