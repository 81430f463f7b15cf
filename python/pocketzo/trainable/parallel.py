"""Add a parallel adapter to a graph: a network beside the layers, which reads what they compute and changes nothing.

One block a tap, after Ouyang et al.'s PAC (arXiv 2408.10746): of h, the mean of the hidden states over the tokens of a
text, it computes s = ReLU(h D + d + s of the block before), [batch, units]. The last s gives the scores, s U + u. PAC's
blocks are applied to each token, and the last s is pooled. Here the mean comes first: it depends on nothing that is
trained, so that a vector a layer is all that is kept of an example, and a step is cheaper. D and U begin as noise, and
d and u as zeros: where U is zero, D has no slope, and at low rates the first steps are slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from pocketzo.formats.added import AddedSpec
from pocketzo.formats.side import Tap
from pocketzo.graph.loss import Loss
from pocketzo.graph.side import begin_beside, real_tokens, replace_scores
from pocketzo.trainable.editor import Added


def add_parallel(
    model: ir.Model, taps: Sequence[Tap], units: int, columns: int, kind: str, part: str
) -> tuple[Loss, list[Added], AddedSpec]:
    """Replace what a graph computes by the scores of a parallel adapter, and their loss.

    Parameters
    ----------
    model : Model
        Changed in place, as by :func:`pocketzo.graph.side.add_side_head`.
    taps : sequence of Tap
        From the first layer to the last.
    units : int
        Of a block.
    columns : int
        Scores of an example.
    kind : str
        The loss, as :func:`add_loss` takes it.
    part : str
        The part of ``--train``.

    Returns
    -------
    Loss
    list of Added
        The initializers that were added, which have no elements yet.
    AddedSpec

    Raises
    ------
    BundleError
        The graph has no mask.
    """
    build, hidden = begin_beside(model.graph, taps, "pocketzo.parallel.")
    added: list[Added] = []

    def new(name: str, *shape: int, scale: float = 0.0) -> ir.Value:
        # a vector of one number is no weight to onnxruntime: it is read once, and not seen to change
        shape = (1, *shape) if shape == (1,) else shape
        added.append(Added(f"parallel.{name}", part, True, shape, noise_scale=scale))
        value = ir.val(added[-1].name, ir.DataType.FLOAT, shape)
        model.graph.initializers.add(value)
        return value

    real = real_tokens(build)
    count = build.op("Max", build.op("ReduceSum", real, build.constant([1]), keepdims=1), build.constant(1.0))
    share = build.op("Unsqueeze", build.op("Div", real, count), build.constant([1]))
    state = None
    for tap, value in hidden:
        down = new(f"{tap.layer}.down.weight", tap.size, units, scale=tap.size**-0.5)
        bias = new(f"{tap.layer}.down.bias", units)
        mean = build.op("Squeeze", build.op("MatMul", share, value), build.constant([1]))
        inner = build.op("Add", build.op("MatMul", mean, down), bias)
        state = build.op("Relu", inner if state is None else build.op("Add", inner, state))
    assert state is not None, "a model has a layer"
    scores = build.op("MatMul", state, new("up.weight", units, columns, scale=units**-0.5))
    scores = build.op("Add", scores, new("up.bias", columns))
    loss = replace_scores(model, build, scores, columns, kind)
    return loss, added, AddedSpec("parallel-adapter", part, tuple(one.name for one in added))
