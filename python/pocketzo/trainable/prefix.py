"""A prefix: trainable keys and values of each layer, before those of a sequence's own tokens.

A decoder reads keys and values of past tokens as inputs. The prefix is put in front of these; the mask has ones for it,
positions begin after it, and the caches that the graph returns are without it. So no node of the decoder changes.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.graph.build import Builder
from pocketzo.graph.decoder import MASK, TOKENS, is_cache
from pocketzo.graph.names import unique
from pocketzo.graph.read import shape_of
from pocketzo.trainable.editor import Added, Editor, cast
from pocketzo.trainable.spec import Prefix

NAME: Final = "prefix."
"""What the names of the tensors begin with, before those of the caches."""
_POSITIONS: Final = "position_ids"
_TIME: Final = 2  # the axis of tokens in caches


def add_prefix(editor: Editor, part: Prefix) -> None:
    """Add keys and values in front of those of a decoder's caches.

    Raises
    ------
    BundleError
        The graph has no caches of known sizes, or an operator that does not take a prefix.
    """
    graph = editor.graph
    caches = [value for value in graph.inputs if is_cache(value)]
    _check(graph, part, caches)
    inputs = {str(value.name): value for value in graph.inputs}
    build = Builder(graph, "prefix/", taken=editor.taken)
    batch = build.op("Slice", build.op("Shape", inputs[TOKENS]), build.constant([0]), build.constant([1]))
    count = build.constant([part.tokens])
    editor.describe(AddedSpec("prefix", part.text, tuple(f"{NAME}{cache.name}" for cache in caches)))
    for cache in caches:
        _, heads, _, size = (size if isinstance(size, int) else 0 for size in shape_of(cache) or ())
        assert cache.dtype is not None, "a cache without an element type"
        own = editor.parameter(Added(f"{NAME}{cache.name}", part.text, True, (heads, part.tokens, size)))
        wide = build.op("Concat", batch, build.constant([heads, part.tokens, size]), axis=0)
        rows = build.op("Expand", cast(build, own, ir.DataType.FLOAT, cache.dtype), wide)
        editor.rewire(cache, partial(build.op, "Concat", rows, cache, axis=_TIME))
    if MASK in inputs:
        mask = inputs[MASK]
        assert mask.dtype is not None, "a mask without an element type"
        ones = build.op("Expand", build.op("Cast", build.constant([1]), to=mask.dtype), _sizes(build, batch, count))
        editor.rewire(mask, partial(build.op, "Concat", ones, mask, axis=1))
    if _POSITIONS in inputs:
        positions = inputs[_POSITIONS]
        assert positions.dtype is not None, "positions without an element type"
        after = build.op("Cast", count, to=positions.dtype)
        editor.rewire(positions, partial(build.op, "Add", positions, after))
    for index, value in enumerate(graph.outputs):
        if str(value.name).startswith("present"):
            name, value.name = str(value.name), unique(f"{value.name}.whole", editor.taken)
            new = build.op("Slice", value, count, build.constant([1 << 31]), build.constant([_TIME]), name=name)
            new.type, new.shape = value.type, value.shape
            graph.outputs[index] = new


def _check(graph: ir.Graph, part: Prefix, caches: list[ir.Value]) -> None:
    reason = None
    shapes = [shape_of(cache) or [] for cache in caches]
    kinds = {node.op_type for node in graph.all_nodes()}
    if not caches:
        reason = "the graph has no inputs past_key_values.*: export a decoder with its cache"
    elif any(len(shape) != 4 or not all(isinstance(shape[axis], int) for axis in (1, 3)) for shape in shapes):
        reason = "its caches are not declared as [batch, heads, past, size] with numbers of heads and sizes"
    elif "If" in kinds:
        reason = "one of its branches has no cache: export the decoder without merging"
    elif "GroupQueryAttention" in kinds:
        reason = "GroupQueryAttention takes no past of texts of different lengths: export it without, or train lora"
    elif any(kind.startswith("DynamicQuantize") for kind in kinds):
        # A prefix is no token of the batch: the model rounds as it does not for the tokens that it begins as.
        reason = "the model rounds all tokens of a batch together: take one quantised in blocks, or train lora"
    if reason is not None:
        raise BundleError(f"train={part.text!r} is not possible here: {reason}")


def _sizes(build: Builder, batch: ir.Value, count: ir.Value) -> ir.Value:
    return build.op("Concat", batch, count, axis=0)
