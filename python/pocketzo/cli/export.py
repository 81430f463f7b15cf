"""``pocketzo export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import err, note, quoted, say
from pocketzo.cli.options import PATH
from pocketzo.errors import Error
from pocketzo.export import DTYPES
from pocketzo.export import export as export_model

if TYPE_CHECKING:
    from pocketzo.export import Dtype, Kind

_NEXT: Final[dict[Kind, str]] = {
    "decoder": "next: pocketzo prepare {} -o base --task causal-lm",
    "masked": "next: pocketzo prepare {} -o base --task prompt --template '{{text}} It was {{mask}}.' "
    "--label-words terrible,great",
    "classifier": "next: pocketzo prepare {} -o base --tokenizer {}",
    "encoder": "it has no head, so its bundle has no loss: train by a function of your own, pz.Trainer(..., "
    "objective=function), or export a checkpoint with a head\nnext: pocketzo prepare {} -o base",
}


@click.command(cls=Command)
@click.argument("source", type=PATH, metavar="CHECKPOINT_DIR|FILE.gguf")
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE.onnx", help="The ONNX file to write.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DTYPES[0],
    show_default=True,
    help="float32 dequantises; float16 halves the memory, and is slow on x86-64; int8 and int4 keep the blocks of a "
    "GGUF file, and quantise all other matrices. What is quantised cannot be trained.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def export(source: Path, output: Path, dtype: Dtype, force: bool) -> None:
    """Convert a checkpoint's folder or a GGUF file to ONNX, with tokenizer.json and the settings beside it.

    A folder is one that transformers or sentence-transformers have saved, or a downloaded one. The class in its
    config.json decides what is exported:

    \b
      BERT, RoBERTa, DistilBERT, ELECTRA, ALBERT, MPNet
        ...ForMaskedLM, ...ForSequenceClassification   logits
        ...Model, and sentence-transformers            hidden states, sentence embedding
      OPT, GPT-2, Llama, SmolLM, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3
        ...ForCausalLM                                 logits and a cache

    It needs the extra 'export' (torch, transformers, gguf, mobius-onnx, onnxscript) and several times the memory of the
    model in float32. Every export is compared with the model in transformers, and refused if their outputs differ.

    \b
    Examples:
      pocketzo export roberta-large -o roberta/model.onnx
      pocketzo export SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2/model.onnx --dtype int4
      pocketzo prepare smollm2/model.onnx -o base --task causal-lm
    """
    if output.exists() and not force:
        raise Error(f"{output}: already exists; choose another file, or replace it with --force")
    with err.status(f"exporting {source.name}, which takes half a minute or some minutes"):
        kind = export_model(source, output, dtype=dtype, note=note)
    tokenizer = output.with_name("tokenizer.json")
    say(f"{output}: written" + (", with tokenizer.json beside it" if tokenizer.is_file() else ""))
    say(_NEXT[kind].format(quoted(output), quoted(tokenizer)))
