"""Rewrite an ONNX graph so that its nodes read their weights as they are stored.

The runtime sees a write to a weight only if the node that uses the weight reads the stored bytes. This module removes
the indirections that exporters add:

1. views of a weight (Identity, Transpose, Reshape, ...) are folded into the stored tensor;
2. a matrix that was stored twice, possibly once transposed, is stored once (a tied embedding and output projection);
3. weights that were merged only because all their elements had one value are separated;
4. if a weight is used both directly and transposed, the transposed use becomes ``Gemm(transB=1)``, which reads the
   stored bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.safetensors import DTYPES, Entry
from pocketzo.graph.external import ExternalFiles
from pocketzo.graph.folded import find_folded
from pocketzo.graph.loss import RESERVED
from pocketzo.graph.names import is_generated, name_weights, title_of, unique, value_names
from pocketzo.graph.tied import connect, settle, unify_equal_matrices
from pocketzo.graph.views import fold_views
from pocketzo.graph.weight import Array, Constant, Draft, Weight

_FLOATS: Final = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_INLINE_BYTES = 1024  # constants other than weights stay in the graph up to this size, as in onnx and onnxruntime


def extract_weights(model: ir.Model, folder: Path) -> list[Weight]:
    """Remove the weights from a graph, and rewrite it so that each node reads its weights in the returned layout.

    Parameters
    ----------
    model : Model
        As :func:`read_model` returns it; changed in place. Its weights become initializers without elements, until
        :func:`point_to_weights` completes them.
    folder : Path
        The folder of the external data files.

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
    draft = _collect(model.graph, ExternalFiles(folder))
    unify_equal_matrices(draft)
    fold_views(draft)
    families: defaultdict[ir.Value, list[Constant]] = defaultdict(list)
    for constant in draft.constants.values():
        if constant.value.uses():
            families[constant.root].append(constant)
    folded = find_folded(draft)
    taken = value_names(draft.graph) | set(RESERVED)
    weights: list[Weight] = []
    for root, family in families.items():
        for weight in settle(draft, family):
            weight.folded_by = folded.get(root)
            weight.parameter = weight.parameter or weight.folded_by is not None
            if weight.parameter and weight.array.dtype != np.float32:
                raise BundleError(
                    f"weight {weight.name!r} of node {title_of((weight.uses + weight.transposed)[0][0])} is "
                    f"{weight.array.dtype.name}; this version needs float32, so export the model in float32"
                )
            if weight.parameter or _is_large(weight.array):
                weights.append(weight)
            else:
                _put_back(draft.graph, weight, taken)
    name_weights(weights, taken)
    connect(draft, weights)
    return weights + draft.large


def point_to_weights(model: ir.Model, weights: Iterable[Weight], location: str, entries: Mapping[str, Entry]) -> None:
    """Declare the weights in the graph as external data.

    Parameters
    ----------
    model : Model
        As :func:`extract_weights` left it; changed in place.
    weights : iterable of Weight
    location : str
        Name of the weights' file, relative to the graph's.
    entries : mapping of str to Entry
        Where each is in that file.
    """
    for weight in weights:
        entry = entries[weight.name]
        value = model.graph.initializers.pop(weight.name)  # added again at the end, in the order of the weights
        value.const_value = ir.ExternalTensor(
            location,
            entry.start,
            entry.stop - entry.start,
            ir.DataType.from_numpy(weight.dtype),
            shape=ir.Shape(weight.array.shape),
            name=weight.name,
        )
        model.graph.initializers.add(value)


def _collect(graph: ir.Graph, files: ExternalFiles) -> Draft:
    """Remove floating-point constants and the elements of other large constants from a graph; embed the rest."""
    draft = Draft(graph)
    for scope in (graph, *graph.subgraphs()):
        for value in tuple(scope.initializers.values()):
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.StringTensor):
                continue
            name = str(value.name)
            array = files.read(tensor)
            value.const_value = ir.tensor(array, tensor.dtype, name)
            if value.is_graph_output():
                continue
            if tensor.dtype in _FLOATS:
                scope.initializers.pop(name)
                draft.constants[value] = Constant(value, array, value, None if is_generated(name) else name)
            elif _is_large(array):
                value.const_value = None
                draft.large.append(Weight(name, array))
    return draft


def _is_large(array: Array) -> bool:
    return array.nbytes > _INLINE_BYTES and array.dtype.name in DTYPES.values()


def _put_back(graph: ir.Graph, weight: Weight, taken: set[str]) -> None:
    """Put a constant that is not a weight back into the graph."""
    value = ir.val(unique(weight.name, taken), const_value=ir.tensor(weight.array))
    graph.initializers.add(value)
    for node, index in weight.uses:
        node.replace_input_with(index, value)
