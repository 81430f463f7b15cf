"""``pocketzo adapter``."""

from __future__ import annotations

from pathlib import Path

import click

from pocketzo.adapters.write import FORMATS, Format
from pocketzo.cli.command import Command
from pocketzo.cli.console import note, say
from pocketzo.cli.merge import step_of
from pocketzo.cli.options import PATH, base_option, best_option, step_option
from pocketzo.train.tuned import write_adapter


@click.command(cls=Command)
@click.argument("run", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder to write; must not exist.")
@click.option("--format", "kind", type=click.Choice(FORMATS), required=True, help="The library that is to read it.")
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="DIR",
    help="The checkpoint that the model was exported from, with config.json; of --format gguf, also its GGUF file. "
    "Names and shapes of modules are compared with it.  [needed for gguf]",
)
@step_option
@best_option
@base_option
def adapter(
    run: Path,
    output: Path,
    kind: Format,
    checkpoint: Path | None,
    step: int | None,
    best: bool,
    base: Path | None,
) -> None:
    """Write what RUN, or a tuned bundle, learnt as an adapter of another library.

    \b
    peft  adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained over the checkpoint; lora, or
          ia3. The queries and values of one projection become one pair of matrices with the sum of their ranks.
    gguf  adapter.gguf, for llama.cpp's --lora; lora.
    onnx  adapter.onnx_adapter, for onnxruntime's LoraAdapter; all sets. Beside it the graphs in which the tensors are
          inputs with defaults, and a copy of the weights.

    \b
    Examples:
      pocketzo adapter runs/first -o adapter --format peft --checkpoint SmolLM2-135M-Instruct
      pocketzo adapter runs/first -o adapter --format gguf --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf
    """
    number = step_of(run, step, best)
    write_adapter(run, output, kind=kind, checkpoint=checkpoint, step=number, base=base, note=note)
    say(f"{output}: {run} as an adapter for {kind}")
