"""The loss of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from pocketzo.errors import BundleError
from pocketzo.graph.proto import dtype_of, rename_value, shape_of, value_names
from pocketzo.graph.weight import Array

IGNORED_LABEL: Final = -100


def add_loss(model: ModelProto) -> tuple[str | None, str | None]:
    """Find the loss of a graph, or add it to one that ends in class scores.

    The loss is the mean cross-entropy of an int64 input ``labels``: of shape [batch] for logits [batch, classes], or
    [batch, sequence] for logits [batch, sequence, classes], where tokens labelled -100 do not count.

    Returns
    -------
    loss, logits : str or None
        Names of the outputs; None where the graph has none.

    Raises
    ------
    BundleError
        If the graph has logits but a loss cannot be added.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    floats = [value for value in graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT]
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
    if shape is None or len(shape) not in (2, 3) or logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise BundleError(
            f"no loss can be added to the graph's output {logits.name!r}: expected float32 of shape [batch, classes] "
            f"or [batch, sequence, classes], got {dtype_of(logits)} of shape {shape}"
        )
    if any(value.name == "labels" for value in graph.input):
        raise BundleError("the graph has an input 'labels' but no output 'loss'; export it with both, or with neither")
    for name in "labels", "loss":
        if name in value_names(graph):
            rename_value(graph, name, f"{name}_in_graph")
    _append_cross_entropy(graph, logits.name, shape)
    return "loss", logits.name


def _append_cross_entropy(graph: GraphProto, logits: str, shape: Sequence[int | str]) -> None:
    """Add the input ``labels`` and the output ``loss``, as log-sum-exp: the log of a softmax is off near 0 and 1."""
    graph.input.append(helper.make_tensor_value_info("labels", TensorProto.INT64, shape[:-1]))
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))

    def constant(name: str, array: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(array, f"pocketzo.loss.{name}"))
        return f"pocketzo.loss.{name}"

    def node(op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(op_type, inputs, [name], f"pocketzo.loss.{op_type}_{name}", **attributes))
        return name

    last = constant("last_axis", np.array([-1], np.int64))
    log_p = node("LogSoftmax", [logits], "pocketzo.loss.log_probabilities", axis=-1)
    if len(shape) == 2:
        index = node("Unsqueeze", ["labels", last], "pocketzo.loss.index")
        chosen = node("GatherElements", [log_p, index], "pocketzo.loss.chosen", axis=-1)
        node("Neg", [node("ReduceMean", [chosen], "pocketzo.loss.mean", keepdims=0)], "loss")
        return
    ignored = node("Equal", ["labels", constant("ignored_label", np.array(IGNORED_LABEL))], "pocketzo.loss.ignored")
    label = node("Where", [ignored, constant("any_label", np.array(0)), "labels"], "pocketzo.loss.label")
    index = node("Unsqueeze", [label, last], "pocketzo.loss.index")
    chosen = node("GatherElements", [log_p, index], "pocketzo.loss.chosen", axis=-1)
    chosen = node("Squeeze", [chosen, last], "pocketzo.loss.chosen_by_token")
    zero, one = constant("zero", np.array(0, np.float32)), constant("one", np.array(1, np.float32))
    counted = node("Where", [ignored, zero, chosen], "pocketzo.loss.counted")
    weight = node("Where", [ignored, zero, one], "pocketzo.loss.weight")
    total = node("ReduceSum", [counted], "pocketzo.loss.total", keepdims=0)
    count = node("ReduceSum", [weight], "pocketzo.loss.count", keepdims=0)
    node("Neg", [node("Div", [total, count], "pocketzo.loss.mean")], "loss")
