"""Add the tensors of a specification to a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from pocketzo.formats.added import AddedSpec
from pocketzo.trainable.adapter import add_adapter
from pocketzo.trainable.editor import Added, Editor
from pocketzo.trainable.ia3 import add_ia3
from pocketzo.trainable.lora import add_lora
from pocketzo.trainable.prefix import add_prefix
from pocketzo.trainable.spec import Adapter, Choice, Ia3, Lora, Part, Prefix


def add(model: ir.Model, parts: Sequence[Part]) -> tuple[list[Added], tuple[AddedSpec, ...]]:
    """Add tensors, and the nodes that use them.

    Parameters
    ----------
    model : Model
        As the bundle has it, with its caches; changed in place.
    parts : sequence of Part
        In which order is of no importance: factors are applied to what LoRA has changed.

    Returns
    -------
    list of Added
        The initializers that were added, which have no elements yet.
    tuple of AddedSpec
        What belongs together, and where it was added.

    Raises
    ------
    BundleError
        A part does not fit to the graph.
    """
    if all(isinstance(part, Choice) for part in parts):
        return [], ()
    editor = Editor(model.graph)
    for part in parts:
        if isinstance(part, Lora):
            add_lora(editor, part)
    for part in parts:
        if isinstance(part, Ia3):
            add_ia3(editor, part)
        elif isinstance(part, Adapter):
            add_adapter(editor, part)
        elif isinstance(part, Prefix):
            add_prefix(editor, part)
    model.graph.sort()
    return list(editor.added.values()), editor.described
