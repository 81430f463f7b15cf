"""``pocketzo plan``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import quoted, say, size_text
from pocketzo.cli.options import PATH, batch_size_option, json_option
from pocketzo.formats.bundle import Bundle
from pocketzo.optim.methods import METHODS
from pocketzo.pipeline.layout import Batch, Layout, best_layout, layouts, passes_of, read_devices


@click.command(cls=Command)
@click.argument("bundle", type=PATH)
@click.option(
    "--devices", type=PATH, required=True, metavar="FILE", help="The devices, .toml or .json; see docs/federated.md."
)
@batch_size_option()
@click.option("--tokens", type=int, default=64, help="Tokens of the longest example of a batch.")
@click.option("--positions", type=int, metavar="N", help="Of a batch, those whose logits count.  [default: a row each]")
@click.option("--method", type=click.Choice(list(METHODS)), default="fzoo", help="Method, as for train.")
@click.option("--queries", type=int, metavar="N", help="Directions per step.  [default: that of the method]")
@json_option
def plan(
    bundle: Path,
    devices: Path,
    batch_size: int,
    tokens: int,
    positions: int | None,
    method: str,
    queries: int | None,
    as_json: bool,
) -> None:
    """Say which layout fits on some devices, what memory it takes on each, and how long a step takes.

    Layouts are one device, data parallel (each device has the whole model and a part of the batch), and a pipeline
    (each device has a part of the model). Nothing is trained. Memory and time are estimates; the first layout is the
    quickest that fits. Exit code 1 if the model fits nowhere.

    \b
    Example, with devices.toml:
      [[device]]
      name = "board"
      doctor = "board.json"    # what `pocketzo doctor --json` printed there
      [[device]]
      name = "laptop"
      doctor = "laptop.json"
      memory = "2G"            # instead of what was available

    \b
      pocketzo plan base --devices devices.toml
    """
    found_devices, network = read_devices(devices)
    batch = Batch(batch_size, tokens, batch_size if positions is None else positions, passes_of(method, queries))
    found = layouts(Bundle.read(bundle), found_devices, batch, network)
    if as_json:
        say(json.dumps([layout.described() for layout in found]))
        best_layout(found)
        return
    best = best_layout(found)
    for layout in found:
        say(layout_text(layout, batch, bundle, chosen=layout is best))


def layout_text(layout: Layout, batch: Batch, bundle: Path, *, chosen: bool) -> str:
    """Return a layout as lines, with the command that splits the bundle so."""
    fate = "the quickest that fits" if chosen else "fits" if layout.fits else "does not fit"
    lines = [f"{layout.kind} ({fate}): about {layout.seconds:.3g} s a step of {batch.passes} passes"]
    for number, share in enumerate(layout.shares):
        what = f"stage {number}" if layout.kind == "pipeline" else f"{share.rows} of {batch.rows} examples"
        lines.append(
            f"  {share.device.name}: {what}, {size_text(share.resident)} of weights in memory, "
            f"{size_text(share.memory)} of {size_text(share.device.memory)} memory"
            + (f" ({size_text(share.engine)} of them Ray's)" if share.engine else "")
            + f", {share.seconds:.3g} s a pass"
        )
        if number < len(layout.cuts):
            lines.append(f"    cut behind {', '.join(layout.cuts[number])}")
    if layout.parts:
        least = size_text(layout.ending)
        lines.append(f"  any last stage has {least} of weights in memory or more: the output projection is not cut")
        parts = ",".join(f"{part:g}" for part in layout.parts)
        split = f"{quoted(bundle)} -o stages --stages {len(layout.parts)} --shares {parts}"
        lines.append(f"  pocketzo pipeline split {split}")
    return "\n".join(lines)
