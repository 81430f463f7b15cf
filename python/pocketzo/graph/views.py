"""Fold nodes that only compute a view of a tensor, such as Transpose and Reshape."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.graph.names import is_generated
from pocketzo.graph.weight import Array, Constant, Draft

_STORED: Final[Mapping[int | None, type]] = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}
"""Weights are stored as the type that a node reads, which is exact or rounds as the runtime would."""


def fold_views(draft: Draft) -> None:
    """Replace each node that only computes a view by that view, in subgraphs too.

    Topological order folds chains in one pass.
    """
    for node in tuple(draft.graph.all_nodes()):
        source = draft.constants.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        if source is None or node.outputs[0].is_graph_output():
            continue
        try:
            array = _view(node, source.array)
        except (ValueError, IndexError):  # the runtime will report the invalid node
            array = None
        if array is None:
            continue
        name = str(node.outputs[0].name)
        named = node.op_type == "Identity" and not is_generated(name)
        value = ir.Value(name=name)
        node.outputs[0].replace_all_uses_with(value)
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
        draft.constants[value] = Constant(value, array, source.root, name if named else source.label)


def _view(node: ir.Node, array: Array) -> Array | None:
    """Return the view of an array that a node computes; None if it computes anything else."""
    attributes = node.attributes
    second = _integers(node.inputs[1]) if len(node.inputs) > 1 else None
    match node.op_type:
        case "Identity":
            return array
        case "Cast" if attributes.get_int("to") in _STORED:
            with np.errstate(over="ignore"):  # too large for float16: infinite in the runtime, too
                return array.astype(_STORED[attributes.get_int("to")], copy=False)
        case "Transpose":
            return array.transpose(attributes.get_ints("perm"))
        case "Unsqueeze" if second is not None:
            return np.expand_dims(array, tuple(second.tolist()))
        case "Squeeze" if second is not None:
            return np.squeeze(array, tuple(second.tolist()))
        case "Squeeze" if len(node.inputs) == 1:
            return np.squeeze(array)
        case "Reshape" if second is not None:
            keep = not attributes.get_int("allowzero", 0)
            return array.reshape([array.shape[i] if n == 0 and keep else n for i, n in enumerate(second.tolist())])
        case "Flatten":
            axis = attributes.get_int("axis", 1)
            axis += array.ndim if axis < 0 else 0
            return array.reshape(prod(array.shape[:axis]), -1)
    return None


def _integers(value: ir.Value | None) -> Array | None:
    """Return the elements of an integer constant, such as a shape or axes."""
    tensor = None if value is None else value.const_value
    return tensor.numpy() if tensor is not None and tensor.dtype == ir.DataType.INT64 else None
