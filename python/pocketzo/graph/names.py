"""What weights are called."""

from __future__ import annotations

import re
from collections.abc import Mapping

from onnx import NodeProto

from pocketzo.graph.proto import value_names
from pocketzo.graph.roles import ROLES
from pocketzo.graph.weight import Draft, Weight

_GENERATED = re.compile(r"onnx::|/|\d+$|(val|const|constant|initializer|tensor|t)_?\d*$|.*_output_\d+$", re.IGNORECASE)


def name_weights(draft: Draft, weights: list[Weight]) -> None:
    """Give each weight a unique name: its own, else one made from the module that uses it, else the exporter's."""
    taken = value_names(draft.graph) | {weight.name for weight in draft.large}
    named: dict[tuple[int, int], str] = {}  # by node and input
    for weight in sorted(weights, key=lambda weight: not _is_named(weight)):
        name = weight.name
        if not _is_named(weight):
            name = _name_from_use(draft, weight, named) or name
        count = 1
        unique = name
        while unique in taken:
            count += 1
            unique = f"{name}.{count}"
        taken.add(unique)
        weight.name = unique
        named.update(((id(node), index), unique) for node, index in weight.uses)


def is_generated(name: str) -> bool:
    """Return whether an exporter made a name up."""
    return _GENERATED.match(name) is not None


def _is_named(weight: Weight) -> bool:
    return not is_generated(weight.name)


def _name_from_use(draft: Draft, weight: Weight, named: Mapping[tuple[int, int], str]) -> str | None:
    node, index = (weight.uses + weight.transposed)[0]
    role = ROLES.get(node.op_type, {}).get(index)
    scope = scope_of(node)
    if role is None or scope is None:
        return None
    if role == "weight":
        # The old exporter's scopes miss modules that are called past their parent's forward; a bias keeps its name.
        for reader in [node, *draft.readers[node.output[0]]]:
            for position in range(len(reader.input)):
                module, _, attribute = named.get((id(reader), position), "").rpartition(".")
                if attribute == "bias" and module.split(".")[-1] == scope.split(".")[-1]:
                    return f"{module}.weight"
    return f"{scope}.{role}"


def scope_of(node: NodeProto) -> str | None:
    """Return the module that a node comes from, as torch names it: "encoder.layer.0.attention.self.query"."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":  # the new exporter: "['', 'encoder', ..., 'linear_3']"
            scopes = re.findall(r"'([^']*)'", entry.value)
            return scopes[-2] or None if len(scopes) > 1 else None
    if node.name.startswith("/"):  # the old exporter: "/encoder/layer.0/attention/self/query/MatMul"
        return ".".join(node.name.split("/")[1:-1]) or None
    return None


def title_of(node: NodeProto, *, bare: bool = False) -> str:
    """Return what a message calls a node; ``bare`` as a part of a weight's name."""
    name = node.name or next(iter(node.output), "")
    return name.strip("/").replace("/", ".") if bare else f"{name!r} ({node.op_type})"
