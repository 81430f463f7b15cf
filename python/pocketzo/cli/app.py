"""The command line: results go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from pocketzo._core import __version__
from pocketzo.cli.adapter import adapter
from pocketzo.cli.cache import cache
from pocketzo.cli.command import Commands, one_line
from pocketzo.cli.console import note, print_any_text
from pocketzo.cli.demo import demo
from pocketzo.cli.doctor import doctor
from pocketzo.cli.evaluate import evaluate
from pocketzo.cli.export import export
from pocketzo.cli.federate import federate
from pocketzo.cli.generate import generate
from pocketzo.cli.info import info
from pocketzo.cli.merge import merge
from pocketzo.cli.pipeline import pipeline
from pocketzo.cli.plan import plan
from pocketzo.cli.prepare import prepare
from pocketzo.cli.replay import replay
from pocketzo.cli.train import train
from pocketzo.formats.files import named


def main() -> None:
    """Run the command line and exit: 0, 1 for an error in the user's input, 2 for wrong usage, 130 after Ctrl-C."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        print_any_text(stream)
    try:
        with named("standard output"):  # of --help and --version; a command reports its own errors
            cli(prog_name="pocketzo")
    except OSError as error:
        sys.exit(f"pocketzo: error: {one_line(error)}")
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Drop what standard output does not take: Python would try again at its end, and exit with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"note: {message}")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune an ONNX language model in place, in the memory that inference takes.

    A typical session:

    \b
      pocketzo prepare model.onnx -o base --tokenizer tokenizer.json --labels negative,positive
      pocketzo train base --data train.tsv --eval dev.tsv -o runs/first --steps 1000
      pocketzo eval runs/first --data dev.tsv
      pocketzo replay runs/first -o tuned

    Exit codes: 0; 1 for an error in the input (reported in one line); 2 for wrong usage; 130 after Ctrl-C.
    """


commands = (
    *(export, prepare, train, evaluate, generate, replay, merge, adapter, federate, pipeline, plan),
    *(info, cache, doctor, demo),
)
for command in commands:
    cli.add_command(command)
