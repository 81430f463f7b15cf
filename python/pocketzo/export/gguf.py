"""A GGUF file, whose blocks a graph can keep."""

from __future__ import annotations

from pathlib import Path

from pocketzo.export._gguf_file import GgufFile
from pocketzo.export._gguf_model import load_model, load_tokenizer
from pocketzo.export._source import DecoderSource


def open_gguf(path: Path) -> DecoderSource:
    """Load a model, its weights dequantised, and its tokenizer.

    Raises
    ------
    Error
        If the file is damaged, or has a tensor, a model or a tokenizer that is not supported.
    """
    file = GgufFile(path)
    return DecoderSource(path, load_model(file), load_tokenizer(file), file)
