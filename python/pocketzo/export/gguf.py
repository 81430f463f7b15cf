"""A GGUF file, whose blocks a graph can keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnx_ir as ir

from pocketzo.export._agreement import difference
from pocketzo.export._float_graph import write_float_graph
from pocketzo.export._gguf_file import GgufFile
from pocketzo.export._gguf_model import load_model, load_tokenizer
from pocketzo.export._nbits import Summary, put_blocks
from pocketzo.export.convert import Dtype, Source
from pocketzo.graph.external import ExternalFiles
from pocketzo.graph.read import read_model

_KINDS: Final = {"int4": "Q4_0", "int8": "Q8_0"}
_FLOATS, _BLOCKS = 1e-4, 1e-3  # of the largest logit: sums in another order, of more roundings where blocks are scaled


class GgufSource(Source):
    """A decoder of a GGUF file, with its weights dequantised.

    Raises
    ------
    Error
        If the file is damaged, or has a tensor, a model or a tokenizer that is not supported.
    """

    kind = "decoder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.model, self.tokenizer = load_model(self.file), load_tokenizer(self.file)

    def write_graph(self, folder: Path, target: Path, dtype: Dtype, say: Callable[[str], None]) -> float:
        """Write the graph; see :meth:`Source.write_graph`."""
        self.model.save_pretrained(folder)
        if dtype not in _KINDS:
            write_float_graph(self.model, folder, target)
            return _FLOATS
        floats = folder.with_name("floats") / target.name
        floats.parent.mkdir()
        write_float_graph(self.model, folder, floats)
        summary = _write_blocks(floats, target, self.file, _KINDS[dtype])
        for line in _describe(summary, _KINDS[dtype]):
            say(line)
        return math.inf if summary.requantised else _BLOCKS

    def difference(self, path: Path) -> float:
        """Return how far a graph is off; see :meth:`Source.difference`."""
        return difference(self.model, path)


def _write_blocks(source: Path, target: Path, file: GgufFile, kind: str) -> Summary:
    """Write a float32 graph with the blocks of a file in place of its matrices."""
    model = read_model(source)
    files = ExternalFiles(source.parent)
    summary = put_blocks(model, files, file, kind)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(files.read(value.const_value), name=value.name)
    ir.save(model, target, external_data=f"{target.name}.data")
    return summary


def _describe(summary: Summary, kind: str) -> list[str]:
    def count(tensors: dict[str, str]) -> str:
        return ", ".join(f"{number} of {kind}" for kind, number in sorted(Counter(tensors.values()).items()))

    lines = [f"{len(summary.exact)} matrices keep their blocks: {count(summary.exact)}"] if summary.exact else []
    if summary.requantised:
        lines.append(
            f"{len(summary.requantised)} matrices quantised as {kind}: {count(summary.requantised)}; "
            f"error {summary.error:.1e} of their root mean square"
        )
    if summary.floats:
        lines.append(f"embedding tables in float32: {count(summary.floats)}")
    return lines
