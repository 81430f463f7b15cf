"""The rows of a model's embeddings: an id beyond them stops onnxruntime in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pocketzo.errors import NotPrepackableError
from pocketzo.runtime.onnx_proto import all_nodes, onnx_messages

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

_SAME_VALUES: Final = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_ROTARY: Final = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}  # of com.microsoft: which input is the cosines' table


def embedding_rows(bundle: Bundle, graph: Path | None = None) -> dict[str, int]:
    """Return the number of rows that each integer input indexes, for inputs whose embedding is found in the graph.

    An embedding is a stored matrix that is gathered along its first axis by the input. The graph is the bundle's
    ``model.onnx``, or another one over the same weights. Nothing is found without the package protobuf, which some
    installations on phones lack.
    """
    model = _parsed(graph or bundle.model_path)
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
    """Return how many tokens a decoder can read, by its tables of positions; None if none is found."""
    model = _parsed(graph)
    if model is None:
        return None
    sizes = _matrices(bundle, model)
    found = [
        sizes[node.input[_ROTARY[node.op_type]]]
        for node in all_nodes(model.graph)
        if node.domain == "com.microsoft"
        and len(node.input) > _ROTARY.get(node.op_type, len(node.input))
        and node.input[_ROTARY[node.op_type]] in sizes
    ]
    if "position_ids" in (rows := embedding_rows(bundle, graph)):
        found.append(rows["position_ids"])
    return min(found, default=None)


def _parsed(graph: Path) -> Any:
    try:
        return onnx_messages().Model.FromString(graph.read_bytes())
    except (NotPrepackableError, OSError):
        return None


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
