"""``pocketzo prepare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import note, quoted, say, size_text
from pocketzo.cli.frozen import say_frozen
from pocketzo.cli.info import bundle_facts
from pocketzo.cli.options import PATH, bundle_out, force_option, regex
from pocketzo.errors import BundleError
from pocketzo.formats.bundle_writer import check_target
from pocketzo.prepare import LOSSES
from pocketzo.prepare import prepare as prepare_bundle
from pocketzo.tasks.registry import task_of


@click.command(cls=Command)
@click.argument("model", type=PATH)
@bundle_out
@click.option("--tokenizer", type=PATH, metavar="FILE", help="The model's tokenizer.json; needed to train on text.")
@click.option("--labels", metavar="A,B,...", help="Names of the classes, in the order of the logits.")
@click.option("--max-length", type=int, metavar="TOKENS", help="Truncate texts to this many tokens.")
@click.option(
    "--trainable", callback=regex, metavar="REGEX", help="Allow training only of weights whose names contain a match."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    help="Type of the weights, by default that of MODEL. float16 halves the memory. Use it on phones and boards; it is "
    "slow on x86-64.",
)
@click.option(
    "--loss",
    type=click.Choice(LOSSES),
    help="Loss to add, of the output 'logits' or the only float output. cross-entropy: one class of several; bce: yes "
    "or no, once or for each column; mse: numbers; none: for an objective of your own.  [default: the graph's own "
    "output 'loss', or cross-entropy for logits or a Softmax, or bce for a Sigmoid; one column needs this option]",
)
@click.option(
    "--probe",
    type=PATH,
    metavar="FILE",
    help="A batch for comparing MODEL with the bundle (.npz, an array for each input); by default it is made up.",
)
@force_option
def prepare(
    model: Path,
    output: Path,
    tokenizer: Path | None,
    labels: str | None,
    max_length: int | None,
    trainable: str | None,
    dtype: Literal["float32", "float16"] | None,
    loss: Literal["cross-entropy", "bce", "mse", "none"] | None,
    probe: Path | None,
    force: bool,
) -> None:
    """Convert MODEL, an ONNX file as exporters write it, to a bundle that can be trained.

    A bundle is a folder. Reading it needs numpy and onnxruntime only, as on a phone; preparing it needs the package
    onnx.

    \b
    Example:
      pocketzo prepare model.onnx -o base --tokenizer tokenizer.json \\
          --labels negative,positive --max-length 128
    """
    check_output(output, force=force)
    bundle = prepare_bundle(
        model,
        output,
        tokenizer=tokenizer,
        labels=None if labels is None else [label.strip() for label in labels.split(",")],
        max_length=max_length,
        trainable=trainable,
        dtype=dtype,
        overwrite=force,
        loss=loss,
        probe=probe,
        note=note,
    )
    facts = bundle_facts(bundle)
    say(f"{output}: {facts['parameters']:,} parameters, {facts['trainable']:,} trainable, {size_text(facts['bytes'])}")
    say_frozen(bundle)
    metrics = task_of(bundle).metrics
    if metrics:
        objective = "" if bundle.loss is not None else f" --objective {metrics[0]}"
        say(f"next: pocketzo train {quoted(output)} --data train.tsv -o runs/first{objective}")
    else:
        say("next: train by a function of your own, pz.Trainer(..., objective=function)")


def check_output(path: Path, *, force: bool = False) -> None:
    """Raise a :class:`BundleError` if the path exists, unless ``force`` is given and it is a bundle alone."""
    if os.path.lexists(path) and not force:
        raise BundleError(f"{path}: already exists; choose another folder, or --force to replace a bundle")
    check_target(path, overwrite=force)
