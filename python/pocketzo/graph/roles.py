"""What operators use as weights, and what torch calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pocketzo.graph.weight import Array, Draft, Use

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


ELEMENTWISE = {
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


_BUFFER = re.compile(r"(^|[._])(inv_freq|(cos|sin)_cached?)$")


def is_buffer(draft: Draft, name: str) -> bool:
    """Return whether a tensor is a table that a torch module keeps beside its parameters."""
    return _BUFFER.search(draft.label[name] or "") is not None


def role_of(draft: Draft, name: str, use: Use) -> str | None:
    """Return what a use makes of a tensor, such as "weight" or "bias"; None if it is a mere constant there."""
    node, index = use
    array = draft.tensors[name]
    role = ROLES.get(node.op_type, {}).get(index)
    if role is None or array.ndim == 0 or array.size == 0 or is_buffer(draft, name) or id(node) in draft.constant_nodes:
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
