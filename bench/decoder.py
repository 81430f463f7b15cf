"""The graph of an OPT decoder with random weights, built by pocketzo.graph.build.

In a file of its own, as processes whose memory is measured do not import onnx-ir.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir  # noqa: TID253
from models import MASKED, OPT_OFFSET, Array, Shape, normal

from pocketzo.graph.build import Builder

Value = ir.Value


class Decoder(Builder):
    """Nodes of the graph, and the file of the weights, one tensor after another: all exceed protobuf's 2 GB."""

    def __init__(self, shape: Shape, weights: Path) -> None:
        super().__init__(ir.Graph([], [], nodes=[], name="opt", opset_imports={"": 17}))
        self.shape = shape
        self.ids, self.real = (
            self.input(name, ir.DataType.INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")
        )
        self.file = weights.open("wb")
        self.folder, self.location = weights.parent, weights.name

    def weight(self, name: str, array: Array) -> Value:
        self.file.write(bytes(-self.file.tell() % 4096))
        offset, shape = self.file.tell(), ir.Shape(array.shape)
        self.file.write(array.data)
        return self.parameter(
            name,
            ir.ExternalTensor(
                self.location,
                offset,
                array.nbytes,
                ir.DataType.FLOAT,
                shape=shape,
                name=name,
                base_dir=self.folder,
            ),
        )

    def random(self, name: str, *size: int) -> Value:
        return self.weight(name, normal(name, *size))

    def dense(self, x: Value, name: str, size: int, out: int) -> Value:
        product = self.op("MatMul", x, self.random(f"{name}.weight", size, out))
        return self.op("Add", product, self.random(f"{name}.bias", out))

    def layer_norm(self, x: Value, name: str) -> Value:
        scale = self.weight(f"{name}.weight", np.ones(self.shape.hidden, np.float32))
        bias = self.weight(f"{name}.bias", np.zeros(self.shape.hidden, np.float32))
        return self.op("LayerNormalization", x, scale, bias, epsilon=1e-5)

    def mask(self) -> tuple[Value, Value]:
        """Return the positions, [sequence], and what is added to the scores, [batch, 1, sequence, sequence]."""
        length = self.op("Squeeze", self.op("Shape", self.ids, start=1))
        places = self.op("Range", self.constant(0), length, self.constant(1))
        rows = self.op("Unsqueeze", places, self.constant([1]))
        later = self.op("Cast", self.op("Greater", places, rows), to=ir.DataType.FLOAT)
        real = self.op("Cast", self.real, to=ir.DataType.FLOAT)
        padding = self.op("Sub", self.constant(1.0), self.op("Unsqueeze", real, self.constant([1, 2])))
        hidden = self.op("Mul", self.op("Max", later, padding), self.constant(MASKED))
        return self.op("Add", places, self.constant([OPT_OFFSET])), hidden

    def attention(self, x: Value, bias: Value, name: str) -> Value:
        hidden, heads = self.shape.hidden, self.shape.heads
        split = self.constant([0, 0, heads, hidden // heads])
        query, key, value = (
            self.op("Transpose", self.op("Reshape", self.dense(x, f"{name}.{part}", hidden, hidden), split), perm=order)
            for part, order in (("q_proj", [0, 2, 1, 3]), ("k_proj", [0, 2, 3, 1]), ("v_proj", [0, 2, 1, 3]))
        )
        scores = self.op("Mul", self.op("MatMul", query, key), self.constant(float((hidden // heads) ** -0.5)))
        shares = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        mixed = self.op("Reshape", mixed, self.constant([0, 0, hidden]))
        return self.dense(mixed, f"{name}.out_proj", hidden, hidden)

    def build(self) -> None:
        shape = self.shape
        places, bias = self.mask()
        words = self.random("embed_tokens.weight", shape.vocabulary, shape.hidden)
        table = self.random("embed_positions.weight", shape.positions, shape.hidden)
        x = self.op("Add", self.op("Gather", words, self.ids), self.op("Gather", table, places))
        for n in range(shape.layers):
            name = f"layers.{n}"
            normed = self.layer_norm(x, f"{name}.self_attn_layer_norm")
            x = self.op("Add", x, self.attention(normed, bias, f"{name}.self_attn"))
            inner = self.dense(
                self.layer_norm(x, f"{name}.final_layer_norm"), f"{name}.fc1", shape.hidden, shape.intermediate
            )
            x = self.op("Add", x, self.dense(self.op("Relu", inner), f"{name}.fc2", shape.intermediate, shape.hidden))
        x = self.layer_norm(x, "final_layer_norm")
        logits = self.op("MatMul", x, self.op("Transpose", words, perm=[1, 0]), name="logits")
        self.output(logits, ir.DataType.FLOAT, ["batch", "sequence", shape.vocabulary])


def build_decoder(shape: Shape, graph: Path, weights: Path) -> None:
    """Write a graph of OPT and, beside it, its random weights as external data."""
    decoder = Decoder(shape, weights)
    with decoder.file:
        decoder.build()
    model = ir.Model(decoder.graph, ir_version=8, producer_name="pocketzo")
    graph.write_bytes(ir.to_proto(model).SerializeToString())
