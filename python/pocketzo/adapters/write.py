"""Write a tuned set as an adapter of another library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from pocketzo.adapters.checkpoint import Checkpoint
from pocketzo.adapters.ort import write_onnx
from pocketzo.adapters.peft import write_peft
from pocketzo.adapters.tuned import Tuned
from pocketzo.errors import BundleError
from pocketzo.formats.files import make_folder
from pocketzo.formats.staging import staged_folder

Format: TypeAlias = Literal["peft", "onnx", "gguf"]
FORMATS: Final[tuple[str, ...]] = get_args(Format)


def write_tuned(
    tuned: Tuned,
    out: str | os.PathLike[str],
    kind: Format,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    note: Callable[[str], None] | None = None,
) -> None:
    """Write an adapter; see :func:`pocketzo.write_adapter`."""
    if kind not in FORMATS:
        raise ValueError(f"kind must be {', '.join(map(repr, FORMATS))}, got {kind!r}")
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise BundleError(f"{out}: already exists; choose another folder")
    source = None if checkpoint is None else Path(checkpoint)
    if source is not None and not source.exists():
        raise BundleError(f"{source}: no such checkpoint")
    added = tuned.added
    make_folder(out.parent)
    with staged_folder(out, (), replace=False) as folder:
        if kind == "onnx":
            if source is not None:
                raise ValueError("a checkpoint belongs to the kinds 'peft' and 'gguf', got 'onnx'")
            write_onnx(tuned, folder)
        elif kind == "peft":
            read = Checkpoint() if source is None else Checkpoint.read(source)
            if not read.shapes and note is not None:
                note("names of modules follow from those of the graph alone, and were not compared with a checkpoint")
            write_peft(tuned, added, folder, read)
        else:
            from pocketzo.adapters.llama_cpp import write_gguf

            if source is None:
                raise ValueError(
                    "an adapter of kind 'gguf' needs the checkpoint, a folder with config.json or a GGUF file: names "
                    "and heads differ between families"
                )
            write_gguf(tuned, added, folder, source)
