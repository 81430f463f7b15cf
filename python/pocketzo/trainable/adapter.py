"""Adapters: h + ReLU(h D + d) U + u of what the feed-forward part of each layer adds to the residual stream.

These are the adapters of Pfeiffer et al.: one a layer. D [width, R] begins as noise, and d, U and u as zeros.
"""

from __future__ import annotations

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.graph.attention import Scope
from pocketzo.trainable.editor import Added, Editor, cast
from pocketzo.trainable.spec import Adapter


def add_adapter(editor: Editor, part: Adapter) -> None:
    """Add a bottleneck to each layer.

    Raises
    ------
    BundleError
        There are no layers, or what a layer adds to the residual stream is no product of a projection.
    """
    for scope in editor.scopes:
        layers = editor.layers(scope)
        for layer in range(layers.count):
            _add_to_layer(editor, part, scope, layer)


def _add_to_layer(editor: Editor, part: Adapter, scope: Scope, layer: int) -> None:
    layers = editor.layers(scope)
    projections = layers.feed_forward(layer)
    if not projections:
        raise BundleError(
            f"train={part.text!r}: layer {layer} does not end in a projection, expected that of a feed-forward part: "
            "train lora"
        )
    node, index = layers.last_sum(layer)
    value = node.inputs[index]
    assert value is not None, "an input of a sum"
    projection = projections[0]
    width, dtype = projection.columns, projection.dtype
    name = f"{projection.stem}.adapter"
    build = editor.builder(scope, name)

    def new(suffix: str, *shape: int, scale: float = 0.0) -> ir.Value:
        return editor.parameter(Added(f"{name}.{suffix}", part.text, True, shape, noise_scale=scale))

    down, down_bias = new("down.weight", width, part.units, scale=(3 * width) ** -0.5), new("down.bias", part.units)
    up, up_bias = new("up.weight", part.units, width), new("up.bias", width)
    tensors = (down.name, down_bias.name, up.name, up_bias.name)
    editor.describe(AddedSpec("adapter", part.text, tuple(map(str, tensors))))
    x = cast(build, value, dtype, ir.DataType.FLOAT)
    inner = build.op("Relu", build.op("Add", build.op("MatMul", x, down), down_bias))
    delta = build.op("Add", build.op("MatMul", inner, up), up_bias)
    node.replace_input_with(index, build.op("Add", value, cast(build, delta, ir.DataType.FLOAT, dtype)))
