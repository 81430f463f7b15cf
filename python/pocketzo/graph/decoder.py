"""Reduce a decoder's graph to whole sequences: caches are empty, and only the scores are computed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from pocketzo.errors import BundleError
from pocketzo.formats.past import FLAGS, is_cache_name
from pocketzo.graph.build import Builder
from pocketzo.graph.names import unique, value_names
from pocketzo.graph.read import shape_of

TOKENS: Final = "input_ids"
MASK: Final = "attention_mask"


def is_cache(value: ir.Value) -> bool:
    """Return whether an input of a graph holds keys and values of past tokens."""
    return is_cache_name(str(value.name)) and len(shape_of(value) or ()) > 2


def has_cache(graph: ir.Graph) -> bool:
    """Return whether a graph reads keys and values of past tokens."""
    return any(map(is_cache, graph.inputs))


def remove_cache(graph: ir.Graph) -> None:
    """Replace the caches by empty ones, so that a graph computes whole sequences.

    Flags are replaced by constants, and an If that a flag decides by the nodes of its branch. The mask of past and new
    tokens becomes one of the new tokens.

    Parameters
    ----------
    graph : Graph
        Changed in place. Its outputs stay.

    Raises
    ------
    BundleError
        There is no input ``input_ids`` [batch, sequence], or a cache is not declared as one that can be empty.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    tokens = _tokens_of(inputs.values())
    first = next(iter(graph), None)
    build = Builder(graph, "pocketzo.cache.", before=first)
    batch = None
    empty: dict[tuple[object, ...], ir.Value] = {}
    cached = has_cache(graph)
    flags = []
    for name, value in inputs.items():
        if is_cache(value):
            if batch is None:
                shape = build.op("Shape", inputs[TOKENS])
                batch = build.op("Slice", shape, build.constant([0]), build.constant([1]))
            kind = (value.dtype, *(shape_of(value) or ()))
            if kind not in empty:  # one for all layers
                empty[kind] = _empty(build, value, batch, str(tokens[0]))
            _replace(graph, value, empty[kind])
        elif name in FLAGS and value.dtype is not None:
            sizes = [size if isinstance(size, int) else 1 for size in shape_of(value) or ()]
            constant = build.op("Constant", value=ir.tensor(np.zeros(sizes, value.dtype.numpy())))
            _replace(graph, value, constant)
            flags.append(constant)
    for flag in flags:
        _inline_branches(graph, flag)
    for value in empty.values():
        _detach_attention(value)
    mask = shape_of(inputs[MASK]) if MASK in inputs else None
    if cached and mask is not None and len(mask) == 2 and not isinstance(mask[1], int):
        inputs[MASK].shape = ir.Shape([mask[0], tokens[1]])


def keep_only(model: ir.Model, outputs: Sequence[ir.Value], inputs: Collection[str]) -> None:
    """Remove all other outputs of a graph, what only they need, and the inputs that are unused then.

    Parameters
    ----------
    model : Model
        Changed in place.
    outputs : sequence of Value
    inputs : collection of str
        The names of the inputs that stay even if they are unused.
    """
    graph = model.graph
    graph.outputs[:] = outputs
    common.RemoveUnusedNodesPass()(model)
    _return_pasts(graph)
    for value in tuple(graph.inputs):
        if value.name not in inputs and not value.uses():
            graph.inputs.remove(value)


def _return_pasts(graph: ir.Graph) -> None:
    """Name the caches that an Attention returns: onnxruntime 1.32 computes none with a past, unless it returns it."""
    taken = value_names(graph)
    for node in graph:
        past = node.inputs[4] if node.op_type == "Attention" and not node.domain and len(node.inputs) > 4 else None
        made = None if past is None else past.producer()
        if made is not None and made.op_type == "Concat":  # and not an empty past
            node.resize_outputs(max(3, len(node.outputs)))
            for value in node.outputs[1:3]:
                value.name = value.name or unique(f"{node.outputs[0].name}.present", taken)


def _tokens_of(inputs: Collection[ir.Value]) -> list[int | str]:
    """Return the declared shape of the token ids."""
    tokens = next((value for value in inputs if value.name == TOKENS), None)
    shape = None if tokens is None else shape_of(tokens)
    if shape is None or len(shape) != 2:
        found = ", ".join(f"{value.name!r}" for value in inputs if not is_cache(value))
        raise BundleError(
            f"a language model has an input {TOKENS!r} [batch, sequence], this graph has {found or 'no inputs'}: "
            "export the model with its token ids as the input"
        )
    return shape


def _empty(build: Builder, cache: ir.Value, batch: ir.Value, batch_name: str) -> ir.Value:
    """Return a cache of no tokens, of which a fixed size is kept."""
    shape = shape_of(cache) or []
    axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    rows = [axis for axis in axes if shape[axis] == batch_name != "?"] or [axis for axis in axes if axis == 0]
    lengths = [axis for axis in axes if axis not in rows]
    if len(lengths) != 1:
        raise BundleError(
            f"the cache {cache.name!r} is declared as [{', '.join(map(str, shape))}]: expected one size beside the "
            f"batch's that is not fixed, the number of past tokens; export the model with the sizes of its heads"
        )
    sizes = [
        batch if axis in rows else build.constant([0 if axis in lengths else int(size)])
        for axis, size in enumerate(shape)
    ]
    assert cache.dtype is not None, "a cache without an element type"
    zero = ir.tensor(np.zeros(1, cache.dtype.numpy()), cache.dtype)
    return build.op("ConstantOfShape", build.op("Concat", *sizes, axis=0), value=zero)


def _detach_attention(cache: ir.Value) -> None:
    """Leave an empty cache out of the inputs of ONNX's Attention, which may do without.

    onnxruntime 1.32 runs it with a cache but without ``present_*`` once only: where memory is planned for the second
    run, an empty cache has an address, and then it needs both outputs.
    """
    for node, index in tuple(cache.uses()):
        if node.op_type == "Attention" and not node.domain:
            node.replace_input_with(index, None)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all nodes, those of branches too, read another value instead of an input of the graph."""
    ir.convenience.replace_all_uses_with(old, new)
    graph.inputs.remove(old)


def _inline_branches(graph: ir.Graph, flag: ir.Value) -> None:
    """Replace each If by the nodes of its else branch, if it reads a flag, which is false."""
    for node, _ in tuple(flag.uses()):
        if node.op_type != "If" or node.graph is not graph:
            continue
        branch = node.attributes["else_branch"].as_graph()
        taken = value_names(graph) - value_names(branch)
        results = list(branch.outputs)
        branch.outputs.clear()
        for inner in tuple(branch):
            branch.remove(inner)
            for value in inner.outputs:
                value.name = unique(str(value.name), taken) if value.name else value.name
            node.prepend(inner)
        for old, new in zip(node.outputs, results, strict=True):
            name, is_output = old.name, old.is_graph_output()
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            if is_output:
                old.name, new.name = None, name
        graph.remove(node)
        for inner in (node, *node.attributes["then_branch"].as_graph().all_nodes()):
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)  # so that what it read alone is unused
