"""``pocketzo merge``."""

from __future__ import annotations

from pathlib import Path

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import say
from pocketzo.cli.options import PATH, base_option, best_option, bundle_out, force_option, step_option
from pocketzo.cli.prepare import check_output
from pocketzo.cli.runs import as_run, chosen_step
from pocketzo.train.tuned import merge as merge_source


def step_of(path: Path, step: int | None, best: bool) -> int | None:
    """Return the number of steps that is chosen of a run; None for a bundle."""
    run = as_run(path)
    if run is None and (step is not None or best):
        raise click.UsageError(f"--step and --best belong to a run; {path} is a bundle")
    return None if run is None else chosen_step(run, step, best)


@click.command(cls=Command)
@click.argument("run", type=PATH)
@bundle_out
@step_option
@best_option
@base_option
@force_option
def merge(run: Path, output: Path, step: int | None, best: bool, base: Path | None, force: bool) -> None:
    """Fold the LoRA or the (IA)3 of RUN, or of a tuned bundle, into the weights.

    Writes a bundle without what was added: its model.onnx and generate.onnx have the nodes of the export, its
    weights.safetensors the changed weights, and what can be trained of it is all weights, or the sets that --train
    joined with the added ones. Logits are those of the tuned model, to rounding; float16 weights are rounded to
    float16 again. The package onnx is not needed.

    Refused, by name: a quantised weight (prepare a float32 or float16 export, or keep the adapter beside the model, as
    `pocketzo replay` does), a weight that is read elsewhere, too, such as a tied embedding, prefix:N, adapter:R and
    parallel-adapter:R.

    \b
    Examples:
      pocketzo merge runs/first -o merged
      pocketzo merge tuned -o merged
    """
    check_output(output, force=force)
    merged = merge_source(run, output, step=step_of(run, step, best), base=base, overwrite=force)
    say(f"{output}: {run}, merged: {len(merged.tensors)} weights, and no tensors beside them")
