"""Which tensors are one weight, and how the nodes that use it read it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from pocketzo.errors import DeadWeightError
from pocketzo.graph.names import scope_of, title_of
from pocketzo.graph.proto import replace
from pocketzo.graph.roles import role_of
from pocketzo.graph.weight import Array, Draft, Use, Weight


def unify_equal_matrices(draft: Draft) -> None:
    """Let equal matrices share their memory, also where one is the other transposed.

    Folding the transpose of a tied weight, exporters store it twice. A diagonal is the same for both, so that few
    matrices need be compared whole. Equality of matrices whose elements all have one value is coincidence.
    """
    families: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, array in draft.tensors.items():
        if array.ndim == 2 and min(array.shape) > 1:
            families[array.dtype, frozenset(array.shape), array.diagonal().tobytes()].append(name)
    for names in families.values():
        originals: list[str] = []
        for name in names if len(names) > 1 else []:
            array = draft.tensors[name]
            views = ((original, view) for original in originals for view in _both_ways(draft.tensors[original]))
            original, view = next((pair for pair in views if np.array_equal(pair[1], array)), (None, array))
            if original is not None:
                draft.root[name] = original
                draft.tensors[name] = view
            elif not _is_constant(array):
                originals.append(name)


def settle(draft: Draft, names: list[str]) -> list[Weight]:
    """Decide which tensors to store for the views of one root: one if it is tied, else one for each parameter."""
    roles = [(name, use, role_of(draft, name, use)) for name in names for use in draft.uses[name]]
    if not any(role for _, _, role in roles):
        return [Weight(name, draft.tensors[name], uses=draft.uses[name]) for name in names]
    if len(roles) > 1 and _is_constant(draft.tensors[names[0]]):
        return _split(draft, roles)

    for stored in names:
        array = draft.tensors[stored]
        others = [name for name in names if not _same_view(draft.tensors[name], array)]
        if not others or (
            array.ndim == 2
            and all(
                _same_view(draft.tensors[name], array.T)
                and all(_reads_transposed(draft, use) for use in draft.uses[name])
                for name in others
            )
        ):
            return [
                Weight(
                    next((label for name in names if (label := draft.label[name])), draft.root[stored]),
                    array,
                    parameter=True,
                    uses=[use for name in names if name not in others for use in draft.uses[name]],
                    transposed=[use for name in others for use in draft.uses[name]],
                )
            ]
    name = next(name for name in names[1:] if not _same_view(draft.tensors[name], draft.tensors[names[0]]))
    raise DeadWeightError(
        f"weight {draft.label[name] or draft.root[name]!r} is used as it is stored and, by node "
        f"{title_of(draft.uses[name][0].node)}, in another form that cannot read the same memory"
    )


def _split(draft: Draft, roles: list[tuple[str, Use, str | None]]) -> list[Weight]:
    """Give each parameter its own copy of a tensor that is shared because all its elements had one value.

    The old torch exporter left an Identity node with the name of each parameter. The new one left nothing, but
    tells from which module each node comes: uses by one module are one parameter.
    """
    scopes = {
        name: {scope_of(use.node) for other, use, role in roles if other == name and role} for name, _, _ in roles
    }
    weights: dict[tuple[str, tuple[int, ...]], Weight] = {}
    for name, use, role in roles:
        label = draft.label[name]
        array = draft.tensors[name]
        if role is None:
            key = f"{name}.constant"
        elif len(scopes[name]) == 1 and None not in scopes[name] and label:
            key = label
        elif scope := scope_of(use.node):
            key = f"{scope}.{role}"
        else:
            key = label if label and (label, array.shape) not in weights else f"{title_of(use.node, bare=True)}.{role}"
        weight = weights.setdefault((key, array.shape), Weight(key, array, parameter=role is not None))
        weight.uses.append(use)
    return list(weights.values())


def _reads_transposed(draft: Draft, use: Use) -> bool:
    is_top_level = any(node is use.node for node in draft.graph.node)
    return is_top_level and (use.node.op_type, use.position) in {("MatMul", 1), ("Gemm", 0), ("Gemm", 1)}


def connect(draft: Draft, weights: list[Weight]) -> None:
    """Let each node read its weights under their names, transposed where it is tied."""
    replaced: dict[int, list[NodeProto]] = {}
    for weight in weights:
        for node, index in weight.uses:
            node.input[index] = weight.name
        for node, index in weight.transposed:
            node.input[index] = weight.name
            if node.op_type == "Gemm":
                _flip(node, "transA" if index == 0 else "transB")
            else:
                replaced[id(node)] = _multiply_transposed(draft, node, weight)
    if replaced:
        replace(draft.graph.node, [new for node in draft.graph.node for new in replaced.get(id(node), [node])])


def _multiply_transposed(draft: Draft, node: NodeProto, weight: Weight) -> list[NodeProto]:
    """Return nodes for X @ W.T with X of any rank; Gemm, which reads W as it is stored, takes two axes only."""
    x, name = node.input
    output = node.output[0]
    classes, width = weight.array.shape

    def value(suffix: str) -> str:
        return f"{output}/{suffix}"

    for suffix, numbers in ("rows", [-1, width]), ("start", [0]), ("stop", [-1]), ("columns", [classes]):
        draft.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), value(suffix)))
    return [
        helper.make_node("Reshape", [x, value("rows")], [value("x")], f"{node.name}/Reshape"),
        helper.make_node("Gemm", [value("x"), name], [value("product")], f"{node.name}/Gemm", transB=1),
        helper.make_node("Shape", [x], [value("x_shape")], f"{node.name}/Shape"),
        helper.make_node(
            "Slice", [value("x_shape"), value("start"), value("stop")], [value("batch_shape")], f"{node.name}/Slice"
        ),
        helper.make_node(
            "Concat", [value("batch_shape"), value("columns")], [value("shape")], f"{node.name}/Concat", axis=0
        ),
        helper.make_node("Reshape", [value("product"), value("shape")], [output], f"{node.name}/Reshape_1"),
    ]


def _flip(node: NodeProto, name: str) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = 1 - attribute.i
            return
    node.attribute.append(helper.make_attribute(name, 1))


def _same_view(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _both_ways(matrix: Array) -> tuple[Array, Array]:
    return matrix, matrix.T


def _is_constant(array: Array) -> bool:
    """Return whether all elements have one value; most arrays differ in the first few."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
    return bool((flat[:64] == flat[0]).all() and (flat == flat[0]).all())
