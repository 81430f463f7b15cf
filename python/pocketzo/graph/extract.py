"""Rewrite an ONNX graph so that its nodes read their weights as they are stored.

A write to a weight is seen by the runtime only if the node that uses it reads the stored bytes. What exporters leave
between the two is undone here:

1. views of a weight (Identity, Transpose, Reshape, ...) are folded into what is stored;
2. a matrix that was stored twice, perhaps once transposed, becomes one again (a tied embedding and output projection);
3. weights that were merged only because all their elements had one value become separate again;
4. a transposed use of a weight that is also used plainly becomes ``Gemm(transB=1)``, which reads it as it is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from pocketzo.errors import BundleError
from pocketzo.graph.external import ExternalFiles
from pocketzo.graph.folded import find_folded
from pocketzo.graph.names import is_generated, name_weights, title_of
from pocketzo.graph.proto import FLOATS, all_nodes, replace, subgraphs
from pocketzo.graph.tied import connect, settle, unify_equal_matrices
from pocketzo.graph.views import fold_views
from pocketzo.graph.weight import Draft, Use, Weight
from pocketzo.safetensors import DTYPES, Entry

INLINE_BYTES = 1024  # constants that are no weights stay in the graph up to this size, as in onnx and onnxruntime


def extract_weights(model: ModelProto, folder: Path) -> list[Weight]:
    """Take the weights out of a graph, and rewrite it so that each node reads its weights as they are returned.

    Parameters
    ----------
    model : ModelProto
        As :func:`read_model` returns it; changed in place. :func:`point_to_weights` completes it.
    folder : Path
        Where the files of external data are.

    Returns
    -------
    list of Weight
        With unique, readable names.

    Raises
    ------
    BundleError
        If external data is missing or cut off, or a weight is not of type float32.
    DeadWeightError
        If a tied weight is used in ways that cannot read one stored tensor.
    """
    draft = Draft(model.graph)
    _collect(draft, ExternalFiles(folder), model.graph)
    draft.root = {name: name for name in draft.tensors}
    draft.label = {name: None if is_generated(name) else name for name in draft.tensors}
    unify_equal_matrices(draft)
    fold_views(draft)
    draft.uses = {name: [] for name in draft.tensors}
    draft.nodes = list(all_nodes(draft.graph))
    for node in draft.nodes:
        for index, name in enumerate(node.input):
            draft.readers[name].append(node)
            if name in draft.tensors:
                draft.uses[name].append(Use(node, index))

    families: defaultdict[str, list[str]] = defaultdict(list)
    for name, uses in draft.uses.items():
        if uses:
            families[draft.root[name]].append(name)
    dead = find_folded(draft)
    weights: list[Weight] = []
    for root, names in families.items():
        members = settle(draft, names)
        for weight in members:
            weight.dead = dead.get(root)
            weight.parameter = weight.parameter or weight.dead is not None
            if weight.parameter and weight.array.dtype != np.float32:
                raise BundleError(
                    f"weight {weight.name!r} of node {title_of((weight.uses + weight.transposed)[0].node)} is "
                    f"{weight.array.dtype.name}; this version needs float32, so export the model in float32"
                )
        weights += members
    weights = _keep_small_constants(draft, weights)
    name_weights(draft, weights)
    connect(draft, weights)
    produced = {output for node in draft.graph.node for output in node.output}
    replace(draft.graph.value_info, [value for value in draft.graph.value_info if value.name in produced])
    return weights + draft.large


def point_to_weights(model: ModelProto, weights: Iterable[Weight], location: str, entries: Mapping[str, Entry]) -> None:
    """Declare the weights in the graph as external data.

    Parameters
    ----------
    model : ModelProto
        As :func:`extract_weights` left it; changed in place.
    weights : iterable of Weight
    location : str
        Name of the weights' file, relative to the graph's.
    entries : mapping of str to Entry
        Where each lies in that file.
    """
    for weight in weights:
        entry = entries[weight.name]
        tensor = model.graph.initializer.add(
            name=weight.name,
            dims=weight.array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(weight.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in ("location", location), ("offset", entry.start), ("length", entry.stop - entry.start):
            tensor.external_data.add(key=key, value=str(value))


def _collect(draft: Draft, files: ExternalFiles, graph: GraphProto) -> None:
    """Take all floating-point tensors out of a graph and its subgraphs; make the others part of it."""
    outputs = {value.name for value in graph.output}
    kept = []
    for tensor in graph.initializer:
        array = files.open(tensor)
        if tensor.name in outputs or tensor.name in draft.tensors:
            kept.append(numpy_helper.from_array(array, tensor.name))
        elif tensor.data_type in FLOATS:
            draft.tensors[tensor.name] = array
        elif array.nbytes > INLINE_BYTES and array.dtype.name in DTYPES.values() and graph is draft.graph:
            draft.large.append(Weight(tensor.name, array))
        elif tensor.data_location == TensorProto.EXTERNAL:
            kept.append(numpy_helper.from_array(array, tensor.name))
        else:
            kept.append(tensor)
    replace(graph.initializer, kept)

    nodes = []
    for node in graph.node:
        value = next((item.t for item in node.attribute if item.name == "value"), None)
        name = node.output[0] if node.output else ""
        if (
            node.op_type == "Constant"
            and value is not None
            and value.data_type in FLOATS
            and prod(value.dims) > 1
            and name not in outputs | draft.tensors.keys()
        ):
            draft.tensors[name] = files.open(value)
        else:
            nodes.append(node)
    if len(nodes) < len(graph.node):
        replace(graph.node, nodes)
    for subgraph in subgraphs(graph.node):
        _collect(draft, files, subgraph)


def _keep_small_constants(draft: Draft, weights: list[Weight]) -> list[Weight]:
    """Put constants that are no weights back into the graph, the large ones excepted."""
    stored = []
    for weight in weights:
        if weight.parameter or (weight.array.nbytes > INLINE_BYTES and weight.array.dtype.name in DTYPES.values()):
            stored.append(weight)
        else:
            draft.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight.array), weight.name))
            for node, index in weight.uses:
                node.input[index] = weight.name
    return stored
