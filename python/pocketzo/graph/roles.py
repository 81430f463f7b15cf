"""The operator inputs that are weights, and torch's names for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pocketzo.graph.weight import Array, Constant, Draft, Use

ROLES: Final[Mapping[str, Mapping[int, str]]] = {
    "MatMul": {0: "weight", 1: "weight"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "Einsum": {0: "weight", 1: "weight"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"},
    "PRelu": {1: "weight"},
    "LSTM": {1: "weight_ih", 2: "weight_hh", 3: "bias"},
    "GRU": {1: "weight_ih", 2: "weight_hh", 3: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias"},
    "GroupNormalization": {1: "weight", 2: "bias"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "RMSNormalization": {1: "weight"},
    "SimplifiedLayerNormalization": {1: "weight"},
}
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

# Buffers of torch modules, which are not parameters: rotary position embeddings.
_BUFFER = re.compile(r"(^|[._])(inv_freq|(cos|sin)_cached?)$")


def is_buffer(constant: Constant) -> bool:
    """Return whether a tensor is a buffer of a torch module, not a parameter."""
    return _BUFFER.search(constant.label or "") is not None


def role_of(draft: Draft, constant: Constant, use: Use) -> str | None:
    """Return a tensor's role in a node, such as "weight" or "bias"; None if it is only a constant there."""
    node, index = use
    array = constant.array
    role = ROLES.get(node.op_type, {}).get(index)
    if role is None or array.ndim == 0 or array.size == 0 or is_buffer(constant) or node in draft.constant_nodes:
        return None
    match node.op_type:
        case "MatMul" if index == 0 and array.ndim != 2:  # rotary frequencies are multiplied from the left
            return None
        case "Gather" if array.ndim < 2:
            return None
        case "Mul" if array.size == 1 or not is_vector(array):  # else a table of sines, a mask
            return None
        case "Add" if array.size == 1 or (not is_vector(array) and array.min() <= -1e4):  # an attention mask
            return None
    return role


def is_vector(array: Array) -> bool:
    """Return whether an array has one element for each channel, along the last axis."""
    return array.ndim > 0 and array.size == array.shape[-1]
