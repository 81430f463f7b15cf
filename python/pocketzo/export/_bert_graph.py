"""The nodes of BERT; imported by :mod:`pocketzo.export.bert` where onnx-ir is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pocketzo.errors import Error
from pocketzo.formats.safetensors import map_tensors
from pocketzo.graph.build import Builder

if TYPE_CHECKING:
    from pocketzo.export.bert import Checkpoint

_MASKED: Final = -10_000.0  # added to a padding token's attention score: its exp is exactly 0 in float32

Floats = npt.NDArray[np.float32]


class BertGraph(Builder):
    """Nodes in the order of the computation, and the arrays of the parameters that they read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(ir.Graph([], [], nodes=[], name="all-MiniLM-L6-v2", opset_imports={"": 17}))
        self.checkpoint = checkpoint
        self.tensors = map_tensors(checkpoint.weights)
        self.parameters: dict[str, Floats] = {}
        self.ids, self.mask, self.kinds = (
            self.input(name, ir.DataType.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        )

    def new(self, name: str, array: Floats) -> ir.Value:
        """Return a parameter whose bytes the caller writes, one array at a time."""
        self.parameters[name] = array
        return ir.val(name, ir.DataType.FLOAT, array.shape)

    def stored(self, name: str, *, transpose: bool = False) -> ir.Value:
        path = self.checkpoint.weights
        if name not in self.tensors:
            raise Error(f"{path}: no tensor {name!r}; expected the weights of a BERT encoder")
        array = self.tensors[name]
        if array.dtype != np.float32:
            raise Error(f"{path}: tensor {name!r}: expected float32, got {array.dtype}")
        return self.new(name, array.T if transpose else array)

    def dense(self, x: ir.Value, name: str) -> ir.Value:
        product = self.op("MatMul", x, self.stored(f"{name}.weight", transpose=True))
        return self.op("Add", product, self.stored(f"{name}.bias"))

    def layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        parameters = self.stored(f"{name}.weight"), self.stored(f"{name}.bias")
        return self.op("LayerNormalization", x, *parameters, epsilon=self.checkpoint.layer_norm_eps)

    def gelu(self, x: ir.Value) -> ir.Value:
        # the form with Erf that onnxruntime fuses, with the bias before it, into one BiasGelu
        erf = self.op("Erf", self.op("Div", x, self.constant(float(np.sqrt(2)))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant(1.0))), self.constant(0.5))

    def embeddings(self) -> ir.Value:
        word = self.op("Gather", self.stored("embeddings.word_embeddings.weight"), self.ids)
        kind = self.op("Gather", self.stored("embeddings.token_type_embeddings.weight"), self.kinds)
        length = self.op("Squeeze", self.op("Shape", self.ids, start=1))
        places = self.op("Range", self.constant(0), length, self.constant(1))
        position = self.op("Gather", self.stored("embeddings.position_embeddings.weight"), places)
        return self.layer_norm(self.op("Add", self.op("Add", word, kind), position), "embeddings.LayerNorm")

    def attention(self, x: ir.Value, bias: ir.Value, name: str) -> ir.Value:
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
        mask = self.op("Cast", self.mask, to=ir.DataType.FLOAT)  # [batch, sequence]
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
        self.embedding = self.op("Squeeze", self.op("MatMul", share, x), self.constant([1]), name="embedding")

    def head(self, num_labels: int, projection: tuple[Floats, Floats] | None) -> None:
        x, size = self.embedding, self.checkpoint.hidden_size
        if projection is not None:
            weight, offset = projection
            size = weight.shape[1]
            product = self.op("MatMul", x, self.new("projection.weight", weight))
            x = self.op("Add", product, self.new("projection.bias", offset))
        product = self.op("MatMul", x, self.new("classifier.weight", np.zeros((size, num_labels), np.float32)))
        bias = self.new("classifier.bias", np.zeros(num_labels, np.float32))
        logits = self.op("Add", product, bias, name="logits")
        self.output(logits, ir.DataType.FLOAT, ["batch", num_labels])
        self.output(self.embedding, ir.DataType.FLOAT, ["batch", self.checkpoint.hidden_size])
