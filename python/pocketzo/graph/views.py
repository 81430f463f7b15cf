"""Nodes that only look at the elements of a tensor in another way."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from pocketzo.graph.names import is_generated
from pocketzo.graph.proto import replace
from pocketzo.graph.weight import Array, Draft


def fold_views(draft: Draft) -> None:
    """Replace each node that only views a tensor by that view; the graph's order lets chains fold in one pass."""
    outputs = {value.name for value in draft.graph.output}
    integers = _integers(draft.graph)
    nodes = []
    for node in draft.graph.node:
        source = node.input[0] if node.input else ""
        view = None
        if source in draft.tensors and node.output[0] not in outputs:
            view = _view(node, draft.tensors[source], integers)
        if view is None:
            nodes.append(node)
            continue
        name = node.output[0]
        draft.tensors[name] = view
        draft.root[name] = draft.root[source]
        named = node.op_type == "Identity" and not is_generated(name)
        draft.label[name] = name if named else draft.label[source]
    replace(draft.graph.node, nodes)


def _view(node: NodeProto, array: Array, integers: Mapping[str, Array]) -> Array | None:
    """Return what a node makes of an array, if it only looks at the same elements another way."""
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    second = integers.get(node.input[1]) if len(node.input) > 1 else None
    match node.op_type:
        case "Identity":
            return array
        case "Cast" if helper.tensor_dtype_to_np_dtype(attributes["to"]) == array.dtype:
            return array
        case "Transpose":
            return array.transpose(attributes.get("perm"))
        case "Unsqueeze" if second is not None:
            return np.expand_dims(array, tuple(second.tolist()))
        case "Squeeze" if second is not None:
            return np.squeeze(array, tuple(second.tolist()))
        case "Squeeze" if len(node.input) == 1:
            return np.squeeze(array)
        case "Reshape" if second is not None:
            keep = not attributes.get("allowzero", 0)
            return array.reshape([array.shape[i] if n == 0 and keep else n for i, n in enumerate(second.tolist())])
        case "Flatten":
            axis = attributes.get("axis", 1) % (array.ndim + 1)
            return array.reshape(prod(array.shape[:axis]), -1)
    return None


def _integers(graph: GraphProto) -> dict[str, Array]:
    """Return the integer constants of a graph, which shapes and axes are made of."""
    integers = {}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.INT64:
            integers[tensor.name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name == "value" and attribute.t.data_type == TensorProto.INT64:
                integers[node.output[0]] = numpy_helper.to_array(attribute.t)
            elif attribute.name == "value_ints":
                integers[node.output[0]] = np.array(attribute.ints, np.int64)
    return integers
