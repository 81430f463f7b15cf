"""What the command line says about the tensors that are not trained."""

from __future__ import annotations

from pocketzo.cli.console import fact, say
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.frozen import elements_by_kind

_NAMED = 5


def say_frozen(bundle: Bundle) -> None:
    """Print how many numbers are frozen, by reason, and name weights that cannot be trained as they are."""
    if bundle.frozen:
        counts = elements_by_kind(bundle.frozen)
        say(f"frozen: {fact('', {kind: count for kind, count in counts.items() if count})}")
    surprises = [tensor for tensor in bundle.frozen if tensor.is_surprise]
    for tensor in surprises[:_NAMED]:
        say(f"  {tensor.name} ({tensor.elements:,} numbers): {tensor.reason}")
    if len(surprises) > _NAMED:
        say(f"  and {len(surprises) - _NAMED} more; see them by: pocketzo info --tensors")


def tensor_lines(bundle: Bundle) -> list[str]:
    """Return a table of all stored tensors, and of those that the graph keeps: a line for each, with its whole name."""
    reasons = {tensor.name: tensor.reason for tensor in bundle.frozen}
    rows = [("weight", "type", "shape", "trainable")]
    for stored in bundle.tensors:
        shape = " x ".join(map(str, stored.shape)) or "scalar"
        sets = ", ".join(stored.sets)
        why = f"yes ({sets})" if sets else f"no ({reasons.get(stored.name, 'constant')})"
        rows.append((stored.name, stored.dtype, shape, why))
    listed = {tensor.name for tensor in bundle.tensors}
    for tensor in bundle.frozen:
        if tensor.name not in listed:
            rows.append((tensor.name, tensor.dtype, f"{tensor.elements:,} in the graph", f"no ({tensor.reason})"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
