"""Add a side head to a graph: scores from the outputs of several layers, each pooled over the tokens.

For each tap, hidden states h [batch, sequence, hidden] are weighted by a = softmax over the tokens of
h @ query / sqrt(hidden), and add the sum over the tokens of a * (h @ weight) to the scores. With a query of zeros a is
the mean over the tokens. In a causal model the last token adds h @ last, too.
The scores are summed tap by tap, so that a graph that ends earlier is a part of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.side import (
    BIAS,
    EPSILON,
    SideTap,
    Tap,
    last_name,
    queries_of,
    query_name,
    sum_name,
    tap_name,
    weight_name,
)
from pocketzo.graph.build import Builder
from pocketzo.graph.decoder import MASK, TOKENS, keep_only
from pocketzo.graph.loss import RESERVED, Loss, add_loss
from pocketzo.graph.names import free_names
from pocketzo.graph.read import shape_of

LOGITS: Final = "logits"
_FAR: Final = 1e9


def add_side_head(
    model: ir.Model, taps: Sequence[Tap], columns: int | None, kind: str, *, causal: bool
) -> tuple[Loss, tuple[SideTap, ...]]:
    """Replace what a graph computes by the scores of a side head, and their loss.

    Parameters
    ----------
    model : Model
        Changed in place. Its outputs become ``logits``, float32 [batch, columns], and ``loss``; its inputs are those
        that it had, and ``labels``. The head's parameters are initializers, all zero.
    taps : sequence of Tap
        From the first layer to the last.
    columns : int or None
        Scores of an example; None if the training data says how many classes there are: then there is room for two.
    kind : str
        The loss, as :func:`add_loss` takes it.
    causal : bool
        Whether the last token has seen all others: then each tap has a weight for it alone.

    Returns
    -------
    Loss
    tuple of SideTap

    Raises
    ------
    BundleError
        The graph has no mask.
    """
    build, hidden = begin_beside(model.graph, taps, "pocketzo.side.")
    offset, last = _masks(build)
    width = columns or 2
    # [width] alone is no weight to onnxruntime where it is a single number: it is read once, and not seen to change
    total = build.parameter(BIAS, np.zeros((1, width), np.float32))
    found = []
    for tap, value in hidden:
        size, value.name = tap.size, tap_name(tap.layer)
        query = build.parameter(query_name(tap.layer), np.zeros((size, queries_of(width)), np.float32))
        weight = build.parameter(weight_name(tap.layer), np.zeros((size, width), np.float32))
        scores = build.op("Mul", build.op("MatMul", value, query), build.constant(size**-0.5))
        attention = build.op("Softmax", build.op("Add", scores, offset), axis=1)
        by_token = build.op("Mul", attention, build.op("MatMul", value, weight))
        if causal:
            alone = build.parameter(last_name(tap.layer), np.zeros((size, width), np.float32))
            by_token = build.op("Add", by_token, build.op("Mul", last, build.op("MatMul", value, alone)))
        pooled = build.op("ReduceSum", by_token, build.constant([1]), keepdims=0)
        total = build.op("Add", total, pooled, name=sum_name(tap.layer))
        found.append(SideTap(tap.layer, size))
    return replace_scores(model, build, total, columns or "classes", kind), tuple(found)


def replace_scores(model: ir.Model, build: Builder, scores: ir.Value, columns: int | str, kind: str) -> Loss:
    """Make scores what a graph computes, as ``logits``, and add their loss; remove what they do not need."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    logits = build.op("Identity", scores, name=LOGITS)
    rows = shape_of(inputs[TOKENS]) or ["batch"]
    build.output(logits, ir.DataType.FLOAT, [rows[0], columns])
    keep_only(model, [logits], inputs.keys() - {"positions", "targets", *RESERVED})
    return add_loss(model, kind)


def begin_beside(graph: ir.Graph, taps: Sequence[Tap], prefix: str) -> tuple[Builder, list[tuple[Tap, ir.Value]]]:
    """Free the names of what comes, and return a builder of names with a prefix, and each tap as it is read."""
    made = {value.name: value for node in graph for value in node.outputs}
    values = [(tap, made[tap.name]) for tap in taps]
    free_names(graph, (LOGITS, *RESERVED))
    build = Builder(graph, prefix)
    return build, [(tap, _normalised(build, tap, value)) for tap, value in values]


def _normalised(build: Builder, tap: Tap, value: ir.Value) -> ir.Value:
    """Return a tap in float32, divided by its root mean square unless the graph normalises it."""
    value = build.op("Cast", value, to=ir.DataType.FLOAT)
    if not tap.normalised:
        squares = build.op("ReduceSum", build.op("Mul", value, value), build.constant([-1]), keepdims=1)
        mean = build.op("Add", build.op("Mul", squares, build.constant(1 / tap.size)), build.constant(EPSILON))
        value = build.op("Div", value, build.op("Sqrt", mean))
    return value


def real_tokens(build: Builder) -> ir.Value:
    """Return 1 for tokens, and 0 for padding, float32 [batch, sequence].

    Raises
    ------
    BundleError
        The graph has no mask.
    """
    mask = next((value for value in build.graph.inputs if value.name == MASK), None)
    if mask is None or len(shape_of(mask) or ()) != 2:
        raise BundleError(
            f"a side head needs an input {MASK!r} [batch, sequence], as it pools over the tokens that are no padding: "
            "export the model with it"
        )
    return build.op("Cast", mask, to=ir.DataType.FLOAT)


def _masks(build: Builder) -> tuple[ir.Value, ir.Value]:
    """Return what is added to the attention of each token, which padding gets none of, and 1 for the last token.

    Both are [batch, sequence, 1].
    """
    real = real_tokens(build)
    offset = build.op("Mul", build.op("Sub", real, build.constant(1.0)), build.constant(_FAR))
    one = build.constant([1])
    padded = build.op("Pad", real, build.constant([0, 0, 0, 1]))
    following = build.op("Slice", padded, one, build.constant([1 << 31]), one)
    last = build.op("Mul", real, build.op("Sub", build.constant(1.0), following))
    axis = build.constant([-1])
    return build.op("Unsqueeze", offset, axis), build.op("Unsqueeze", last, axis)
