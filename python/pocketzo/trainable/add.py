"""Add the tensors of a specification to a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from pocketzo.trainable.editor import Added, Editor
from pocketzo.trainable.lora import add_lora
from pocketzo.trainable.spec import Lora, Part


def add(model: ir.Model, parts: Sequence[Part]) -> list[Added]:
    """Add tensors, and the nodes that use them.

    Parameters
    ----------
    model : Model
        As the bundle has it, with its caches; changed in place.
    parts : sequence of Part

    Returns
    -------
    list of Added
        The initializers that were added, which have no elements yet.

    Raises
    ------
    BundleError
        A part does not fit to the graph.
    """
    if not any(isinstance(part, Lora) for part in parts):
        return []
    editor = Editor(model.graph)
    for part in parts:
        if isinstance(part, Lora):
            add_lora(editor, part)
    model.graph.sort()
    return list(editor.added.values())
