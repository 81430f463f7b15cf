"""Inputs of a graph that have an element for each token, and the axes of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pocketzo.formats.bundle import ValueSpec

TOKEN_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs with an element for each token, [batch, tokens] or [sections, batch, tokens]."""


def sections(spec: ValueSpec) -> int | None:
    """Return 3 for positions in time, height and width, as of Qwen-VL: [sections, batch, length]; else None."""
    first = spec.shape[0] if spec.name == "position_ids" and len(spec.shape) == 3 else None
    return first if isinstance(first, int) else None


def row_axis(spec: ValueSpec) -> int:
    """Return the axis of rows of an input."""
    return 0 if sections(spec) is None else 1
