"""Weights that onnxruntime does not take for constants, so that it prepacks the others only.

It prepacks, and folds, what it takes for constant: initializers that are no inputs of the graph. An initializer that is
an input, too, could be given by any run; it is read where it is. Optimisations that fuse operators need constants,
mostly vectors; what is prepacked has at least two dimensions.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pocketzo.errors import NotPrepackableError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.onnx_proto import all_nodes, declare, read_graph
from pocketzo.runtime.outputs import is_quantised


def has_constants(bundle: Bundle) -> bool:
    """Whether a bundle's graph may multiply by something that is not trainable."""
    frozen = any(not tensor.trainable and len(tensor.shape) > 1 for tensor in bundle.tensors)
    return not bundle.is_fp16 and (frozen or is_quantised(bundle))


def model_with_variables(bundle: Bundle, graph: Path | None = None) -> bytes:
    """Return the graph's file, with trainable weights declared as inputs.

    The graph is the bundle's ``model.onnx``, or another one over the same weights.

    Raises
    ------
    NotPrepackableError
        The package protobuf is not installed.
    """
    model = read_graph(graph or bundle.model_path)
    declare_inputs(model.graph, bundle)
    serialized: bytes = model.SerializeToString()
    return serialized


def declare_inputs(graph: Any, bundle: Bundle, without: Collection[str] = ()) -> None:
    """Declare trainable weights that may be prepacked as inputs of a graph, in place, except for some."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    read = {name for node in all_nodes(graph) if node.op_type != "Gather" for name in node.input}
    for spec in bundle.tensors:
        name = spec.name
        if not spec.trainable or len(spec.shape) < 2 or name in without or name in inputs or name not in read:
            continue
        if name not in initializers:
            raise NotPrepackableError(f"{name} belongs to a subgraph")
        declare(graph.input, name, initializers[name].data_type, spec.shape)
