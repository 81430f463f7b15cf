"""(IA)3: a factor for each key, each value, and each inner activation of the feed-forward part; all begin as ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.graph.attention import Columns, Scope
from pocketzo.graph.build import Builder
from pocketzo.graph.names import title_of
from pocketzo.graph.projections import Projection
from pocketzo.graph.read import shape_of
from pocketzo.trainable.editor import Added, Editor, cast
from pocketzo.trainable.spec import Ia3

_ROLES = ("key", "value")
Change = Callable[[Builder, ir.Value], ir.Value]


def add_ia3(editor: Editor, part: Ia3) -> None:
    """Add factors to keys, values and inner activations.

    Raises
    ------
    BundleError
        The projections of keys, values or the feed-forward part of a layer were not found.
    """
    for scope in editor.scopes:
        layers = editor.layers(scope)
        for layer, attention in enumerate(scope.attentions):
            changes: defaultdict[Projection, list[tuple[Columns, Change]]] = defaultdict(list)
            for role in _ROLES:
                if role in attention.faults:
                    raise BundleError(
                        f"train={part.text!r}: the projection of the {role} of layer {layer} was not found, as "
                        f"{attention.faults[role]}: export the model without fused attention, or train lora"
                    )
                columns = attention.columns[role]
                stem, projection = attention.stem(role), columns.projection
                biases = tuple(str(value.name) for value, _ in projection.biases)
                sizes = [(shape_of(value) or [])[-1:] for value, _ in projection.biases]
                whole = all(size == [projection.columns] for size in sizes)
                fault = None if whole else f"{projection.weight!r} has a bias of another size"
                place = replace(editor.place(columns, role), biases=biases, fault=fault)
                editor.describe(AddedSpec("ia3", part.text, (f"{stem}.ia3",), place=place), projection)
                factor = _factor(editor, part, stem, columns.count, projection.dtype)
                changes[columns.projection].append((columns, factor))
            for projection, found in changes.items():
                editor.change_columns(scope, projection, found)
            _scale_inner(editor, part, scope, layer, layers.feed_forward(layer))


def _scale_inner(editor: Editor, part: Ia3, scope: Scope, layer: int, projections: list[Projection]) -> None:
    if len(projections) != 1:
        raise BundleError(
            f"train={part.text!r}: layer {layer} ends in {len(projections)} projections beside that of its attention, "
            "expected the one of the feed-forward part: train lora or adapter:R"
        )
    (projection,) = projections
    build = editor.builder(scope, projection.stem)
    others = [node for node, _ in projection.x.uses() if node not in _reads_of(projection, build)]
    fault = f"node {title_of(others[0])} reads the scaled activations, too" if others else None
    place = replace(editor.place(Columns(projection, 0, projection.rows)), input=True, role=None, fault=fault)
    editor.describe(AddedSpec("ia3", part.text, (f"{projection.stem}.ia3",), place=place), projection)
    factor = _factor(editor, part, projection.stem, projection.rows, projection.dtype)
    projection.x = editor.rewire(projection.x, lambda: factor(build, projection.x))


def _reads_of(projection: Projection, build: Builder) -> set[ir.Node]:
    """Return the nodes that read the activations for a projection: its own, and those of its LoRA."""
    added = {node for node, _ in projection.x.uses() if str(node.name).startswith(build.prefix)}
    return {projection.node, *added}


def _factor(editor: Editor, part: Ia3, stem: str, size: int, dtype: ir.DataType) -> Change:
    def change(build: Builder, value: ir.Value) -> ir.Value:
        factor = editor.parameter(Added(f"{stem}.ia3", part.text, True, (size,), fill=1.0))
        product = build.op("Mul", cast(build, value, dtype, ir.DataType.FLOAT), factor)
        return cast(build, product, ir.DataType.FLOAT, dtype)

    return change
