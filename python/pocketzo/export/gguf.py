"""A GGUF file as an ONNX graph with a cache, and its tokenizer beside it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from pocketzo.errors import Error
from pocketzo.formats.files import make_folder
from pocketzo.packages import require

__all__ = ["export_gguf"]

_FLOATS, _BLOCKS = 1e-4, 1e-3  # of the largest logit: sums in another order, of more roundings where blocks are scaled
_BESIDE: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def export_gguf(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "int8", "int4"] = "float32",
    note: Callable[[str], None] | None = None,
) -> None:
    """Write a decoder of a GGUF file as an ONNX graph, its weights and its tokenizer.

    Inputs, int64: ``input_ids`` and ``position_ids`` ``[batch, sequence]``, ``attention_mask``
    ``[batch, past + sequence]``; float32 ``[batch, heads, past, size]``: ``past_key_values.{i}.key`` and ``.value``.
    Outputs, float32: ``logits`` ``[batch, sequence, vocabulary]``, ``present.{i}.key`` and ``.value``.

    Quantised matrices either become float32, or keep their blocks as ``MatMulNBits`` and ``GatherBlockQuantized`` read
    them: with ``"int4"`` and ``"int8"``, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q8_0 and Q6_K stay what they are to the rounding
    of float32, with 4 or 8 bits. Matrices of F32, F16 and BF16 are quantised, as Q4_0 or as Q8_0, and the embedding
    table, too.

    The graph's logits are compared with those of the dequantised model in transformers: on a padded batch, and with a
    cache. They have to agree to 1e-4 of the largest one, and of a graph in which all blocks were kept to 1e-3.

    Parameters
    ----------
    path : path-like
        The file: tensors of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q6_K.
    output : path-like
        The ONNX file to write; missing folders are created. The weights are written to a file of this name and
        ``.data``; ``tokenizer.json``, the chat template and the settings of tokenizer and generation beside it.
        Existing files are replaced.
    dtype : {"float32", "int8", "int4"}
        Whether blocks are kept, and the bits of the matrices that have none.
    note : callable, optional
        Called with a line of text for what was kept and what was quantised, and for the agreement.

    Raises
    ------
    Error
        If the file is damaged, has a tensor of another type, a model or a tokenizer that is not supported, or the
        graph's logits differ from the model's. Nothing is written in these cases.
    MissingExtraError, BrokenPackageError
        If a package of the extra ``export`` is not installed, or cannot be imported.
    ValueError
        If `dtype` is another one.
    """
    if dtype not in ("float32", "int8", "int4"):
        raise ValueError(f"dtype: expected 'float32', 'int8' or 'int4', got {dtype!r}")
    require("onnx", "onnx-ir", "gguf", "torch", "transformers", "accelerate", "mobius-onnx")
    from pocketzo.export._agreement import difference
    from pocketzo.export._float_graph import write_float_graph
    from pocketzo.export._gguf_file import GgufFile
    from pocketzo.export._gguf_model import load_model, load_tokenizer
    from pocketzo.export._nbits import quantise

    say = note or (lambda line: None)
    file = GgufFile(Path(path))
    output = Path(output)
    make_folder(output.parent)
    model, tokenizer = load_model(file), load_tokenizer(file)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as name:
        checkpoint, floats = Path(name, "checkpoint"), Path(name, "floats", output.name)
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        floats.parent.mkdir()
        write_float_graph(model, checkpoint, floats)
        graph, tolerance = floats, _FLOATS
        if dtype != "float32":
            graph = Path(name, "blocks", output.name)
            graph.parent.mkdir()
            summary = quantise(floats, graph, dtype, file)
            for line in summary.lines():
                say(line)
            tolerance = math.inf if summary.requantised else _BLOCKS
        found = difference(model, graph)
        if not found <= tolerance:
            raise Error(
                f"{file.path}: the graph's logits differ from those of transformers by {found:.1e} of the largest, "
                f"more than {tolerance:g}; please report this model"
            )
        say(f"logits differ from those of transformers by {found:.1e} of the largest")
        for part in (*graph.parent.iterdir(), *filter(Path.exists, (checkpoint / each for each in _BESIDE))):
            part.replace(output.parent / part.name)
