"""The operator inputs that are weights, and torch's names for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.graph.weight import Array, Draft, Use

_NORM: Final = {1: "weight", 2: "bias"}
_RECURRENT: Final = {1: "weight_ih", 2: "weight_hh", 3: "bias"}

_STANDARD: Final = {
    "MatMul": {0: "weight", 1: "weight"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "Einsum": {0: "weight", 1: "weight"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "DeformConv": {1: "weight", 3: "bias"},
    "Gather": {0: "weight"},
    "GatherND": {0: "weight"},
    "Slice": {0: "weight"},
    "Expand": {0: "weight"},
    "Tile": {0: "weight"},
    "Concat": dict.fromkeys(range(8), "weight"),
    "Where": {1: "weight", 2: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"},
    "PRelu": {1: "weight"},
    "RNN": _RECURRENT,
    "LSTM": _RECURRENT | {7: "weight_peephole"},
    "GRU": _RECURRENT,
    "BatchNormalization": _NORM,
    "GroupNormalization": _NORM,
    "InstanceNormalization": _NORM,
    "LayerNormalization": _NORM,
    "RMSNormalization": {1: "weight"},
    "SimplifiedLayerNormalization": {1: "weight"},
    "Attention": {3: "position_bias"},
}
_MICROSOFT: Final = {
    "Attention": {1: "weight", 2: "bias", 5: "position_bias"},
    "MultiHeadAttention": {3: "bias", 5: "position_bias"},
    "GroupQueryAttention": {10: "position_bias", 11: "head_sink"},
    "FusedMatMul": {0: "weight", 1: "weight"},
    "TransposeMatMul": {0: "weight", 1: "weight"},
    "FusedGemm": {0: "weight", 1: "weight", 2: "bias"},
    "FusedConv": {1: "weight", 2: "bias"},
    "BiasGelu": {1: "bias"},
    "FastGelu": {1: "bias"},
    "SkipLayerNormalization": {1: "position", 2: "weight", 3: "bias", 4: "skip_bias"},
    "SkipSimplifiedLayerNormalization": {1: "position", 2: "weight", 3: "skip_bias"},
    "EmbedLayerNormalization": {
        2: "word_embeddings.weight",
        3: "position_embeddings.weight",
        4: "token_type_embeddings.weight",
        5: "weight",
        6: "bias",
    },
    "WordConvEmbedding": {1: "conv.weight", 2: "conv.bias", 3: "embedding.weight"},
    "CausalConvWithState": {1: "weight", 2: "bias"},
    "MoE": {2: "fc1.weight", 3: "fc1.bias", 4: "fc2.weight", 5: "fc2.bias"},
    # Quantised operators: their biases are added as floats.
    "MatMulNBits": {5: "bias"},
    "DynamicQuantizeMatMul": {4: "bias"},
    "MatMulIntegerToFloat": {6: "bias"},
    "QAttention": {2: "bias"},
    "DynamicQuantizeLSTM": {3: "bias"},
}
ROLES: Final[Mapping[str, Mapping[str, Mapping[int, str]]]] = {"": _STANDARD, "com.microsoft": _MICROSOFT}
"""By domain and operator: the inputs that are weights if they are constants, and torch's names for them.

tests/graph/test_operators.py checks for each that onnxruntime sees what is written to it.
"""
_ADDED: Final = {"bias", "position_bias"}
"""Roles in which a table may also be an attention mask."""
_SELECTING: Final = {"Concat", "Expand", "Gather", "GatherND", "Slice", "Tile", "Where"}
_ADDED_MASK: Final = -1e4
_MASK: Final = -1e30  # no weight reaches this; a bias may hold -1e4, which suppresses a class

ELEMENTWISE: Final = {
    "Abs",
    "Add",
    "Cast",
    "Div",
    "Exp",
    "Mul",
    "Neg",
    "Pow",
    "Reciprocal",
    "Sigmoid",
    "Softplus",
    "Sqrt",
    "Sub",
}


def roles_of(node: ir.Node) -> Mapping[int, str]:
    """Return the row of :data:`ROLES` of a node; empty for operators without weights."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return ROLES.get(domain, {}).get(node.op_type, {})


def role_of(draft: Draft, use: Use) -> str | None:
    """Return a tensor's role in a node, such as "weight" or "bias"; None if it is only a constant there."""
    node, index = use
    return None if use in draft.not_weights or node in draft.constant_nodes else roles_of(node).get(index)


def why_no_weight(array: Array, use: Use) -> str | None:
    """Return why a tensor is only a constant in a node, as its shape and elements show; None if it is a weight."""
    node, index = use
    role = roles_of(node).get(index)
    if array.size <= 1 and not _is_single_weight(node, role, array):
        return "constant: a single number"
    if role is None:
        return f"constant: read by {node.op_type}"
    match node.op_type:
        case "MatMul" if index == 0 and array.ndim != 2:  # rotary frequencies are multiplied from the left
            return "constant: multiplied from the left"
        case "Gather" | "GatherND" | "Slice" if array.ndim < 2:
            return f"constant: a list that {node.op_type} reads"
        case "Mul" if not is_vector(array):
            return "constant: a factor for each element"
        case "Where" if not is_vector(array):
            return "constant: one of two choices"
        case "Concat" | "Where" | "Expand" | "Tile" if (array == array.flat[0]).all() or np.isin(
            array, (-1, 0, 1)
        ).all():
            return "constant: a fill value"
    if role in _ADDED or node.op_type in _SELECTING:
        limit = _ADDED_MASK if role in _ADDED and not is_vector(array) else _MASK
        if float(array.min()) <= limit:
            return "buffer: a mask"
    return None


def _is_single_weight(node: ir.Node, role: str | None, array: Array) -> bool:
    """Return whether one element is a weight: of an operator, or a bias behind a product with one column."""
    if role is None or array.size == 0 or array.ndim == 0:
        return False
    if node.op_type != "Add":
        return node.op_type not in {"Mul", "Concat", "Where", "Expand", "Tile"}
    for value in node.inputs:
        product = None if value is None else value.producer()
        if product is not None and product.op_type in ("MatMul", "FusedMatMul") and array.ndim == 1:
            shape = product.inputs[1].shape if product.inputs[1] is not None else None
            if shape is not None and shape[-1] == 1:
                return True
    return False


def is_vector(array: Array) -> bool:
    """Return whether an array has one element for each channel, along one axis."""
    return array.ndim > 0 and array.size == max(array.shape)
