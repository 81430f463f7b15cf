"""LoRA: a product of two small matrices beside a projection, y = base(x) + (alpha / r) (x A) B.

A [rows, r] begins as noise and B [r, columns] as zeros, so that the graph computes the same at first. Both are stored
as matrices; :func:`low_rank` is the one place where they are multiplied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import onnx_ir as ir

from pocketzo.errors import BundleError
from pocketzo.formats.added import AddedSpec
from pocketzo.graph.attention import Columns, Scope
from pocketzo.graph.build import Builder
from pocketzo.graph.projections import Projection
from pocketzo.trainable.editor import Added, Editor, cast
from pocketzo.trainable.spec import Lora

_TARGETS = ("query", "value")


def add_lora(editor: Editor, part: Lora) -> None:
    """Add LoRA to projections: those that compute queries and values, or those whose weights' names match.

    Raises
    ------
    BundleError
        There is no such projection, or its columns cannot be told apart from others.
    """
    count = 0
    for scope in editor.scopes:
        places: defaultdict[Projection, list[tuple[Columns, str]]] = defaultdict(list)
        for columns, name, role in _targets(editor, scope, part):
            places[columns.projection].append((columns, name))
            tensors = (f"{name}.lora_A", f"{name}.lora_B")
            place = editor.place(columns, role)
            editor.describe(AddedSpec("lora", part.text, tensors, part.alpha, place), columns.projection)
        for projection, found in places.items():
            found.sort(key=lambda place: place[0].start)
            changes = [(columns, _change(editor, part, columns, name)) for columns, name in found]
            editor.change_columns(scope, projection, changes)
            count += len(found)
    if not count:
        if part.targets is None:
            raise BundleError(
                f"train={part.text!r}: no attention was found in the graph: name the projections by targets=REGEX"
            )
        names = [projection.weight for scope in editor.scopes for projection in scope.projections.values()]
        raise BundleError(
            f"train={part.text!r}: 'targets' matches none of {len(names)} projections"
            f"{f', such as {names[0]!r}' if names else ''}, in these layers"
        )


def _targets(editor: Editor, scope: Scope, part: Lora) -> Iterator[tuple[Columns, str, str | None]]:
    """Yield the columns that are changed, what the names of their matrices begin with, and their role."""
    if part.targets is None:
        layers = part.layers.of(len(scope.attentions)) if scope.attentions else set()
        for layer in sorted(layers):
            attention = scope.attentions[layer]
            for role in _TARGETS:
                if role in attention.faults:
                    raise BundleError(
                        f"train={part.text!r}: the projection of the {role} of layer {layer} was not found, as "
                        f"{attention.faults[role]}: name projections by targets=REGEX, or export the model without "
                        "fused attention"
                    )
                yield attention.columns[role], attention.stem(role), role
        return
    chosen = [projection for projection in scope.projections.values() if part.targets.search(projection.weight)]
    if chosen and part.layers.text != "0-":
        found = editor.layers(scope)
        numbers = part.layers.of(found.count)
        chosen = [projection for projection in chosen if found.of(projection.node) in numbers]
    for projection in chosen:
        yield Columns(projection, 0, projection.columns), projection.stem, None


def _change(editor: Editor, part: Lora, columns: Columns, name: str) -> Callable[[Builder, ir.Value], ir.Value]:
    projection = columns.projection

    def change(build: Builder, y: ir.Value) -> ir.Value:
        rows = projection.rows
        down = Added(f"{name}.lora_A", part.text, part.both, (rows, part.rank), noise_scale=(3 * rows) ** -0.5)
        up = Added(f"{name}.lora_B", part.text, True, (part.rank, columns.count))
        x = cast(build, projection.x, projection.dtype, ir.DataType.FLOAT)
        delta = low_rank(build, x, editor.parameter(down), editor.parameter(up), part.alpha / part.rank)
        return build.op("Add", y, cast(build, delta, ir.DataType.FLOAT, projection.dtype))

    return change


def low_rank(build: Builder, x: ir.Value, down: ir.Value, up: ir.Value, factor: float) -> ir.Value:
    """Return factor (x A) B."""
    inner = build.op("MatMul", x, down)
    if factor != 1:
        inner = build.op("Mul", inner, build.constant(factor))
    return build.op("MatMul", inner, up)
