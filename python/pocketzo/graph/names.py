"""Names of weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import onnx_ir as ir

from pocketzo.graph.roles import roles_of
from pocketzo.graph.weight import Use, Weight

# Names that exporters generate: "onnx::MatMul_370", "val_87", "/bert/Constant_3_output_0", "1234".
_GENERATED = re.compile(r"onnx::|/|\d+$|(val|const|constant|initializer|tensor|t)_?\d*$|.*_output_\d+$", re.IGNORECASE)


def is_generated(name: str) -> bool:
    """Return whether an exporter generated a name."""
    return _GENERATED.match(name) is not None


def value_names(graph: ir.Graph) -> set[str]:
    """Return the names of all values of a graph and of its subgraphs."""
    names = {output.name for node in graph.all_nodes() for output in node.outputs}
    for scope in (graph, *graph.subgraphs()):
        names.update(value.name for value in scope.inputs)
        names.update(scope.initializers)
    return {name for name in names if name}


def unique(name: str, taken: set[str]) -> str:
    """Return a name, with a number appended if it is taken, and add it to `taken`."""
    count = 1
    found = name
    while found in taken:
        count += 1
        found = f"{name}.{count}"
    taken.add(found)
    return found


def rename_shadowed(graph: ir.Graph) -> None:
    """Give each initializer a name that no value inside a subgraph has: the two would be taken for one."""
    inner = {value.name for scope in graph.subgraphs() for value in scope.inputs}
    inner.update(output.name for node in graph.all_nodes() if node.graph is not graph for output in node.outputs)
    taken = value_names(graph)
    for value in tuple(graph.initializers.values()):
        if value.name in inner:
            value.name = unique(str(value.name), taken)


def name_weights(weights: list[Weight], taken: set[str]) -> None:
    """Give each weight a unique name: its own, else one from the module that uses it, else the generated one."""
    named: dict[Use, str] = {}
    for weight in sorted(weights, key=lambda weight: is_generated(weight.name)):
        name = weight.name
        if is_generated(name):
            name = _name_from_use(weight, named) or name
        weight.name = unique(name, taken)
        named.update((use, weight.name) for use in weight.uses)


def _name_from_use(weight: Weight, named: Mapping[Use, str]) -> str | None:
    node, index = (weight.uses + weight.transposed)[0]
    role = roles_of(node).get(index)
    scope = scope_of(node)
    if role is None or scope is None:
        return None
    if role == "weight":
        # The old exporter's scopes lack modules called outside their parent's forward; but a bias keeps its name.
        for reader in (node, *node.outputs[0].consumers()):
            for position in range(len(reader.inputs)):
                module, _, attribute = named.get((reader, position), "").rpartition(".")
                if attribute == "bias" and module.split(".")[-1] == scope.split(".")[-1]:
                    return f"{module}.weight"
    return f"{scope}.{role}"


def scope_of(node: ir.Node) -> str | None:
    """Return the torch name of the module that a node comes from: "encoder.layer.0.attention.self.query"."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:  # the new exporter: "['', 'encoder', ..., 'linear_3']"
        names = re.findall(r"'([^']*)'", scopes)
        return names[-2] or None if len(names) > 1 else None
    if node.name and node.name.startswith("/"):  # the old exporter: "/encoder/layer.0/attention/self/query/MatMul"
        return ".".join(node.name.split("/")[1:-1]) or None
    return None


def title_of(node: ir.Node, *, bare: bool = False) -> str:
    """Return a node's name for messages; with ``bare``, for use in a weight's name."""
    name = node.name or next((output.name for output in node.outputs if output.name), "")
    return name.strip("/").replace("/", ".") if bare else f"{name!r} ({node.op_type})"


def free_names(graph: ir.Graph, names: Collection[str]) -> None:
    """Rename the values that have these names, but for the graph's inputs; in subgraphs, too."""
    inputs, taken = set(graph.inputs), value_names(graph) | set(names)
    for node in graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None and value not in inputs and value.name in names:
                value.name = unique(f"{value.name}_in_graph", taken)
