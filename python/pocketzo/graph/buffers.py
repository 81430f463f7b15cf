"""Find constants that a model never learned: rotary tables, frequencies, sinusoidal positions, masks, statistics.

They are found by what they feed and by their elements, never by their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.graph.roles import is_vector
from pocketzo.graph.weight import Array, Draft, Use

_INPUTS: Final = {
    ("", "BatchNormalization", 3): "running statistics",
    ("", "BatchNormalization", 4): "running statistics",
    ("", "RotaryEmbedding", 1): "a rotary table",
    ("", "RotaryEmbedding", 2): "a rotary table",
    ("com.microsoft", "RotaryEmbedding", 2): "a rotary table",
    ("com.microsoft", "RotaryEmbedding", 3): "a rotary table",
    ("com.microsoft", "GroupQueryAttention", 7): "a rotary table",
    ("com.microsoft", "GroupQueryAttention", 8): "a rotary table",
}
_TABLE_READERS: Final = {
    "Add", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Mul", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Slice", "Sub", "Where",
}  # fmt: skip
"""Operators that read tables of positions, masks and windows. Products are left out: their matrices are learned."""
_MASK_READERS: Final = {"Add", "Attention", "Div", "Gather", "Mul", "MultiHeadAttention", "Slice", "Sub", "Where"}
_SCALING: Final = {"Cast", "Concat", "Div", "Expand", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_LOOKUPS: Final = {"Gather", "GatherElements", "GatherND"}
_ROWS: Final = 64  # as many show what a table is
_TABLE: Final = 5  # rows; fewer fit by chance
_VECTOR: Final = 16  # elements
_VARIED: Final = 6  # elements that have to fit
_MISSES: Final = 0.1  # the share that may not: a row for padding, a kink


def find_buffers(draft: Draft) -> None:
    """Mark the uses of buffers in :attr:`Draft.not_weights`, each with the kind of buffer."""
    marks = draft.not_weights
    angles = _angles(draft)
    for constant in draft.constants.values():
        for use in constant.value.uses():
            node, index = use
            domain = "" if node.domain == "ai.onnx" else node.domain
            kind = _INPUTS.get((domain, node.op_type, index)) or ("frequencies" if use in angles else None)
            if kind is None and node.op_type in _TABLE_READERS and _is_sampled(constant.array):
                kind = "a table of sines, or of another sequence"
            if kind is None and node.op_type in _MASK_READERS and _is_mask(constant.array):
                kind = "a mask"
            if kind is None and node.op_type in _TABLE_READERS and _is_whole(constant.array):
                kind = "integers"
            if kind is not None:
                marks.setdefault(use, f"buffer: {kind}")


# ---- by what they feed -----------------------------------------------------------------------------------------------


def _angles(draft: Draft) -> set[Use]:
    """Return the uses of constants from which, with positions alone, both sines and cosines are computed.

    Positions are integer inputs, shapes, ranges, and what is computed from them and constants without a lookup in a
    table. A float input, such as the time of a diffusion model, is one as long as it is only scaled and reshaped.
    """
    positions = set(draft.graph.inputs)
    scaled = {value for value in positions if value.dtype is not None and value.dtype.is_floating_point()}
    known = draft.constants.keys() | set(draft.graph.initializers.values())
    reached: defaultdict[Use, set[str]] = defaultdict(set)
    for node in draft.graph.all_nodes():
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in ("Shape", "Size"):
            positions.update(node.outputs)
        elif not inputs or not all(value in positions or value in known for value in inputs):
            continue
        elif node.op_type in ("Sin", "Cos"):
            for use in _constants_behind(draft, inputs[0]):
                reached[use].add(node.op_type)
        elif all(value in known for value in inputs):
            known.update(node.outputs)
        elif node.op_type in _LOOKUPS and inputs[0] in draft.constants:
            continue
        elif scaled.isdisjoint(inputs):
            positions.update(node.outputs)
        elif node.op_type in _SCALING:
            positions.update(node.outputs)
            scaled.update(node.outputs)
    return {use for use, functions in reached.items() if len(functions) == 2}


def _constants_behind(draft: Draft, value: ir.Value) -> Iterator[Use]:
    """Yield the uses of constants in all nodes that a value is computed by, but for those that only ask for shapes."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or value in seen or node.op_type in ("Shape", "Size"):
            continue
        seen.add(value)
        for index, source in enumerate(node.inputs):
            if source in draft.constants:
                yield node, index
            elif source is not None:
                pending.append(source)


# ---- by their elements -----------------------------------------------------------------------------------------------


def _is_sampled(array: Array) -> bool:
    """Return whether an array samples sines, exponentials or straight lines at equal distances.

    Then the sum of an element's two neighbours is a multiple of the element: 2 cos(a), if a is the angle between two
    samples. Rows are samples, as in a table of positions, or elements of a row, as in a bias by distance. A vector,
    such as a window of a spectrum, may also have an offset.
    """
    if is_vector(array):
        return array.size >= _VECTOR and _follows(array.reshape(-1, 1)[: 4 * _ROWS], offset=True)
    if array.ndim < 2:
        return False
    rows = array.reshape(-1, *array.shape[-2:])[0, :_ROWS]
    sequences = array.reshape(-1, array.shape[-1])[:_ROWS, : 4 * _ROWS].T
    return any(len(table) >= _TABLE and _follows(table, offset=False) for table in (rows, sequences))


def _follows(table: Array, *, offset: bool) -> bool:
    """Return whether each column obeys t[i + 1] + t[i - 1] = c t[i], or c t[i] + d with an offset."""
    tolerance = 4e-3 if table.dtype.itemsize == 2 else 1e-3
    values = table.astype(np.float64)
    if not np.isfinite(values).all():
        return False
    before, here, after = values[:-2], values[1:-1], values[2:]
    limit = tolerance * np.abs(values).max(0)
    # Where nothing changes, any constant fits: unused rows of a learned table.
    varied = np.maximum(np.abs(after - here), np.abs(before - here)) > limit
    if varied.sum() < _VARIED:
        return False
    total = before + after
    if offset:
        here, total = here - here.mean(), total - total.mean()
        factor = (here * total).sum() / np.square(here).sum()
    else:  # a median, as a row may be another's: of padding
        factor = np.median(np.divide(total, here, out=np.full_like(here, 2), where=np.abs(here) > limit), axis=0)
    misses = np.abs(total - factor * here) > limit
    return bool(misses[varied].mean() <= _MISSES)


def _is_whole(array: Array) -> bool:
    """Return whether all elements are integers, and not the same: strides, anchors, tables of a code."""
    flat = array.reshape(-1)
    return (
        array.size >= _VECTOR
        and all(bool((part == np.round(part)).all()) for part in (flat[:_ROWS], flat))
        and not bool((flat == flat[0]).all())
    )


def _is_mask(array: Array) -> bool:
    """Return whether a table has two values, 0 and 1, or one that is far below zero."""
    if is_vector(array) or array.size < 4:
        return False
    low, high = array.min(), array.max()
    return bool((low <= -1e3 or (low == 0 and high == 1)) and low < high and np.isin(array, (low, high)).all())
