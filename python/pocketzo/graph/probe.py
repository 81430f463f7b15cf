"""Make up probing batches from the inputs that a graph declares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import ValueSpec
from pocketzo.formats.past import is_cache
from pocketzo.formats.probe import Probe

_LENGTHS: Final = (8, 32, 64, 224, 512)
"""Sizes of dynamic axes, tried in turn: convolutions need more than 8, and some a size that they can halve often."""
_TOKEN_LENGTHS: Final = (8, 64)
_MOST_ELEMENTS: Final = 1 << 22  # of a made-up batch: the bundle keeps it
_SAMPLE_RATE: Final = 16000

# Operators that hand on the elements of their first input, or of all, as they are or moved by a little.
_MOVING: Final = {
    "Cast",
    "Clip",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
_JOINING: Final = {"Add", "Concat", "Max", "Min", "Mul", "Sub", "Where"}
# Of operators that read rows of a table by an index: its input of the index, and that of the table.
_TABLES: Final[Mapping[str, Mapping[int, int]]] = {
    "Gather": {1: 0},
    "GatherBlockQuantized": {1: 0},
    "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3},
}


# ---- what the graph says about its inputs ----------------------------------------------------------------------------


def index_limits(graph: ir.Graph) -> dict[str, int]:
    """Return for each input that indexes constant tables, as integers or cast to them, the rows of the smallest."""
    rows = {str(value.name): list(_rows_read(value)) for value in graph.inputs}
    return {name: min(found) for name, found in rows.items() if found}


def _rows_read(value: ir.Value) -> Iterator[int]:
    """Yield the number of rows of each constant table that a value indexes."""
    seen = {value}
    ahead = [value]
    while ahead:
        for node, index in ahead.pop().uses():
            table = _TABLES.get(node.op_type, {}).get(index)
            if table is not None and table < len(node.inputs):
                axis = node.attributes.get("gather_axis", node.attributes.get("axis"))
                shape = _constant_shape(node.inputs[table])
                if shape:
                    yield shape[0 if axis is None else axis.as_int()]
            elif (node.op_type in _MOVING and index == 0) or node.op_type in _JOINING:
                for output in node.outputs:
                    if output not in seen:
                        seen.add(output)
                        ahead.append(output)


def _constant_shape(value: ir.Value | None) -> Sequence[int] | None:
    """Return the shape of a constant, which may be dequantised or transposed; None of other values."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.shape is None else value.shape.numpy()
    node = value.producer()
    if node is None or node.op_type not in ("Cast", "DequantizeLinear", "Identity", "Transpose"):
        return None
    shape = _constant_shape(node.inputs[0])
    if shape is None or node.op_type != "Transpose":
        return shape
    perm = node.attributes.get("perm")
    return shape[::-1] if perm is None else [shape[axis] for axis in perm.as_ints()]


# ---- batches ---------------------------------------------------------------------------------------------------------


def made_up_batches(inputs: Sequence[ValueSpec], limits: Mapping[str, int]) -> Iterator[Probe]:
    """Yield batches of the declared types and shapes, the most typical first.

    Fixed sizes are kept, and a dynamic size of one name is the same everywhere: 2 examples of 8 tokens at first, then
    larger sizes, and one example. Masks keep one half and drop the other, whichever of their values keeps. Caches of
    past tokens are empty.

    Parameters
    ----------
    inputs : sequence of ValueSpec
    limits : mapping of str to int
        The result of :func:`index_limits`.

    Raises
    ------
    BundleError
        An input has an element type that numpy does not have.
    """
    for spec in inputs:
        if spec.dtype != "object" and np.dtype(spec.dtype).kind not in "biuf":
            raise BundleError(
                f"the input {spec.name!r} is {spec.dtype}, which numpy does not have; export the model with float32 "
                "inputs"
            )
    has_tokens = any(_is_tokens(spec, limits) for spec in inputs)
    done: set[tuple[object, ...]] = set()
    for top in (8, 1):
        for length in _TOKEN_LENGTHS if has_tokens else _LENGTHS:
            for examples in (2, 1):
                maker = _Maker(inputs, limits, examples=examples, length=length, top=top)
                key = (top, *maker.shapes.values())
                if key not in done and (not done or sum(map(math.prod, maker.shapes.values())) <= _MOST_ELEMENTS):
                    yield {spec.name: maker.array(spec) for spec in inputs}
                done.add(key)


