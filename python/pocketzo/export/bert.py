"""BERT encoders as ONNX graphs, from a Hugging Face checkpoint.

The graph is BERT in standard operators (opset 17). Each initializer is one parameter, under its Hugging Face name. A
dense weight is stored ``[in, out]``, the transpose of the checkpoint's, so ``MatMul`` reads it in place and it is live.
onnxruntime fuses what is worth fusing: with its 1.31.1 on two AVX2 cores, 32 x 32 and 8 x 64 tokens, nothing else was
faster beyond the noise, not 2-D ``Gemm``, not one projection for query, key and value, and not its own attention,
normalisation and Gelu operators.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pocketzo.errors import Error, MissingExtraError
from pocketzo.files import atomic_file
from pocketzo.safetensors import read_header

if TYPE_CHECKING:
    from onnx import NodeProto

_MASKED: Final = -10_000.0  # added to a padding token's attention score: its exp is exactly 0 in float32


@dataclass(frozen=True)
class Checkpoint:
    """The files of a BERT encoder and what its weights do not tell; by default all-MiniLM-L6-v2.

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


def build_onnx(checkpoint: Checkpoint, out: str | os.PathLike[str], num_labels: int) -> None:
    """Write the encoder with mean pooling and a new classification head as one ONNX file.

    Inputs, int64 ``[batch, sequence]``: ``input_ids``, ``attention_mask`` (1 for a token, 0 for padding; at least one
    token in each row), ``token_type_ids``. Outputs, float32: ``logits`` ``[batch, num_labels]`` and ``embedding``
    ``[batch, hidden_size]``, the mean of the last layer over the tokens, not normalised to unit length.

    The head's ``classifier.weight`` ``[hidden_size, num_labels]`` and ``classifier.bias`` are zeros: every class starts
    equally likely. The checkpoint's pooler, which sentence embeddings do not use, is left out.

    Parameters
    ----------
    checkpoint : Checkpoint
        From :func:`find_checkpoint`, or any BERT encoder with its settings.
    out : path-like
        The file to write; replaced if there.
    num_labels : int
        Number of classes, at least 2.

    Raises
    ------
    ValueError
        If `num_labels` is less than 2.
    Error
        If the checkpoint lacks a tensor, or has one of another type than float32.
    MissingExtraError
        If ``onnx`` is not installed.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    try:
        from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "prepare") from None

    graph = _Graph(checkpoint)
    graph.encoder()
    graph.head(num_labels)
    tokens = ["batch", "sequence"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "all-MiniLM-L6-v2",
            [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in graph.inputs],
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_labels]),
                helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", checkpoint.hidden_size]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="pocketzo",
    )
    with atomic_file(Path(out)) as file:
        file.write(model.SerializeToString())
        for name, array in graph.parameters.items():
            # protobuf merges messages written one after the other, so only one tensor at a time is in memory
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            file.write(ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())


class _Graph:
    """Nodes and parameters, gathered in the order of the computation; each method returns the name of its output."""

    inputs: Final = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.entries = read_header(checkpoint.weights)
        self.bytes = np.memmap(checkpoint.weights, np.uint8, mode="r")
        self.nodes: list[NodeProto] = []
        self.parameters: dict[str, npt.NDArray[np.float32]] = {}

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def constant(self, value: float | list[int]) -> str:
        from onnx import numpy_helper

        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        return self.op("Constant", value=numpy_helper.from_array(array))  # a node: initializers are parameters only

    def parameter(self, name: str, *, transpose: bool = False) -> str:
        path = self.checkpoint.weights
        if name not in self.entries:
            raise Error(f"{path}: no tensor {name!r}; expected the weights of a BERT encoder")
        entry = self.entries[name]
        if entry.dtype != "F32":
            raise Error(f"{path}: tensor {name!r}: expected F32, got {entry.dtype}")
        array = self.bytes[entry.start : entry.stop].view(np.float32).reshape(entry.shape)
        self.parameters[name] = array.T if transpose else array
        return name

    def dense(self, x: str, name: str) -> str:
        product = self.op("MatMul", x, self.parameter(f"{name}.weight", transpose=True))
        return self.op("Add", product, self.parameter(f"{name}.bias"))

    def layer_norm(self, x: str, name: str) -> str:
        parameters = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.op("LayerNormalization", x, *parameters, epsilon=self.checkpoint.layer_norm_eps)

    def gelu(self, x: str) -> str:
        # the form with Erf that onnxruntime fuses, with the bias before it, into one BiasGelu
        erf = self.op("Erf", self.op("Div", x, self.constant(float(np.sqrt(2)))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant(1.0))), self.constant(0.5))

    def embeddings(self) -> str:
        word = self.op("Gather", self.parameter("embeddings.word_embeddings.weight"), "input_ids")
        kind = self.op("Gather", self.parameter("embeddings.token_type_embeddings.weight"), "token_type_ids")
        length = self.op("Squeeze", self.op("Shape", "input_ids", start=1))
        places = self.op("Range", self.constant(0), length, self.constant(1))
        position = self.op("Gather", self.parameter("embeddings.position_embeddings.weight"), places)
        return self.layer_norm(self.op("Add", self.op("Add", word, kind), position), "embeddings.LayerNorm")

    def attention(self, x: str, bias: str, name: str) -> str:
        """Multi-head self-attention of `x`, [batch, sequence, hidden]; `bias` is added to the scores."""
        size = self.checkpoint.hidden_size // self.checkpoint.heads
        split = self.constant([0, 0, self.checkpoint.heads, size])
        query, key, value = (
            self.op("Transpose", self.op("Reshape", self.dense(x, f"{name}.{part}"), split), perm=order)
            for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )  # [batch, head, sequence, size], the key's last two axes swapped
        scores = self.op("Mul", self.op("MatMul", query, key), self.constant(size**-0.5))
        shares = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        return self.op("Reshape", mixed, self.constant([0, 0, self.checkpoint.hidden_size]))

    def encoder(self) -> None:
        from onnx import TensorProto

        mask = self.op("Cast", "attention_mask", to=TensorProto.FLOAT)  # [batch, sequence]
        padding = self.op("Sub", self.constant(1.0), self.op("Unsqueeze", mask, self.constant([1, 2])))
        bias = self.op("Mul", padding, self.constant(_MASKED))  # [batch, 1, 1, sequence]
        x = self.embeddings()
        for layer in range(self.checkpoint.layers):
            name = f"encoder.layer.{layer}"
            mixed = self.dense(self.attention(x, bias, f"{name}.attention.self"), f"{name}.attention.output.dense")
            x = self.layer_norm(self.op("Add", mixed, x), f"{name}.attention.output.LayerNorm")
            inner = self.gelu(self.dense(x, f"{name}.intermediate.dense"))
            x = self.layer_norm(
                self.op("Add", self.dense(inner, f"{name}.output.dense"), x), f"{name}.output.LayerNorm"
            )
        count = self.op("ReduceSum", mask, self.constant([1]), keepdims=1)
        share = self.op("Unsqueeze", self.op("Div", mask, count), self.constant([1]))  # [batch, 1, sequence]
        self.op("Squeeze", self.op("MatMul", share, x), self.constant([1]), out="embedding")

    def head(self, num_labels: int) -> None:
        size = self.checkpoint.hidden_size
        self.parameters["classifier.weight"] = np.zeros((size, num_labels), np.float32)
        self.parameters["classifier.bias"] = np.zeros(num_labels, np.float32)
        self.op("Add", self.op("MatMul", "embedding", "classifier.weight"), "classifier.bias", out="logits")
