"""Convert a checkpoint's folder or a GGUF file to an ONNX graph that was compared with transformers."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from pocketzo.errors import Error
from pocketzo.export.families import Kind
from pocketzo.formats.files import make_folder
from pocketzo.packages import require

Dtype: TypeAlias = Literal["float32", "int8", "int4"]
DTYPES: Final[tuple[str, ...]] = get_args(Dtype)
_BESIDE: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


class Source(ABC):
    """A model of transformers that was loaded, with float32 weights, and how its graph is made.

    Attributes
    ----------
    path : Path
        What it was loaded from.
    kind : {"decoder", "masked", "classifier", "encoder"}
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizer or None
    """

    path: Path
    kind: Kind
    model: Any
    tokenizer: Any

    @abstractmethod
    def write_graph(self, folder: Path, target: Path, dtype: Dtype, say: Callable[[str], None]) -> float:
        """Write the graph to a file, with external data beside it.

        Parameters
        ----------
        folder : Path
            For other files, such as the model's checkpoint.
        target : Path
        dtype : {"float32", "int8", "int4"}
        say : callable
            Called with a line for each thing that a user should know.

        Returns
        -------
        float
            The difference that rounding explains, relative to the largest output.
        """

    @abstractmethod
    def difference(self, path: Path) -> float:
        """Return the largest difference of a graph's outputs from the model's, relative to the largest output."""


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

    The graph is run on padded batches, a decoder's with a cache too, and its outputs have to agree with those of
    transformers: to 1e-4 of the largest, and to 1e-3 in a graph in which all blocks of a GGUF file were kept.

    Quantised matrices of a GGUF file either become float32, or keep their blocks as ``MatMulNBits`` and
    ``GatherBlockQuantized`` read them: with ``"int4"`` and ``"int8"``, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q8_0 and Q6_K stay
    what they are to the rounding of float32, with 4 or 8 bits. Matrices of F32, F16 and BF16 are quantised, as Q4_0 or
    as Q8_0. An embedding table of these stays float32.

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
    dtype : {"float32", "int8", "int4"}
        Whether blocks are kept, and the bits of the matrices that have none. A folder is exported as float32.
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
        opened = _open(path, dtype, say)
        make_folder(output.parent)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as name:
            for part in _write(opened, Path(name), output.name, dtype, say):
                part.replace(output.parent / part.name)
    return opened.kind


def _open(path: Path, dtype: Dtype, say: Callable[[str], None]) -> Source:
    if not path.is_dir():
        from pocketzo.export.gguf import GgufSource

        return GgufSource(path)
    if dtype != "float32":
        raise Error(f"{path}: a checkpoint's folder can be exported as float32, not as {dtype}")
    from pocketzo.export.checkpoint import open_checkpoint

    return open_checkpoint(path, say)


def _write(source: Source, work: Path, name: str, dtype: Dtype, say: Callable[[str], None]) -> list[Path]:
    """Write an export below a folder, compare it with the model, and return its files."""
    folder, graph = work / "checkpoint", work / "graph" / name
    for each in (folder, graph.parent):
        each.mkdir()
    source.model.config.save_pretrained(folder)
    if source.model.can_generate():
        source.model.generation_config.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    tolerance = source.write_graph(folder, graph, dtype, say)
    found = source.difference(graph)
    if not found <= tolerance:
        raise Error(
            f"{source.path}: the graph's outputs differ from those of transformers by {found:.1e} of the largest, "
            f"more than {tolerance:g}; please report this model"
        )
    say(f"outputs differ from those of transformers by {found:.1e} of the largest")
    return [*graph.parent.iterdir(), *filter(Path.exists, (folder / each for each in _BESIDE))]
