"""Where a model's texts may be padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pocketzo.runtime.onnx_proto import all_nodes, try_read_graph

if TYPE_CHECKING:
    from pocketzo.formats.bundle import Bundle

COUNTING: Final = "GroupQueryAttention"
"""The operator of com.microsoft that takes the number of a row's tokens and assumes that they come first."""


def pads_right_only(bundle: Bundle) -> bool:
    """Whether padding before the tokens of a row would give other results, without an error.

    False without the package protobuf, which some installations on phones lack.
    """
    model = try_read_graph(bundle.model_path)
    return model is not None and any(node.op_type == COUNTING for node in all_nodes(model.graph))
