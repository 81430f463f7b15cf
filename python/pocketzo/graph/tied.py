"""Find the tensors that are one tied weight, and connect the nodes that read it."""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.formats.bundle import FLOATS
from pocketzo.graph.build import Builder
from pocketzo.graph.names import scope_of, title_of, value_names
from pocketzo.graph.roles import role_of
from pocketzo.graph.weight import Array, Constant, Draft, Use, Weight

_FLAGGED: Final = ("Gemm", "FusedMatMul")
"""Operators that read either factor transposed if their attribute transA or transB says so."""


def unify_equal_matrices(draft: Draft) -> None:
    """Make equal matrices share one buffer, also if one is the transpose of the other.

    Exporters that fold the transpose of a tied weight store it twice. Both copies have the same diagonal, so few
    matrices need a full comparison. Matrices whose elements all have one value are skipped: their equality is chance.
    """
    families: defaultdict[tuple[object, ...], list[Constant]] = defaultdict(list)
    for constant in draft.constants.values():
        array = constant.array
        if array.ndim == 2 and min(array.shape) > 1:
            families[array.dtype, frozenset(array.shape), array.diagonal().tobytes()].append(constant)
    for family in families.values():
        originals: list[Constant] = []
        for constant in family if len(family) > 1 else []:
            views = ((original, view) for original in originals for view in (original.array, original.array.T))
            equal = next((pair for pair in views if np.array_equal(pair[1], constant.array)), None)
            if equal is not None:
                constant.root = equal[0].value
                constant.array = equal[1]
            elif not _is_constant(constant.array):
                originals.append(constant)


def unify_branches(draft: Draft) -> None:
    """Make equal tensors in the branches of an If share one buffer.

    A decoder that was merged has the same parameters in both branches. Tensors whose elements all have one value are
    left alone, as above.
    """
    branches = {
        graph: node
        for node in draft.graph.all_nodes()
        if node.op_type == "If"
        for graph in (attribute.as_graph() for attribute in node.attributes.values())
    }
    found: dict[tuple[object, ...], tuple[Constant, ir.Graph]] = {}
    for constant in draft.constants.values() if branches else ():
        array = constant.array
        graphs = {node.graph for node, _ in constant.value.uses()}
        graph = next(iter(graphs), None)
        if len(graphs) != 1 or graph not in branches or array.size < 2 or constant.root is not constant.value:
            continue
        first, other = found.setdefault(
            (branches[graph], array.dtype, array.shape, sha256(array.tobytes()).digest()), (constant, graph)
        )
        if other is not graph and not _is_constant(array):
            constant.root, constant.array = first.value, first.array


def settle(draft: Draft, family: list[Constant]) -> list[Weight]:
    """Decide which tensors to store for the views of one root: one if it is tied, else one for each parameter."""
    roles: list[tuple[Constant, Use, str | None]] = [
        (constant, use, role_of(draft, use)) for constant in family for use in constant.value.uses()
    ]
    if not any(role for _, _, role in roles):
        return _separate(family)
    if family[0].array.dtype.name not in FLOATS:
        return _separate(family, f"type: {family[0].array.dtype.name}, not {' or '.join(FLOATS)}")
    if len(roles) > 1 and _is_constant(family[0].array):
        return _split(roles)

    for stored in family:
        array = stored.array
        others = [constant for constant in family if not _same_view(constant.array, array)]
        if not others or (
            array.ndim == 2
            and all(
                _same_view(constant.array, array.T) and all(_reads_transposed(use) for use in constant.value.uses())
                for constant in others
            )
        ):
            return [
                Weight(
                    next((constant.label for constant in family if constant.label), str(stored.root.name)),
                    array,
                    parameter=True,
                    uses=[use for constant in family if constant not in others for use in constant.value.uses()],
                    transposed=[use for constant in others for use in constant.value.uses()],
                )
            ]
    other = next(constant for constant in family[1:] if not _same_view(constant.array, family[0].array))
    node, _ = next(iter(other.value.uses()))
    return _separate(family, f"layout: node {title_of(node)} reads another form of it, which cannot share its memory")


def _separate(family: list[Constant], frozen: str | None = None) -> list[Weight]:
    """Return a tensor to store for each form, of which the first counts; weights, if there is a reason to freeze."""
    return [
        Weight(
            one.label or str(one.value.name),
            one.array,
            parameter=frozen is not None,
            frozen=frozen,
            counted=index == 0,
            uses=list(one.value.uses()),
        )
        for index, one in enumerate(family)
    ]


def _split(roles: list[tuple[Constant, Use, str | None]]) -> list[Weight]:
    """Give each parameter its own copy of a tensor that is shared because all its elements had one value.

    The old torch exporter left an Identity node with the name of each parameter. The new one left nothing, but
    names the module of each node: uses by one module are one parameter.
    """
    scopes: defaultdict[ir.Value, set[str | None]] = defaultdict(set)
    for constant, (node, _), role in roles:
        if role:
            scopes[constant.value].add(scope_of(node))
    weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
    for constant, use, role in roles:
        label, array, scope = constant.label, constant.array, scope_of(use[0])
        if role is None:
            key = f"{constant.value.name}.constant"
        elif label and len(scopes[constant.value]) == 1 and scope:
            key = label
        elif scope:
            key = f"{scope}.{role}"
        elif label and (label, array.shape) not in weights:
            key = label
        else:
            key = f"{title_of(use[0], bare=True)}.{role}"
        weight = weights.setdefault(
            (key, array.shape), Weight(key, array, parameter=role is not None, counted=role is not None)
        )
        weight.uses.append(use)
    return list(weights.values())


def _reads_transposed(use: Use) -> bool:
    node, index = use
    return (node.op_type, index) == ("MatMul", 1) or (node.op_type in _FLAGGED and index < 2)


def connect(draft: Draft, weights: list[Weight]) -> None:
    """Connect each node to its weights by name; a transposed use is rewritten to read the stored layout."""
    taken = value_names(draft.graph) | {weight.name for weight in weights}
    for weight in weights:
        value = ir.val(weight.name, ir.DataType.from_numpy(weight.array.dtype), weight.array.shape)
        draft.graph.initializers.add(value)
        for node, index in weight.uses:
            node.replace_input_with(index, value)
        for node, index in weight.transposed:
            node.replace_input_with(index, value)
            if node.op_type in _FLAGGED:
                flag = "transA" if index == 0 else "transB"
                node.attributes.add(ir.AttrInt64(flag, 1 - node.attributes.get_int(flag, 0)))
            else:
                _multiply_transposed(node, weight.array.shape, taken)


def _multiply_transposed(node: ir.Node, shape: tuple[int, ...], taken: set[str]) -> None:
    """Compute X @ W.T by Gemm, which reads W as it is stored; X of any rank is reshaped, as Gemm takes two axes."""
    x, matrix = node.inputs
    (output,) = node.outputs
    classes, width = shape
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    build = Builder(graph, f"{output.name}/", before=node, taken=taken)
    product = build.op("Gemm", build.op("Reshape", x, build.constant([-1, width])), matrix, transB=1)
    batch = build.op("Slice", build.op("Shape", x), build.constant([0]), build.constant([-1]))
    result = build.op("Reshape", product, build.op("Concat", batch, build.constant([classes]), axis=0))
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], [output], [result])


def _same_view(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _is_constant(array: Array) -> bool:
    """Return whether all elements have one value; the first few elements decide for most arrays."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    return bool((flat[:64] == flat[0]).all() and (flat == flat[0]).all())
