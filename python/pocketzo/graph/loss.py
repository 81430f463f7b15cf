"""Find or add the loss of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.build import Builder
from pocketzo.graph.names import unique, value_names
from pocketzo.graph.read import dtype_of, shape_of

IGNORED_LABEL: Final = -100
"""The label of a token that the loss ignores, as in PyTorch."""
RESERVED: Final = ("labels", "loss")
"""The names of the input and the output that are added."""


def add_loss(model: ir.Model) -> tuple[str | None, str | None]:
    """Find the loss of a graph, or add it to one that ends in class scores.

    The loss is the mean cross-entropy of an int64 input ``labels``: of shape [batch] for logits [batch, classes], or
    [batch, sequence] for logits [batch, sequence, classes], where tokens labelled -100 are ignored.

    Returns
    -------
    loss, logits : str or None
        Names of the outputs; None if the graph has none.

    Raises
    ------
    BundleError
        If the graph has logits but a loss cannot be added.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    floats = [value for value in graph.outputs if value.dtype == ir.DataType.FLOAT]
    logits = outputs.get("logits")
    if "loss" in outputs:
        if any(size != 1 for size in shape_of(outputs["loss"]) or ()):
            raise BundleError("the graph's output 'loss' is not a scalar; export the mean loss, or the logits alone")
        return "loss", logits.name if logits is not None else None
    if logits is None and len(floats) == 1 and len(shape_of(floats[0]) or ()) == 2:
        logits = floats[0]
    if logits is None:
        return None, None

    shape = shape_of(logits)
    if shape is None or len(shape) not in (2, 3) or logits.dtype != ir.DataType.FLOAT:
        raise BundleError(
            f"no loss can be added to the graph's output {logits.name!r}: expected float32 of shape [batch, classes] "
            f"or [batch, sequence, classes], got {dtype_of(logits)} of shape {shape}"
        )
    if any(value.name == "labels" for value in graph.inputs):
        raise BundleError("the graph has an input 'labels' but no output 'loss'; export it with both, or with neither")
    if any(value.name == "loss" for value in graph.inputs):
        raise BundleError("the graph has an input 'loss', as the output that is added; export it under another name")
    _free_names(graph, RESERVED)
    _append_cross_entropy(graph, logits, shape)
    return "loss", logits.name


def _free_names(graph: ir.Graph, names: Sequence[str]) -> None:
    """Rename the values that have these names, in subgraphs too."""
    taken = value_names(graph)
    for node in graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name in names:
                value.name = unique(f"{value.name}_in_graph", taken)


def _append_cross_entropy(graph: ir.Graph, logits: ir.Value, shape: Sequence[int | str]) -> None:
    """Add the input ``labels`` and the output ``loss``, by LogSoftmax: Log of Softmax is inaccurate near 0 and 1."""
    build = Builder(graph, "pocketzo.loss.")
    labels = build.input("labels", ir.DataType.INT64, shape[:-1])
    last = build.constant([-1])
    log_p = build.op("LogSoftmax", logits, axis=-1)
    if len(shape) == 2:
        chosen = build.op("GatherElements", log_p, build.op("Unsqueeze", labels, last), axis=-1)
        mean = build.op("ReduceMean", chosen, keepdims=0)
    else:
        ignored = build.op("Equal", labels, build.constant(IGNORED_LABEL))
        label = build.op("Where", ignored, build.constant(0), labels)
        chosen = build.op("GatherElements", log_p, build.op("Unsqueeze", label, last), axis=-1)
        chosen = build.op("Squeeze", chosen, last)
        zero, one = build.constant(0.0), build.constant(1.0)
        total = build.op("ReduceSum", build.op("Where", ignored, zero, chosen), keepdims=0)
        count = build.op("ReduceSum", build.op("Where", ignored, zero, one), keepdims=0)
        mean = build.op("Div", total, count)
    build.output(build.op("Neg", mean, name="loss"), ir.DataType.FLOAT, [])
