"""The rows of a model's embeddings: an id beyond them stops onnxruntime in the middle of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pocketzo.errors import NotPrepackableError
from pocketzo.runtime.onnx_proto import read_graph

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

_SAME_VALUES: Final = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def embedding_rows(bundle: Bundle) -> dict[str, int]:
    """Return the number of rows that each integer input indexes, for inputs whose embedding is found in the graph.

    An embedding is a stored matrix that is gathered along its first axis by the input. Nothing is found without the
    package protobuf, which some installations on phones lack.
    """
    try:
        model = read_graph(bundle.model_path)
    except (NotPrepackableError, OSError):
        return {}
    sizes = {tensor.name: tensor.shape[0] for tensor in bundle.tensors if len(tensor.shape) == 2}
    sources = {value.name: value.name for value in bundle.inputs}
    rows: dict[str, int] = {}
    for node in model.graph.node:  # in topological order
        if node.op_type in _SAME_VALUES and node.input[0] in sources:
            sources[node.output[0]] = sources[node.input[0]]
        for table, ids in _lookups(node):
            if table in sizes and ids in sources:
                name = sources[ids]
                rows[name] = min(sizes[table], rows.get(name, sizes[table]))
    return rows


def _lookups(node: Any) -> list[tuple[str, str]]:
    """Return the tables of a node, each with the ids of the rows that it reads."""
    if node.op_type == "Gather" and not any(one.name == "axis" and one.i != 0 for one in node.attribute):
        return [(node.input[0], node.input[1])]
    if node.op_type == "EmbedLayerNormalization":  # of com.microsoft: ids, segments, and the table of each
        inputs = [*node.input, *[""] * 5]
        return [(inputs[2], inputs[0]), (inputs[4], inputs[1])]
    return []
