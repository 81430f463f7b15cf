"""Check the attributes of a graph's nodes: they are read later as what the operators say that they are."""

from __future__ import annotations

from typing import Any, Final, cast

import onnx.defs
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.names import title_of

_INTEGERS: Final = ("accuracy_level", "axis", "gather_axis", "to", "transA", "transB")
"""Attributes of operators that onnx does not know, which PocketZO reads."""


def check_attributes(model: ir.Model) -> None:
    """Check that attributes have the types that their operators demand, and that required ones are there.

    Raises
    ------
    BundleError
        One is missing, or of another type; names the node.
    """
    for node in model.graph.all_nodes():
        for name, (required, kind) in _wanted(node, model.opset_imports).items():
            given = node.attributes.get(name)
            if given is None and required:
                raise BundleError(f"node {title_of(node)} has no attribute {name!r}, which its operator needs")
            if given is not None and given.type != kind:
                raise BundleError(
                    f"node {title_of(node)}: the attribute {name!r} is of type {given.type.name}, its operator takes "
                    f"{kind.name}"
                )


def _wanted(node: ir.Node, versions: dict[str, int]) -> dict[str, tuple[bool, ir.AttributeType]]:
    """Return of each attribute of an operator whether it is required, and its type."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(domain, 1), domain)
    except onnx.defs.SchemaError:  # onnx has no such operator
        return dict.fromkeys(_INTEGERS, (False, ir.AttributeType.INT))
    return {
        name: (attribute.required, ir.AttributeType(cast("Any", attribute.type).value))
        for name, attribute in schema.attributes.items()
    }
