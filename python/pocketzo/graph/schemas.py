"""Check the nodes of a graph against the schemas of their operators: they are read later as what those say."""

from __future__ import annotations

from typing import Any, Final, cast

import onnx.defs
import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.graph.names import title_of

_INTEGERS: Final = ("accuracy_level", "axis", "gather_axis", "to", "transA", "transB")
"""Attributes of operators that onnx does not know, which PocketZO reads."""


def check_nodes(model: ir.Model) -> None:
    """Check that nodes have the inputs and attributes that their operators need, of the right types of attributes.

    Raises
    ------
    BundleError
        One is missing, or of another type; names the node.
    """
    for node in model.graph.all_nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get(domain, 1), domain)
        except onnx.defs.SchemaError:  # onnx has no such operator
            _check_attributes(node, dict.fromkeys(_INTEGERS, ir.AttributeType.INT))
            continue
        _check_inputs(node, schema)
        attributes = schema.attributes.items()
        kinds = {name: ir.AttributeType(cast("Any", attribute.type).value) for name, attribute in attributes}
        _check_attributes(node, kinds, [name for name, attribute in attributes if attribute.required])


def _check_inputs(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    single = [value.option == onnx.defs.OpSchema.FormalParameterOption.Single for value in schema.inputs]
    missing = any(value is None and one for value, one in zip(node.inputs, single, strict=False))
    few, many = schema.min_input, schema.max_input
    if missing or not few <= len(node.inputs) <= many or len(node.outputs) < schema.min_output:
        takes = few if few == many else f"{few} to {many}" if many < 2**31 - 1 else f"{few} or more"
        raise BundleError(
            f"node {title_of(node)} has {len(node.inputs)} inputs{', one of them empty,' if missing else ''} and "
            f"{len(node.outputs)} outputs; its operator takes {takes} and has {schema.min_output} or more"
        )


def _check_attributes(node: ir.Node, kinds: dict[str, ir.AttributeType], required: list[str] | None = None) -> None:
    for name in required or ():
        if name not in node.attributes:
            raise BundleError(f"node {title_of(node)} has no attribute {name!r}, which its operator needs")
    for name, attribute in node.attributes.items():
        if attribute.type != kinds.get(name, attribute.type):
            raise BundleError(
                f"node {title_of(node)}: the attribute {name!r} is of type {attribute.type.name}, its operator takes "
                f"{kinds[name].name}"
            )
