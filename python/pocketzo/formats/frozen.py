"""What of a model is not trained, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pocketzo.formats.fields import Fields


@dataclass(frozen=True)
class FrozenSpec:
    """A tensor that is not trained: a floating-point constant, or the integers of a quantised weight.

    Attributes
    ----------
    name : str
        Its name in the bundle's graph; that of the model's file, if nothing reads it.
    dtype : str
        The type of the elements in the model's file; as ONNX names it if numpy has none, such as ``"int4"``.
    elements : int
    reason : str
        Why it is not trained, "kind" or "kind: detail". The kinds are

        - ``request``: a weight that was not asked for,
        - ``folded``, ``layout``, ``type``: a weight of which the session would not see changes, or of a type that
          cannot be trained,
        - ``quantised``: integers, scales and zero points,
        - ``buffer``, ``constant``: not learned, or used as no operator uses a weight,
        - ``output``, ``unused``: an output of the graph, or read by nothing.
    """

    name: str
    dtype: str
    elements: int
    reason: str

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter of the model that could be trained in another form."""
        return self.kind in ("request", "folded", "layout", "type", "quantised")

    @property
    def is_surprise(self) -> bool:
        """Whether it is a floating-point parameter that was not trained, though nobody asked for that."""
        return self.kind in ("folded", "layout", "type")

    @property
    def kind(self) -> str:
        """The kind of reason, without its detail."""
        return self.reason.partition(":")[0]


def parse_frozen(fields: Fields) -> tuple[FrozenSpec, ...]:
    """Read the field ``frozen`` of a bundle's description."""
    return tuple(
        FrozenSpec(item.text("name"), item.text("dtype"), item.integer("elements", 0, 2**63 - 1), item.text("reason"))
        for item in fields.objects("frozen")
    )


def elements_by_kind(frozen: Iterable[FrozenSpec]) -> dict[str, int]:
    """Return the number of elements of each kind of reason, the largest first."""
    counts: dict[str, int] = {}
    for tensor in frozen:
        counts[tensor.kind] = counts.get(tensor.kind, 0) + tensor.elements
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
