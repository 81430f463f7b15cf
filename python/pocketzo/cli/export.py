"""``pocketzo export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import err, note, quoted, say
from pocketzo.cli.options import PATH
from pocketzo.errors import Error


@click.command(cls=Command)
@click.argument("source", type=PATH, metavar="FILE.gguf")
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE.onnx", help="The ONNX file to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "int8", "int4"]),
    default="float32",
    help="float32 dequantises; int8 and int4 keep the file's blocks, and quantise matrices that have none.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def export(source: Path, output: Path, dtype: Literal["float32", "int8", "int4"], force: bool) -> None:
    """Convert a GGUF file to ONNX, with a cache, tokenizer.json and the chat template beside it.

    It needs the extra 'export' (torch, transformers, gguf, mobius-onnx) and several times the memory of the model in
    float32. Every export is compared with the model in transformers, and refused if their logits differ.

    \b
    Example:
      pocketzo export SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2/model.onnx --dtype int4
      pocketzo prepare smollm2/model.onnx -o base --task causal-lm
    """
    if source.is_dir():
        raise Error(
            f"{source}: a folder, and only GGUF files can be exported by this version: export the checkpoint by "
            f"another tool, such as optimum, and give its ONNX file to pocketzo prepare"
        )
    if not source.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(source))
    if output.exists() and not force:
        raise Error(f"{output}: already exists; choose another file, or replace it with --force")
    from pocketzo.export.gguf import export_gguf

    with err.status(f"exporting {source.name}, which takes half a minute or some minutes"):
        export_gguf(source, output, dtype=dtype, note=note)
    say(f"{output}: written, with tokenizer.json beside it")
    say(f"next: pocketzo prepare {quoted(output)} -o base --task causal-lm")