class _Maker:
    """Makes up the arrays of one batch.

    Parameters
    ----------
    inputs : sequence of ValueSpec
    limits : mapping of str to int
    examples, length : int
        The size of dynamic first axes, and of other dynamic axes.
    top : int
        Integers of which nothing is known are less than this; with 1, all are 0.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        By name of the input.
    """

    def __init__(
        self, inputs: Sequence[ValueSpec], limits: Mapping[str, int], *, examples: int, length: int, top: int
    ) -> None:
        tokens = [spec.shape for spec in inputs if _is_tokens(spec, limits)]
        self._examples = next((shape[0] for shape in tokens if isinstance(shape[0], int)), examples)
        self._length = next((shape[1] for shape in tokens if isinstance(shape[1], int)), length)
        self._limits = limits
        self._top = top
        self._sizes: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for spec in sorted(inputs, key=is_cache):  # a cache has an axis of its own, and the others are known by then
            rest = 0 if is_cache(spec) else self._length
            usual = [self._examples, *[rest] * len(spec.shape)]
            if len(spec.shape) == 3 and isinstance(spec.shape[0], int) and spec.shape[0] > 1:
                usual[1] = self._examples  # the state of a recurrent layer is [directions, examples, units]
            self.shapes[spec.name] = tuple(
                size if isinstance(size, int) else self._size(size, usual[axis]) for axis, size in enumerate(spec.shape)
            )

    def _size(self, name: str, usual: int) -> int:
        """Return the size of a dynamic axis."""
        if name == "?":
            return usual
        terms = [term.strip() for term in name.split("+")]
        if len(terms) > 1:  # "past_sequence_length + sequence_length"
            return sum(int(term) if term.isdecimal() else self._size(term, self._length) for term in terms)
        if "batch" in name.lower():
            usual = self._examples
        elif re.match("past", name, re.IGNORECASE):
            usual = 0
        elif "encoder" in name.lower():
            usual = self._length
        return self._sizes.setdefault(name, usual)

    def array(self, spec: ValueSpec) -> NDArray[Any]:
        """Return the array of one input."""
        shape = self.shapes[spec.name]
        if spec.dtype == "object":
            return np.full(shape, "a")
        dtype = np.dtype(spec.dtype)
        name = spec.name.lower()
        if "label" in name:
            return np.zeros(shape, dtype)
        if "mask" in name and shape:
            kept = np.arange(shape[-1]) < (shape[-1] + 1) // 2
            return np.full(shape, kept, dtype)
        if dtype.kind == "f" and spec.name not in self._limits:
            return np.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)
        if dtype.kind == "b":  # a sole one is a flag
            return (np.arange(math.prod(shape)) % 2).reshape(shape).astype(dtype)
        return self._integers(name, shape, self._limits.get(spec.name), dtype).astype(dtype)

    def _integers(
        self, name: str, shape: tuple[int, ...], limit: int | None, dtype: np.dtype[Any]
    ) -> NDArray[np.int64]:
        top = self._top if limit is None or self._top == 1 else max(1, min(limit, 64))
        if "position" in name and shape:
            return np.full(shape, np.arange(shape[-1]) % max(limit or shape[-1], 1))
        if "past" in name or name.endswith("_keep") or (limit is None and ("type" in name or "segment" in name)):
            return np.zeros(shape, np.int64)
        if len(shape) < 2 and limit is None:
            if name == "sr" or "rate" in name:
                return np.full(shape, _SAMPLE_RATE)
            if "len" in name:
                return np.full(shape, self._length)
        if math.prod(shape) == 1:
            return np.full(shape, min(1, top - 1))
        if dtype == np.uint8 and limit is None and len(shape) > 2:  # an image
            top = 256
        return (np.arange(math.prod(shape)) % top).reshape(shape)


def _is_tokens(spec: ValueSpec, limits: Mapping[str, int]) -> bool:
    return len(spec.shape) == 2 and (spec.dtype.startswith("int") or spec.name in limits)
