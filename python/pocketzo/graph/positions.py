"""Compute a language model's logits at some positions only: hidden states are gathered before the projection.

From the output back to the projection onto the vocabulary, every operator works on each token by itself, so that a copy
of these few nodes gives the same for the gathered tokens. The original ones are unused then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.build import Builder
from pocketzo.graph.names import title_of
from pocketzo.graph.read import shape_of

PROJECTIONS: Final = {
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "MatMulNBits",
    "MatMulInteger",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
"""Operators that multiply their first input, a row for each token, by a matrix."""
_BY_ELEMENT: Final = {
    "Abs",
    "Add",
    "BiasGelu",
    "Cast",
    "Clip",
    "DequantizeLinear",
    "Div",
    "Identity",
    "Mul",
    "Neg",
    "Pow",
    "QuantizeLinear",
    "Sub",
    "Tanh",
}
_SAME_ROWS: Final = {"Flatten", "Reshape", "Slice", "Squeeze", "Unsqueeze"}
"""Operators that keep the order of the rows, and their elements, where they are between projection and output."""
_SCALAR: Final = {"Clip", "DequantizeLinear", "QuantizeLinear"}
"""Those of which a constant is a single number; where it is one for each channel, they count axes from the first."""
_SCALES: Final = {"DynamicQuantizeLinear": (1, 2)}
"""Outputs that are single numbers, though they are computed from all tokens."""


def logits_at(build: Builder, logits: ir.Value, positions: ir.Value) -> ir.Value:
    """Add nodes that compute an output of logits at some positions only.

    Parameters
    ----------
    build : Builder
        Of the graph of the output.
    logits : Value
        The output, [batch, sequence, vocabulary].
    positions : Value
        int64 [n]: row * sequence + column of each.

    Returns
    -------
    Value
        [n, vocabulary], of the type of the output.

    Raises
    ------
    BundleError
        The output is not computed by a projection of hidden states, but for operators that work by element.
    """
    rows = _rows(build, _Copy(build, positions).at(logits))
    shape = shape_of(logits)
    # onnxruntime gives a result the memory of its operand only where both have one shape by name.
    rows.shape = ir.Shape(["positions", shape[-1] if shape else "vocabulary"])
    rows.type = logits.type
    return rows


def _rows(build: Builder, value: ir.Value) -> ir.Value:
    """Return a value of any rank as a matrix: its last axis stays."""
    size = build.op("Slice", build.op("Shape", value), build.constant([-1]), build.constant([1 << 31]))
    return build.op("Reshape", value, build.op("Concat", build.constant([-1]), size, axis=0))


class _Copy:
    """Copies the nodes behind the projection; each value once."""

    def __init__(self, build: Builder, positions: ir.Value) -> None:
        self._build = build
        self._positions = positions
        self._constants = _same_for_all(build.graph)
        self._gathered: dict[ir.Value, ir.Value] = {}
        self._copies: dict[ir.Value, ir.Value] = {}

    def at(self, value: ir.Value) -> ir.Value:
        """Return a value with a row for each position."""
        if value not in self._copies:
            self._copies[value] = self._copy(value)
        return self._copies[value]

    def _copy(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        if node is None or (kind := node.op_type) not in PROJECTIONS | _BY_ELEMENT | _SAME_ROWS:
            what = "an input" if node is None else title_of(node)
            raise self._refused(f"{what} is between the two")
        if kind in _SAME_ROWS:
            return self.at(_first(node))
        if kind in PROJECTIONS:
            if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA")):
                raise self._refused(f"{title_of(node)} transposes them")
            if any(value is not None and value not in self._constants for value in node.inputs[1:]):
                raise self._refused(f"{title_of(node)} multiplies by a matrix that is computed from the tokens")
            return self._node(node, [self._gather(_first(node)), *node.inputs[1:]])
        return self._node(node, [None if other is None else self._operand(node, other) for other in node.inputs])

    def _node(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self._build.op(node.op_type, *inputs, domain=node.domain, **attributes)

    def _gather(self, hidden: ir.Value) -> ir.Value:
        """Return the rows of hidden states, [..., sizes], at the positions."""
        if hidden not in self._gathered:
            rows = _rows(self._build, hidden)
            self._gathered[hidden] = self._build.op("Gather", rows, self._positions, axis=0)
        return self._gathered[hidden]

    def _operand(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return an input of an operator that works by element: a constant that each row is combined with alike."""
        if value not in self._constants:
            return self.at(value)
        shape = shape_of(value) or []  # without a shape, it is a scale that is computed
        most = 0 if node.op_type in _SCALAR else 1
        if any(size != 1 for size in shape[: len(shape) - most]):
            raise self._refused(f"{title_of(node)} combines them with a constant of shape {shape}")
        return value

    def _refused(self, reason: str) -> BundleError:
        return BundleError(
            f"no projection of hidden states onto the vocabulary was found before 'logits': {reason}; "
            "export the model with a plain output projection"
        )


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.op_type} without its first input"
    return value


def _same_for_all(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that are the same for all tokens: computed from constants, or a scale of all activations."""
    found = set(graph.initializers.values())
    for node in graph:
        if node.op_type in _SCALES:
            found.update(node.outputs[index] for index in _SCALES[node.op_type])
        elif node.op_type == "Constant" or (
            node.inputs and all(value is None or value in found for value in node.inputs)
        ):
            found.update(node.outputs)
    return found
