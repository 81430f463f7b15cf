"""Where a model's texts may be padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pocketzo.errors import NotPrepackableError
from pocketzo.runtime.onnx_proto import onnx_messages

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

COUNTING: Final = "GroupQueryAttention"
"""The operator of com.microsoft that takes the number of a row's tokens and assumes that they come first."""


def pads_right_only(bundle: Bundle) -> bool:
    """Whether padding before the tokens of a row would give other results, without an error.

    False without the package protobuf, which some installations on phones lack.
    """
    try:
        model = onnx_messages().Model.FromString(bundle.model_path.read_bytes())
    except (NotPrepackableError, OSError):
        return False
    return _has_counting(model.graph)


def _has_counting(graph: Any) -> bool:
    return any(
        node.op_type == COUNTING or any(_has_counting(body) for one in node.attribute for body in (one.g, *one.graphs))
        for node in graph.node
    )
