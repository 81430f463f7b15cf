"""Convert graphs of old operator sets."""

from __future__ import annotations

from typing import Final

import onnx
import onnx.version_converter

from pocketzo.errors import BundleError

MIN_OPSET: Final = 13


def convert_old(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Return a model of an operator set before 13 in operator set 13.

    External data stays where it is: the converter sees its description only.

    Raises
    ------
    BundleError
        The converter does not know an operator, or how it was changed.
    """
    external = {
        tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    try:
        converted = onnx.version_converter.convert_version(proto, MIN_OPSET)
    except Exception:  # RuntimeError or its own errors, whose texts are assertions of C++
        raise BundleError(too_old(version, "onnx does not convert it")) from None
    for tensor in converted.graph.initializer:
        if tensor.name in external:  # onnx 1.17 leaves a tensor without elements
            tensor.CopyFrom(external[tensor.name])
    return converted


def too_old(version: int, reason: str) -> str:
    """Return the message that refuses an operator set."""
    return f"operator set {version}, and {reason}; export the model with opset {MIN_OPSET} or later"
