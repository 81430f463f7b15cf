"""The tensors that a set adds to a model, and where: what merging and adapters in other formats need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pocketzo.formats.fields import Fields

Kind = Literal["lora", "ia3", "adapter", "prefix", "parallel-adapter"]
KINDS: Final = ("lora", "ia3", "adapter", "prefix", "parallel-adapter")
ROLES: Final = ("query", "key", "value")
_NAMES: Final = re.compile(r"^prefix\.|\.(lora_[AB]|ia3|adapter\.(down|up)\.(weight|bias))$")


@dataclass(frozen=True)
class Place:
    """Where a projection is changed: y = x W + b, W [rows, columns].

    Attributes
    ----------
    weight : str
        The tensor of W.
    rows, columns : int
    transposed : bool
        Whether the tensor is stored [columns, rows].
    start, count : int
        The columns that are changed; the rows, if the input is.
    role : str or None
        What these columns compute, if others compute something else: ``"query"``, ``"key"`` or ``"value"``.
    input : bool
        Whether x is changed instead of y.
    biases : tuple of str
        The tensors that are part of b.
    fault : str or None
        Why the change cannot be folded into W and b; None if it can, as far as the graph is concerned.
    """

    weight: str
    rows: int
    columns: int
    transposed: bool
    start: int
    count: int
    role: str | None = None
    input: bool = False
    biases: tuple[str, ...] = ()
    fault: str | None = None


@dataclass(frozen=True)
class AddedSpec:
    """Tensors that were added together.

    Attributes
    ----------
    kind : {"lora", "ia3", "adapter", "prefix", "parallel-adapter"}
    part : str
        The part of ``--train``.
    tensors : tuple of str
        A [rows, r] and B [r, count] of LoRA; the factors of (IA)3, [count].
    alpha : float or None
        LoRA adds (alpha / r) x A B.
    place : Place or None
        None for the last three.
    """

    kind: Kind
    part: str
    tensors: tuple[str, ...]
    alpha: float | None = None
    place: Place | None = None

    def described(self) -> dict[str, Any]:
        """Return the item of the field ``added``."""
        fields: dict[str, Any] = {"kind": self.kind, "set": self.part, "tensors": list(self.tensors)}
        if self.alpha is not None:
            fields["alpha"] = self.alpha
        if self.place is not None:
            fields |= vars(self.place) | {"biases": list(self.place.biases)}
        return fields


def parse_added(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> tuple[AddedSpec, ...]:
    """Read the field ``added`` of a bundle's description, which has tensors of these shapes."""
    found = []
    for item in fields.objects("added"):
        kind = item.choice("kind", KINDS)
        place = _place(item) if kind in ("lora", "ia3") else None
        alpha = item.number("alpha") if kind == "lora" else None
        tensors = item.names("tensors")
        fits = all(name in shapes for name in tensors)
        if fits and kind == "lora" and place is not None:
            sizes = [shapes[name] for name in tensors]
            rank = sizes[0][-1:]
            fits = sizes == [(place.rows, *rank), (*rank, place.count)]
        elif fits and place is not None:
            fits = [shapes[name] for name in tensors] == [(place.count,)]
        if not fits:
            raise item.error("tensors", "names of tensors whose shapes fit to the place")
        found.append(AddedSpec(kind, item.text("set"), tensors, alpha, place))  # type: ignore[arg-type]  # checked
    return tuple(found)


def _place(item: Fields) -> Place:
    rows, columns = (item.integer(key, 1, 2**31 - 1) for key in ("rows", "columns"))
    size = rows if item.boolean("input") else columns
    start = item.integer("start", 0, size - 1)
    return Place(
        weight=item.text("weight"),
        rows=rows,
        columns=columns,
        transposed=item.boolean("transposed"),
        start=start,
        count=item.integer("count", 1, size - start),
        role=None if item.optional_text("role") is None else item.choice("role", ROLES),
        input=item.boolean("input"),
        biases=item.names("biases", empty=True),
        fault=item.optional_text("fault"),
    )


def looks_added(names: Iterable[str]) -> str | None:
    """Return the first name that a set gives to what it adds: bundles had no field ``added`` at first."""
    return next((name for name in names if _NAMES.search(name)), None)
