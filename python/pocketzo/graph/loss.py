"""Find or add the loss of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.build import Builder
from pocketzo.graph.ending import Ending, ending_of
from pocketzo.graph.names import free_names
from pocketzo.graph.read import dtype_of, shape_of

IGNORED_LABEL: Final = -100
"""The label of a token that the loss ignores, as in PyTorch."""
RESERVED: Final = ("labels", "loss")
"""The names of the input and the output that are added."""

_FLOATS: Final = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
_EXPECTED: Final = {
    "cross-entropy": "two or more columns, [batch, classes] or [batch, sequence, classes]",
    "bce": "shape [batch] or [batch, labels]",
    "mse": "shape [batch] or [batch, values]",
}


class Loss(NamedTuple):
    """The loss of a graph, and the scores that it is computed from.

    Attributes
    ----------
    kind : str or None
        ``"cross-entropy"``, ``"bce"`` or ``"mse"``, if that loss was added.
    output : str or None
        The name of the loss output; None if there is none.
    scores : str or None
        The name of the output of class scores or predicted numbers; None if there is none.
    threshold : float or None
        Above it a score means yes, where each column of `scores` answers a question of its own; else None.
    reason : str
        Why this loss, or none; a clause for people.
    """

    kind: str | None
    output: str | None
    scores: str | None
    threshold: float | None
    reason: str


class _Scores(NamedTuple):
    value: ir.Value
    shape: list[int | str]
    ending: Ending

    @property
    def is_column(self) -> bool:
        """Whether there is one number an example."""
        return len(self.shape) == 1 or (len(self.shape) == 2 and self.shape[1] == 1)

    @property
    def is_unbatched(self) -> bool:
        """Whether a single axis has a fixed size, so that it may hold the classes of one example."""
        return len(self.shape) == 1 and isinstance(self.shape[0], int)

    def threshold(self, kind: str | None) -> float | None:
        return None if kind != "bce" else 0.5 if self.ending.kind == "sigmoid" else 0.0

    def __str__(self) -> str:
        return f"the output {self.value.name!r} ({dtype_of(self.value)} {_text(self.shape)})"


def add_loss(model: ir.Model, stated: str | None = None, *, labels: bool = False) -> Loss:
    """Find the loss of a graph, or add one.

    A loss is computed from the output named ``logits``, or else from the only float output. The graph gets an input
    ``labels`` and an output ``loss``, a mean over the batch:

    - ``"cross-entropy"`` of class scores [batch, classes], with int64 labels [batch]; or of [batch, sequence, classes],
      with labels [batch, sequence], where tokens labelled -100 are ignored;
    - ``"bce"``, binary cross-entropy: of one score, [batch] or [batch, 1], with int64 labels [batch], 0 or 1; or of
      [batch, labels], with float32 labels of that shape;
    - ``"mse"``, the mean squared error: of [batch] or [batch, 1], with float32 labels [batch]; or of [batch, values],
      with float32 labels of that shape.

    The first two are computed from the input of a Softmax, LogSoftmax or Sigmoid that computes the output, if there is
    one.

    Parameters
    ----------
    model : Model
        Changed in place. Its own outputs stay as they are.
    stated : {"cross-entropy", "bce", "mse", "none"}, optional
        The loss. By default it is the graph's own, or follows from what computes the output.
    labels : bool
        Whether the classes have names, so that the output is known to hold class scores.

    Returns
    -------
    Loss

    Raises
    ------
    BundleError
        If the stated loss cannot be added, or the graph's own is not a scalar, or one column has to be trained by a
        loss that is not stated.
    """
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    if "loss" in outputs and stated != "none":
        return _own_loss(outputs["loss"], outputs.get("logits"), stated)
    scores = _find_scores(graph)
    if isinstance(scores, str):
        if stated in (None, "none"):
            return Loss(None, None, None, None, _reason(None, stated, scores))
        raise BundleError(
            f"no {stated} loss can be added: {scores}; export the model with its scores as the output 'logits', or "
            f"prepare it with --loss none"
        )
    kind, because = (stated, "") if stated in _EXPECTED else _default(scores, labels)
    if stated is None and kind is None and scores.is_column and not scores.is_unbatched:
        raise BundleError(
            f"{scores} has one column, which is no choice between classes: state the loss, --loss mse for a number, "
            f"bce for yes or no, or none"
        )
    reason = _reason(kind, stated, because)
    if kind is None or stated == "none":
        found = None if kind is None else scores.value.name
        return Loss(None, None, found, scores.threshold(kind), reason)
    _check_stated(scores, kind)
    _append(graph, scores, kind)
    return Loss(kind, "loss", scores.value.name, scores.threshold(kind), reason)


def _reason(kind: str | None, stated: str | None, because: str) -> str:
    if stated is not None:
        return "as stated"
    return f"{because}; --loss states another" if kind is not None else f"{because}; --loss states one"


def _own_loss(loss: ir.Value, logits: ir.Value | None, stated: str | None) -> Loss:
    if stated is not None:
        raise BundleError(
            f"the graph has a loss of its own, the output 'loss': prepare it without --loss {stated}, or export the "
            f"model without that output"
        )
    if any(size != 1 for size in shape_of(loss) or ()):
        raise BundleError(
            "the graph's output 'loss' is not a scalar; export the mean loss, or the logits alone, or prepare it with "
            "--loss none"
        )
    return Loss(None, "loss", None if logits is None else logits.name, None, "used as it is")


def _find_scores(graph: ir.Graph) -> _Scores | str:
    """Return the output that a loss can be computed from, or the reason why there is none."""
    named = next((value for value in graph.outputs if value.name == "logits"), None)
    floats = [value for value in graph.outputs if value.dtype in _FLOATS and value.name != "loss"]
    value = named if named is not None else floats[0] if len(floats) == 1 else None
    if value is None and floats:
        return f"none of the outputs {', '.join(repr(value.name) for value in floats)} is named 'logits'"
    if value is None or value.dtype not in _FLOATS:
        found = graph.outputs[0] if value is None else value
        return f"the output {found.name!r} is {dtype_of(found)}, which holds no scores"
    shape = shape_of(value)
    if not shape:
        return f"the output {value.name!r} is a scalar" if shape == [] else f"the rank of {value.name!r} is unknown"
    return _Scores(value, shape, ending_of(value, len(shape)))


def _default(scores: _Scores, labels: bool) -> tuple[str | None, str]:
    """Return the kind of loss that follows from the graph, or None, and the reason."""
    value, shape, ending = scores
    ends = f"{value.name!r} ends in {ending.op}"
    if scores.is_unbatched:
        return None, f"{value.name!r} has the shape {_text(shape)}, which may be examples or classes"
    if scores.is_column:
        return ("bce", f"chosen as {ends}") if ending.kind == "sigmoid" else (None, f"{value.name!r} has one column")
    if len(shape) not in (2, 3):
        return None, f"{value.name!r} has the shape {_text(shape)}"
    if len(shape) == 3 and shape[1] == 1:
        return None, f"{value.name!r} of shape {_text(shape)} has the scores of one token only"
    if not ending.over_last:
        return None, f"{ends}, which is not known to be along the last axis"
    if ending.kind == "softmax":
        return "cross-entropy", f"chosen as {ends}"
    if ending.kind == "sigmoid":
        return ("bce", f"chosen as {ends}") if len(shape) == 2 else (None, f"{ends}, by token")
    if value.name == "logits":
        return "cross-entropy", "chosen by the name of the output"
    if labels and len(shape) == 2:
        return "cross-entropy", "chosen as labels are given"
    if len(shape) == 2 and ending.kind == "linear":
        return "cross-entropy", f"chosen as it is the only float output and ends in {ending.op}"
    return None, f"{ends}, and is not named 'logits'"


def _check_stated(scores: _Scores, kind: str) -> None:
    """Raise BundleError if this kind of loss cannot be computed from these scores."""
    shape, ending = scores.shape, scores.ending
    fits = len(shape) in (2, 3) and not scores.is_column if kind == "cross-entropy" else len(shape) in (1, 2)
    if not fits:
        raise BundleError(f"no {kind} loss can be added to {scores}: it needs {_EXPECTED[kind]}; try another --loss")
    other = {"cross-entropy": "sigmoid", "bce": "softmax"}.get(kind)
    if ending.kind == other:
        raise BundleError(f"no {kind} loss can be added to {scores}: it ends in {ending.op}; try another --loss")
    if kind == "cross-entropy" and not ending.over_last:
        raise BundleError(
            f"no {kind} loss can be added to {scores}: it ends in {ending.op}, which is not known to be along the last "
            f"axis; export the scores before it, or prepare it with --loss none"
        )


def _append(graph: ir.Graph, scores: _Scores, kind: str) -> None:
    """Add the input ``labels`` and the output ``loss``."""
    inputs, outputs = ({value.name for value in values} for values in (graph.inputs, graph.outputs))
    for name in RESERVED:
        if name in inputs | outputs:
            what = "an input" if name in inputs else "an output"
            raise BundleError(
                f"the graph has {what} {name!r}, the name of {'an output' if name == 'loss' else 'an input'} that is "
                f"added for the loss: export it under another name, or prepare the model with --loss none"
            )
    free_names(graph, RESERVED)
    build = Builder(graph, "pocketzo.loss.")
    value = scores.value if kind == "mse" else scores.ending.scores(build)
    if value.dtype != ir.DataType.FLOAT:
        value = build.op("Cast", value, to=ir.DataType.FLOAT)
    shape = scores.shape
    if scores.is_column:
        shape = shape[:1]
        value = build.op("Reshape", value, build.constant([-1, 1] if kind == "bce" else [-1]))
    if kind == "mse":
        loss = _squared_error(build, value, shape)
    elif kind == "bce" and not scores.is_column:
        loss = _binary_cross_entropy(build, value, shape)
    else:
        if kind == "bce":  # two classes, of which one has the score 0: a label beyond 1 is an error, as for any classes
            value = build.op("Pad", value, build.constant([0, 1, 0, 0]))
        loss = _cross_entropy(build, value, shape if scores.is_column else shape[:-1])
    loss.name = "loss"
    build.output(loss, ir.DataType.FLOAT, [])


def _cross_entropy(build: Builder, scores: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    """Return the mean over labels of this shape, by LogSoftmax: Log of Softmax is inaccurate near 0 and 1."""
    labels = build.input("labels", ir.DataType.INT64, shape)
    last = build.constant([-1])
    log_p = build.op("LogSoftmax", scores, axis=-1)
    if len(shape) == 1:
        chosen = build.op("GatherElements", log_p, build.op("Unsqueeze", labels, last), axis=-1)
        return build.op("Neg", build.op("ReduceMean", chosen, keepdims=0))
    ignored = build.op("Equal", labels, build.constant(IGNORED_LABEL))
    label = build.op("Where", ignored, build.constant(0), labels)
    chosen = build.op("GatherElements", log_p, build.op("Unsqueeze", label, last), axis=-1)
    chosen = build.op("Squeeze", chosen, last)
    zero, one = build.constant(0.0), build.constant(1.0)
    total = build.op("ReduceSum", build.op("Where", ignored, zero, chosen), keepdims=0)
    count = build.op("ReduceSum", build.op("Where", ignored, zero, one), keepdims=0)
    return build.op("Neg", build.op("Div", total, count))


def _binary_cross_entropy(build: Builder, scores: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    """Return the mean of max(x, 0) - x y + log(1 + exp(-|x|)): Log of Sigmoid is inaccurate near 0 and 1."""
    labels = build.input("labels", ir.DataType.FLOAT, shape)
    linear = build.op("Sub", build.op("Relu", scores), build.op("Mul", scores, labels))
    rest = build.op("Softplus", build.op("Neg", build.op("Abs", scores)))
    return build.op("ReduceMean", build.op("Add", linear, rest), keepdims=0)


def _squared_error(build: Builder, scores: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    error = build.op("Sub", scores, build.input("labels", ir.DataType.FLOAT, shape))
    return build.op("ReduceMean", build.op("Mul", error, error), keepdims=0)


def _text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
