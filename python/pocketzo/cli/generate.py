"""``pocketzo generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from pocketzo import kernels
from pocketzo.cli.command import Command
from pocketzo.cli.console import note, out, write
from pocketzo.cli.head import is_head_run
from pocketzo.cli.options import PATH, best_option, step_option, threads_option
from pocketzo.cli.runs import as_run, chosen_step
from pocketzo.data.chat import chat_text
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.generate import Generator, Stream
from pocketzo.runtime.weights import Weights
from pocketzo.train.run import Run, Unloaded

_ENDS = {"eos": "ended by the model", "length": "ended by --max-tokens", "context": "ended as the model reads no more"}


@click.command(cls=Command)
@click.argument("model", type=PATH, metavar="BUNDLE|RUN")
@click.option("--prompt", required=True, metavar="TEXT", help="The text to continue.")
@click.option("--chat", is_flag=True, help="Take the prompt for a user's message: apply the model's chat template.")
@click.option("--max-tokens", type=int, default=128, metavar="N", help="The most tokens to generate.")
@click.option(
    "--temperature", type=float, default=0.0, metavar="T", help="0: the most probable token; else divide scores, draw."
)
@click.option("--top-p", type=float, default=1.0, metavar="P", help="Draw from the most probable tokens, P together.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the draws.")
@click.option("--compare", is_flag=True, help="Print what the base and the tuned model say, side by side.")
@step_option
@best_option
@click.option(
    "--base", type=PATH, metavar="BUNDLE", help="The run's base bundle, if it was moved; for --compare, a bundle's."
)
@threads_option("the number of fast cores")
def generate(
    model: Path,
    prompt: str,
    chat: bool,
    compare: bool,
    step: int | None,
    best: bool,
    base: Path | None,
    threads: int | None,
    **settings: Any,
) -> None:
    """Continue a text by a language model: a bundle, or the weights after a run.

    \b
    Examples:
      pocketzo generate base --prompt "The capital of France is" --max-tokens 20
      pocketzo generate runs/first --prompt "Write a haiku." --chat --temperature 0.7 --compare
    """
    if is_head_run(model):
        raise BundleError(f"{model}: the run of a side head, which computes scores: it generates no text")
    run = as_run(model)
    if run is None and (step is not None or best):
        raise click.UsageError(f"--step and --best belong to a run; {model} is a bundle")
    if run is None and compare != (base is not None):
        raise click.UsageError(f"{model} is a bundle: --compare needs its --base, and --base needs --compare")
    number = None if run is None else chosen_step(run, step, best)
    if threads is not None:
        kernels.set_threads(threads)
    bundle = Bundle.read(model) if run is None else run.base(base)
    text = chat_text(bundle, [{"role": "user", "content": prompt}]) if chat else prompt
    settings["special_tokens"] = not chat
    if compare:
        _compare(bundle, run, number, base, threads, text, settings)
        return
    weights = None
    if run is not None:
        weights = _tuned(Unloaded(bundle), run, number)
    _print_pieces(Generator(bundle, weights, threads=threads).stream(text, **settings))


def _tuned(loaded: Unloaded, run: Run | None, step: int | None) -> Weights:
    """Set weights to those after a run, or to those of their bundle."""
    if run is None:
        loaded.weights.read()
    else:
        run.replay_onto(loaded, step=step)
    return loaded.weights


def _compare(
    bundle: Bundle,
    run: Run | None,
    step: int | None,
    base: Path | None,
    threads: int | None,
    text: str,
    settings: dict[str, Any],
) -> None:
    """Print two texts side by side, by one session and one copy of the weights."""
    loaded = Unloaded(bundle)
    if run is None and base is not None:
        start = Bundle.read(base)
        if [start.base_sha256, start.header_sha256, start.adapter] != [
            *(bundle.base_sha256, bundle.header_sha256, bundle.adapter)
        ]:
            raise BundleError(f"{base}: not the base of {bundle.path}, whose weights were prepared from another model")
        loaded.weights.read(start.trained_path)
    generator = Generator(bundle, loaded.weights, threads=threads)
    before = "".join(generator.stream(text, **settings))
    _tuned(loaded, run, step)
    after = "".join(generator.stream(text, **settings))
    table = Table(expand=True, show_lines=False)
    for name in ("base", "tuned" if step is None else f"after step {step}"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(before.strip("\n"), after.strip("\n"))
    out.print(table)
    if before == after:
        note("note: both say the same")


def _print_pieces(stream: Stream) -> None:
    started = time.perf_counter()
    for piece in stream:
        write(piece)
    seconds = time.perf_counter() - started
    write("\n")
    count = len(stream.tokens)
    note(
        f"{count} tokens after {len(stream.prompt)} of the prompt, in {seconds:.1f} s "
        f"({count / max(seconds, 1e-9):.1f} a second); {_ENDS[stream.stop or 'length']}"
    )
