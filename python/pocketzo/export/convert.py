"""Convert a checkpoint's folder or a GGUF file to an ONNX graph that was compared with transformers."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

from pocketzo.errors import Error
from pocketzo.export.families import Kind
from pocketzo.formats.files import make_folder
from pocketzo.packages import require

if TYPE_CHECKING:
    from pocketzo.export._source import Source

Dtype: TypeAlias = Literal["float32", "float16", "int8", "int4"]
DTYPES: Final[tuple[str, ...]] = get_args(Dtype)
_FLOATS, _BLOCKS = 1e-4, 1e-3  # of the largest output: sums in another order, of more roundings where blocks are scaled
_HALVES: Final = 0.05  # a tiny BERT was seen to differ by 3e-2, SmolLM2 by 3e-3
_BESIDE: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: Dtype = "float32",
    note: Callable[[str], None] | None = None,
) -> Kind:
    """Write a checkpoint of transformers, or a GGUF file, as an ONNX graph with its weights and its tokenizer.

    The class that ``architectures`` in ``config.json`` names decides the inputs and outputs:

    ============================================  =================================================================
    class                                         outputs, float32
    ============================================  =================================================================
    ``...ForCausalLM``, ``GPT2LMHeadModel``       ``logits`` ``[batch, sequence, vocabulary]``, ``present.{i}.key``
                                                  and ``.value``
    ``...ForMaskedLM``                            ``logits`` ``[batch, sequence, vocabulary]``
    ``...ForSequenceClassification``              ``logits`` ``[batch, labels]``
    ``...Model``                                  ``last_hidden_state`` ``[batch, sequence, hidden]``
    the same in a folder of sentence-             also ``sentence_embedding`` ``[batch, size]``
    transformers, whatever class is named
    ============================================  =================================================================

    Inputs, int64: ``input_ids`` and ``attention_mask`` ``[batch, sequence]``, and of encoders with several token types
    ``token_type_ids``. Decoders have ``position_ids``, a mask ``[batch, past + sequence]``, and float32
    ``[batch, heads, past, size]`` the caches ``past_key_values.{i}.key`` and ``.value``. The weights of encoders have
    the names of the checkpoint.

    The float32 graph is run on padded batches, a decoder's with a cache too, and its outputs have to agree with those
    of transformers to 1e-4 of the largest.

    With ``"float16"``, weights and arithmetic are float16, inputs and outputs float32; outputs have to agree to 5 %.

    With ``"int4"`` and ``"int8"``, matrices and the table of tokens are then quantised, as Q4_0 or as Q8_0: in blocks
    of 32 numbers, read by ``MatMulNBits`` and ``GatherBlockQuantized``. In a GGUF file, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1,
    Q8_0 and Q6_K stay what they are to the rounding of float32, with 4 or 8 bits. A graph in which all blocks were kept
    has to agree with transformers to 1e-3.

    Parameters
    ----------
    source : path-like
        A folder as ``save_pretrained``, sentence-transformers or the Hugging Face Hub lays it out, of a family in
        :data:`pocketzo.export.families.FAMILIES`; or a GGUF file with tensors of F32, F16, BF16, Q4_0, Q4_1, Q5_0,
        Q5_1, Q8_0, Q4_K, Q6_K.
    output : path-like
        The ONNX file to write; missing folders are created. The weights are written to a file of this name and
        ``.data``; ``tokenizer.json``, the chat template and the settings of model, tokenizer and generation beside it.
        Existing files are replaced.
    dtype : {"float32", "float16", "int8", "int4"}
        The type of the weights: dequantised, or in blocks.
    note : callable, optional
        Called with a line of text for what was kept and what was quantised, for weights that are not used, and for the
        agreement.

    Returns
    -------
    {"decoder", "masked", "classifier", "encoder"}
        What the model computes.

    Raises
    ------
    Error
        If the file or folder is damaged or incomplete, of a family, class or type that is not supported, lacks a weight
        of the model, has a tokenizer that cannot be converted, or if the graph's outputs differ from the model's.
        Nothing is written in these cases.
    MissingExtraError, BrokenPackageError
        If a package of the extra ``export`` is not installed, or cannot be imported.
    ValueError
        If `dtype` is another one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(map(repr, DTYPES[:-1]))} or {DTYPES[-1]!r}, got {dtype!r}")
    say = note or (lambda line: None)
    path, output = Path(source), Path(output)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if path.is_dir() and path.resolve() == output.parent.resolve():
        raise Error(f"{output}: in the checkpoint's folder, whose settings would be replaced; choose another folder")
    require("onnx", "onnx-ir", "onnxscript", "torch", "transformers", "accelerate", "mobius-onnx", "gguf")
    from pocketzo.export._quiet import quiet

    with quiet():
        opened = _open(path, say)
        make_folder(output.parent)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as name:
            for part in _write(opened, Path(name), output.name, dtype, say):
                part.replace(output.parent / part.name)
    return opened.kind


def _open(path: Path, say: Callable[[str], None]) -> Source:
    if path.is_dir():
        from pocketzo.export.checkpoint import open_checkpoint

        return open_checkpoint(path, say)
    from pocketzo.export.gguf import open_gguf

    return open_gguf(path)


def _write(source: Source, work: Path, name: str, dtype: Dtype, say: Callable[[str], None]) -> list[Path]:
    """Write an export below a folder, compare it with the model, and return its files."""
    from pocketzo.export._matrices import matrices_of
    from pocketzo.graph.blocks import Scheme
    from pocketzo.graph.matrices import Matrices
    from pocketzo.graph.nbits import quantise
    from pocketzo.graph.stored import store

    folder, graph, other = work / "settings", work / "floats" / name, work / dtype / name
    for each in (folder, graph.parent, other.parent):
        each.mkdir()
    source.save_settings(folder)
    source.write_graph(graph)
    found = _compare(source, graph, _FLOATS)
    if dtype == "float16":
        store(graph, other, dtype)
        graph, found = other, _compare(source, other, _HALVES)
    elif dtype != "float32":
        known = () if source.file is None else matrices_of(source.file)
        summary = quantise(graph, other, Matrices(Scheme.parse(dtype), known))
        for line in summary.lines():
            say(line)
        graph, found = other, _compare(source, other, math.inf if summary.requantised else _BLOCKS)
    say(f"outputs differ from those of transformers by {found:.1e} of the largest")
    return [*graph.parent.iterdir(), *filter(Path.exists, (folder / each for each in _BESIDE))]


def _compare(source: Source, graph: Path, tolerance: float) -> float:
    """Return how far a graph's outputs are off; raise Error if that is more than rounding explains."""
    found = source.difference(graph)
    if not found <= tolerance:
        raise Error(
            f"{source.path}: the graph's outputs differ from those of transformers by {found:.1e} of the largest, "
            f"more than {tolerance:g}; please report this model"
        )
    return found
