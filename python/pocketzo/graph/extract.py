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
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pocketzo.formats.safetensors import DTYPES, Entry
from pocketzo.graph.buffers import find_buffers
from pocketzo.graph.external import ExternalFiles
from pocketzo.graph.folded import find_folded
from pocketzo.graph.loss import RESERVED
from pocketzo.graph.names import is_generated, name_weights, unique, value_names
from pocketzo.graph.quantised import find_quantised
from pocketzo.graph.roles import why_no_weight
from pocketzo.graph.tied import connect, settle, unify_branches, unify_equal_matrices
from pocketzo.graph.views import fold_views
from pocketzo.graph.weight import Array, Constant, Draft, Weight

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
        What the weights' file will hold, with unique, readable names, and then the floating-point constants that the
        graph keeps or that nothing reads, which are `inline`.

    Raises
    ------
    BundleError
        If external data is missing or cut off.
    """
    draft = _collect(model.graph, ExternalFiles(folder))
    unify_equal_matrices(draft)
    unify_branches(draft)
    fold_views(draft)
    _classify(draft)
    folded = find_folded(draft)
    families: defaultdict[ir.Value, list[Constant]] = defaultdict(list)
    for constant in draft.constants.values():
        families[constant.root].append(constant)
    taken = value_names(draft.graph) | set(RESERVED)
    weights: list[Weight] = []
    for root, family in families.items():
        used = [constant for constant in family if constant.value.uses()]
        if not used:
            draft.inline.append(Weight(str(root.name), draft.constants[root].array, inline=True, frozen="unused"))
        for weight in settle(draft, used):
            _freeze(draft, weight, folded.get(root))
            if (weight.parameter and weight.frozen is None) or _is_large(weight.array):
                weights.append(weight)
            else:
                _put_back(draft, weight, taken)
    name_weights(weights, taken)
    connect(draft, weights)
    return weights + draft.large + draft.inline


def _classify(draft: Draft) -> None:
    """Note which uses of constants are no uses of weights, and why."""
    find_quantised(draft)
    find_buffers(draft)
    for constant in draft.constants.values():
        for use in constant.value.uses():
            reason = why_no_weight(constant.array, use)
            if reason is not None:
                draft.not_weights.setdefault(use, reason)


def _freeze(draft: Draft, weight: Weight, folded_by: str | None) -> None:
    """Give a weight the reason why it cannot be trained, if there is one."""
    uses = weight.uses + weight.transposed
    if folded_by is not None and any(node in draft.constant_nodes for node, _ in uses):
        weight.parameter = True
        weight.frozen = f"folded: the runtime computes node {folded_by} only once"
    elif not weight.parameter:
        reasons = sorted(draft.not_weights.get(use, f"constant: read by {use[0].op_type}") for use in uses)
        weight.frozen = min(reasons, key=lambda reason: reason.startswith("constant"))


def point_to_weights(model: ir.Model, location: str, entries: Mapping[str, Entry]) -> None:
    """Declare the weights in the graph as external data; it may have lost some.

    Parameters
    ----------
    model : Model
        As :func:`extract_weights` left it; changed in place.
    location : str
        Name of the weights' file, relative to the graph's.
    entries : mapping of str to Entry
        Where each is in that file.
    """
    for name, entry in entries.items():
        if name not in model.graph.initializers:
            continue
        value = model.graph.initializers.pop(name)  # added again at the end, in the order of the file
        value.const_value = ir.ExternalTensor(
            location,
            entry.start,
            entry.stop - entry.start,
            ir.DataType.from_numpy(np.dtype(DTYPES[entry.dtype])),
            shape=ir.Shape(entry.shape),
            name=name,
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
                if tensor.dtype.is_floating_point():
                    draft.inline.append(Weight(name, array, inline=True, frozen="output: an output of the graph"))
            elif tensor.dtype.is_floating_point() and tensor.dtype.bitwidth < 8:
                draft.inline.append(Weight(name, array, inline=True, frozen=f"type: {array.dtype.name}"))
            elif tensor.dtype.is_floating_point():
                scope.initializers.pop(name)
                draft.constants[value] = Constant(value, array, value, None if is_generated(name) else name)
            elif _is_large(array):
                value.const_value = None
                draft.large.append(Weight(name, array))
    return draft


def _is_large(array: Array) -> bool:
    return array.nbytes > _INLINE_BYTES and array.dtype.name in DTYPES.values()


def _put_back(draft: Draft, weight: Weight, taken: set[str]) -> None:
    """Put a constant back into the graph."""
    weight.name = unique(weight.name, taken)
    value = ir.val(weight.name, const_value=ir.tensor(weight.array))
    draft.graph.initializers.add(value)
    for node, index in weight.uses:
        node.replace_input_with(index, value)
    weight.inline = True
    draft.inline.append(weight)
