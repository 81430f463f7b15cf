"""The rows of a model's embeddings: an id beyond them stops onnxruntime in the middle of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pocketzo.runtime.onnx_proto import all_nodes, try_read_graph

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

_SAME_VALUES: Final = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_COUNTED: Final = {"CumSum": 0, "Range": -1}  # the last of n numbers, less n: counted from 1, or from 0
_INTEGERS: Final = {6: np.int32, 7: np.int64}  # of TensorProto
_ROTARY: Final = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # of com.microsoft: which input is the cosines' table


def embedding_rows(bundle: Bundle, graph: Path | None = None) -> dict[str, int]:
    """Return the number of rows that each integer input indexes, for inputs whose embedding is found in the graph.

    An embedding is a stored matrix that is gathered along its first axis by the input. The graph is the bundle's
    ``model.onnx``, or another one over the same weights. Nothing is found without the package protobuf, which some
    installations on phones lack.
    """
    model = try_read_graph(graph or bundle.model_path)
    if model is None:
        return {}
    sizes = _matrices(bundle, model)
    sources = {value.name: value.name for value in model.graph.input}
    rows: dict[str, int] = {}
    for node in all_nodes(model.graph):
        if node.op_type in _SAME_VALUES and node.input[0] in sources:
            sources[node.output[0]] = sources[node.input[0]]
        for table, ids in _lookups(node):
            if table in sizes and ids in sources:
                name = sources[ids]
                rows[name] = min(sizes[table], rows.get(name, sizes[table]))
    return rows


def context_length(bundle: Bundle, graph: Path) -> int | None:
    """Return how many tokens a decoder can read, by its tables of positions; None if none is found.

    A table is a stored matrix that is gathered by positions, or that onnxruntime's operators rotate by. Positions are
    an input, or are counted in the graph, with or without an offset: OPT's begin at row 2.
    """
    model = try_read_graph(graph)
    if model is None:
        return None
    sizes = _matrices(bundle, model)
    integers = {tensor.name: _integer(tensor) for tensor in model.graph.initializer}
    last = {"position_ids": -1}  # by value, its greatest element, less the number of tokens
    found = []
    for node in all_nodes(model.graph):
        first = next(iter(node.input), "")
        if node.op_type == "Constant":
            integers[node.output[0]] = next((_integer(one.t) for one in node.attribute if one.name == "value"), None)
        elif node.op_type in _COUNTED:
            last[node.output[0]] = _COUNTED[node.op_type]
        elif node.op_type in (*_SAME_VALUES, "Slice", "Mul") and first in last:  # a mask is what positions are times
            last[node.output[0]] = last[first]
        elif node.op_type in ("Add", "Sub") and len(shifts := [integers.get(name) for name in node.input]) == 2:
            for value, shift in ((first, shifts[1]), (node.input[1], shifts[0] if node.op_type == "Add" else None)):
                if value in last and shift is not None:
                    last[node.output[0]] = last[value] + (shift if node.op_type == "Add" else -shift)
        found += [sizes[table] - last[ids] - 1 for table, ids in _lookups(node) if table in sizes and ids in last]
        found += [sizes[name] for name in _rotations(node) if name in sizes]
    return min(found, default=None)


def _rotations(node: Any) -> list[str]:
    """Return the table of cosines of a node of com.microsoft."""
    at = _ROTARY.get(node.op_type, len(node.input))
    return [node.input[at]] if node.domain == "com.microsoft" and at < len(node.input) else []


def _integer(tensor: Any) -> int | None:
    """Return the value of a tensor that is one integer."""
    size = math.prod(tensor.dims)
    if size != 1 or tensor.data_type not in _INTEGERS:
        return None
    if tensor.raw_data:
        return int(np.frombuffer(tensor.raw_data, _INTEGERS[tensor.data_type])[0])
    return next(iter([*tensor.int64_data, *tensor.int32_data]), None)


def _matrices(bundle: Bundle, model: Any) -> dict[str, int]:
    """Return the number of rows of each stored matrix, in the file of the weights or in the graph's."""
    inside = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return inside | {tensor.name: tensor.shape[0] for tensor in bundle.tensors if len(tensor.shape) == 2}


def _lookups(node: Any) -> list[tuple[str, str]]:
    """Return the tables of a node, each with the ids of the rows that it reads."""
    if node.op_type == "Gather" and not any(one.name == "axis" and one.i != 0 for one in node.attribute):
        return [(node.input[0], node.input[1])]
    if node.op_type == "GatherBlockQuantized":  # of com.microsoft: rows of blocks, along the first axis
        return [(node.input[0], node.input[1])]
    if node.op_type == "EmbedLayerNormalization":  # of com.microsoft: ids, segments, and the table of each
        inputs = [*node.input, *[""] * 5]
        return [(inputs[2], inputs[0]), (inputs[4], inputs[1])]
    return []
