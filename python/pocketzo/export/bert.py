"""BERT encoders as ONNX graphs, from a Hugging Face checkpoint.

The graph is BERT in standard operators (opset 17). Each initializer is one parameter, under its Hugging Face name. A
dense weight is stored ``[in, out]``, the transpose of the checkpoint's, so ``MatMul`` reads it in place: it is live.
onnxruntime applies the useful fusions. With onnxruntime 1.31.1 on two AVX2 cores, 32 x 32 and 8 x 64 tokens, no
alternative was faster beyond the noise: not 2-D ``Gemm``, not one projection for query, key and value, and not its own
attention, normalisation and Gelu operators.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketzo.formats.staging import staged_file
from pocketzo.packages import require


@dataclass(frozen=True)
class Checkpoint:
    """The files and the shape of a BERT encoder; by default all-MiniLM-L6-v2.

    Attributes
    ----------
    weights : Path
        ``model.safetensors``, Hugging Face ``BertModel`` names, float32.
    tokenizer : Path
        ``tokenizer.json``.
    layers, heads, hidden_size : int
        Transformer layers, attention heads in each, width of a token's vector.
    layer_norm_eps : float
        Added to the variance in every layer normalisation.
    """

    weights: Path
    tokenizer: Path
    layers: int = 6
    heads: int = 12
    hidden_size: int = 384
    layer_norm_eps: float = 1e-12


def build_onnx(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    num_labels: int,
    *,
    projection: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write the encoder with mean pooling and a new classification head as one ONNX file.

    Inputs, int64 ``[batch, sequence]``: ``input_ids``, ``attention_mask`` (1 for a token, 0 for padding; at least one
    token in each row), ``token_type_ids``. Outputs, float32: ``logits`` ``[batch, num_labels]`` and ``embedding``
    ``[batch, hidden_size]``, the mean of the last layer over the tokens, not normalised to unit length.

    The head's ``classifier.weight`` and ``classifier.bias`` are zeros: every class starts equally likely. The
    checkpoint's pooler, which sentence embeddings do not use, is left out.

    Parameters
    ----------
    checkpoint : Checkpoint
        From :func:`find_checkpoint`, or any BERT encoder with its settings.
    out : path-like
        The file to write; an existing file is replaced.
    num_labels : int
        Number of classes, at least 2.
    projection : tuple of ndarray, optional
        Weight ``[hidden_size, axes]`` and bias ``[axes]`` of a linear layer between embedding and classifier,
        ``projection.weight`` and ``projection.bias``.

    Raises
    ------
    ValueError
        If `num_labels` is less than 2.
    Error
        If the checkpoint lacks a tensor, or has one of another type than float32.
    MissingExtraError, BrokenPackageError
        If ``onnx`` or ``onnx-ir`` is not installed, or cannot be imported.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    require("onnx", "onnx-ir")
    import onnx_ir as ir
    from onnx import GraphProto, ModelProto, numpy_helper

    from pocketzo.export._bert_graph import BertGraph

    graph = BertGraph(checkpoint)
    graph.encoder()
    graph.head(num_labels, projection)
    model = ir.Model(graph.graph, ir_version=8, producer_name="pocketzo")
    with staged_file(Path(out)) as file:
        file.write(ir.to_proto(model).SerializeToString())
        for name, array in graph.parameters.items():
            # protobuf merges concatenated messages, so only one tensor at a time is in memory
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            file.write(ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())
