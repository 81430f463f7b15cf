"""``pocketzo prepare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import fact, note, quoted, say, size_text
from pocketzo.cli.frozen import say_frozen
from pocketzo.cli.info import bundle_facts
from pocketzo.cli.options import PATH, bundle_out, escapes, force_option, names
from pocketzo.errors import BundleError
from pocketzo.formats.bundle_writer import check_target
from pocketzo.prepare import LOSSES, PER, TASKS
from pocketzo.prepare import prepare as prepare_bundle
from pocketzo.prepare.options import HEAD_ONLY
from pocketzo.tasks.registry import task_of
from pocketzo.trainable.spec import parse


def _sets(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Check that an option names sets."""
    try:
        parse(value or "all")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


@click.command(cls=Command)
@click.argument("model", type=PATH)
@bundle_out
@click.option(
    "--tokenizer",
    type=PATH,
    metavar="FILE",
    help="The model's tokenizer.json; needed to train on text.  [default: with --task, that beside MODEL]",
)
@click.option("--labels", callback=names, metavar="A,B,...", help="Names of the classes, in the order of the logits.")
@click.option("--max-length", type=int, metavar="TOKENS", help="Truncate texts to this many tokens.")
@click.option(
    "--train",
    callback=_sets,
    metavar="SET",
    help="What is trained; the rest is frozen. Sets are joined by +. Of the weights: all, head (what follows the last "
    "layer), bias, norm, last:K (the last K layers), or a REGEX of names. Added, as small float32 tensors: lora, or as "
    "lora:r=8,alpha=16,targets=REGEX,layers=20-,train=B, which `pocketzo train --init` may begin from an adapter of "
    "PEFT; adapter:R, a bottleneck of R units a layer; ia3, factors; prefix:N, keys and values before those of a "
    "decoder's text. A + inside a REGEX needs brackets or a backslash. Alone: side-head, which reads the outputs of "
    "the last layers. `pocketzo train` fits it in seconds, and the tuned model ends behind the last layer it reads. Or "
    "parallel-adapter:R, a network beside the last layers, of a block of R units a layer; its steps need no forward "
    "pass of the model once --cache has its states.  "
    "[default: side-head for --task classification, multi-label and regression, and for prompt without --label-words; "
    "else all]",
)
@click.option(
    "--share-base",
    type=PATH,
    metavar="BUNDLE",
    help="For a set that is added: take the weights of another bundle of MODEL, by a hard link, so that both take the "
    "storage of one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    help="Type of the weights, by default that of MODEL. float16 halves the memory. Use it on phones and boards; it is "
    "slow on x86-64.",
)
@click.option(
    "--base",
    metavar="int4|int8",
    help="Quantise the matrices of a float32 export, and its table of tokens, in blocks of 32 numbers; int4:block=64 "
    "in blocks of another size. They are frozen: needs a set that is added, norm or bias.",
)
@click.option(
    "--loss",
    type=click.Choice(LOSSES),
    help="Loss to add, of the output 'logits' or the only float output. cross-entropy: one class of several; bce: yes "
    "or no, once or for each column; mse: numbers; none: for an objective of your own.  [default: the graph's own "
    "output 'loss', or cross-entropy for logits or a Softmax, or bce for a Sigmoid; one column needs this option]",
)
@click.option(
    "--task",
    type=click.Choice([*TASKS, *HEAD_ONLY]),
    help="Prepare a language model, as exporters write it. prompt: classify a text in a "
    "template by the word that follows, or of a masked model by the word at {mask}; causal-lm: continue texts; choice: "
    "choose between continuations. A decoder's export is kept for generating text. classification, multi-label, "
    "regression, and prompt without --label-words: a side head on any encoder or decoder, with or without a head of "
    "its own.  [default: as --loss says]",
)
@click.option(
    "--template",
    callback=escapes,
    metavar="TEXT",
    help="For --task prompt: a text with {text}, with {pair} for a second text, and of a masked model with {mask}. \\n "
    "is a line break.",
)
@click.option(
    "--label-words",
    callback=names,
    metavar="A,B,...",
    help="For --task prompt: a word for each class, in the order of --labels, which are these words by default. Each "
    "has to be one token.",
)
@click.option(
    "--calibrate",
    type=PATH,
    metavar="FILE",
    help="For --task prompt: subtract the mean logit of each label word over the texts of this file of examples, such "
    "as the training data.",
)
@click.option(
    "--per",
    type=click.Choice(PER),
    default=PER[0],
    show_default=True,
    help="For --task choice: the likelihood of a choice is the sum of its tokens' log-likelihoods, or their mean.",
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
    labels: list[str] | None,
    max_length: int | None,
    train: str | None,
    share_base: Path | None,
    dtype: Literal["float32", "float16"] | None,
    base: str | None,
    loss: Literal["cross-entropy", "bce", "mse", "none"] | None,
    task: Any,
    template: str | None,
    label_words: list[str] | None,
    calibrate: Path | None,
    per: Literal["sum", "token"],
    probe: Path | None,
    force: bool,
) -> None:
    """Convert MODEL, an ONNX file as exporters write it, to a bundle that can be trained.

    A bundle is a folder. Reading it needs numpy and onnxruntime only, as on a phone; preparing it needs the package
    onnx.

    \b
    Examples:
      pocketzo prepare model.onnx -o base --tokenizer tokenizer.json \\
          --labels negative,positive --max-length 128
      pocketzo prepare minilm/model.onnx -o base --task classification
      pocketzo prepare smollm2/model.onnx -o base --task causal-lm
      pocketzo prepare smollm2/model.onnx -o base --task causal-lm --train lora:r=8,layers=20-
      pocketzo prepare smollm2/model.onnx -o base --task causal-lm --train lora --base int4
      pocketzo prepare smollm2/model.onnx -o base --task prompt \\
          --template "Review: {text}\\nSentiment:" --label-words negative,positive
    """
    check_output(output, force=force)
    bundle = prepare_bundle(
        model,
        output,
        tokenizer=tokenizer,
        labels=labels,
        max_length=max_length,
        train=train,
        share_base=share_base,
        dtype=dtype,
        base=base,
        overwrite=force,
        loss=loss,
        task=task,
        template=template,
        label_words=label_words,
        calibrate=calibrate,
        per=per,
        probe=probe,
        note=note,
    )
    facts = bundle_facts(bundle)
    if bundle.side is not None:
        say(f"{output}: {facts['parameters']:,} parameters, {size_text(facts['bytes'])}")
        say(f"next: pocketzo train {quoted(output)} --data train.tsv -o runs/first")
        return
    say(f"{output}: {facts['parameters']:,} parameters, {facts['trainable']:,} trainable, {size_text(facts['bytes'])}")
    say(f"trained: {fact('', facts['sets'])}")
    say_frozen(bundle)
    metrics = task_of(bundle).metrics
    if metrics:
        objective = "" if bundle.loss is not None else f" --objective {metrics[0]}"
        data = "train.tsv" if bundle.logits is not None else "train.jsonl"
        say(f"next: pocketzo train {quoted(output)} --data {data} -o runs/first{objective}")
    else:
        say("next: train by a function of your own, pz.Trainer(..., objective=function)")


def check_output(path: Path, *, force: bool = False) -> None:
    """Raise a :class:`BundleError` if the path exists, unless ``force`` is given and it is a bundle alone."""
    if os.path.lexists(path) and not force:
        raise BundleError(f"{path}: already exists; choose another folder, or --force to replace a bundle")
    check_target(path, overwrite=force)
