"""The weights that can be trained, and a count of all others, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from pocketzo.errors import BundleError, DeadWeightError
from pocketzo.formats.frozen import FrozenSpec, elements_by_kind
from pocketzo.graph.quantised import REASON, quantised_tensors
from pocketzo.graph.weight import Weight

UNASKED = "request"


def able_weights(graph: ir.Graph, weights: Sequence[Weight]) -> list[Weight]:
    """Return the weights that can be trained.

    Parameters
    ----------
    graph : Graph
        As :func:`extract_weights` leaves it.
    weights : sequence of Weight
        All that it returned.

    Raises
    ------
    BundleError
        There are none.
    """
    parameters = [weight for weight in weights if weight.parameter]
    able = [weight for weight in parameters if weight.frozen is None]
    if not able:
        counts = elements_by_kind(count_frozen(graph, weights, set()))
        found = ", ".join(f"{count:,} numbers {kind}" for kind, count in counts.items())
        message = f"the graph has no float32 or float16 weights that could be trained; frozen are: {found or 'none'}"
        for weight in parameters[:1]:
            message += f" ({weight.name!r}: {weight.frozen}); export the model in {_remedy(str(weight.frozen))}"
        raise BundleError(message)
    return able


def check_able(pattern: str, chosen: Sequence[Weight], able: Sequence[Weight], weights: Sequence[Weight]) -> None:
    """Check that a regular expression selects weights, and only those that can be trained.

    Raises
    ------
    BundleError
        It selects none, or one of a type that cannot be trained.
    DeadWeightError
        It selects a weight of which the runtime would not see changes.
    """
    if not chosen:
        other = next((weight for weight in weights if re.search(pattern, weight.name)), None)
        frozen = f"; {other.name!r} is frozen ({other.frozen})" if other is not None else ""
        raise BundleError(
            f"train={pattern!r} matches none of the {len(able)} weights that can be trained, such as "
            f"{able[0].name!r}{frozen}"
        )
    for weight in chosen:
        if weight.frozen is not None:
            error = BundleError if weight.frozen.startswith("type") else DeadWeightError
            raise error(
                f"weight {weight.name!r} cannot be trained ({weight.frozen}); leave it out of train={pattern!r}, or "
                f"export the model in {_remedy(weight.frozen)}"
            )


def _remedy(reason: str) -> str:
    return "float32" if reason.startswith("type") else "a form in which nodes read it as it is stored"


def count_frozen(graph: ir.Graph, weights: Sequence[Weight], chosen: set[str]) -> tuple[FrozenSpec, ...]:
    """Return all floating-point constants of a graph that are not trained, and its quantised weights.

    Parameters
    ----------
    graph : Graph
        As :func:`extract_weights` leaves it.
    weights : sequence of Weight
        All that it returned.
    chosen : set of str
        The names of the trainable weights.
    """
    counted = [weight for weight in weights if weight.counted and weight.name not in chosen]
    floats = [
        FrozenSpec(weight.name, weight.array.dtype.name, weight.array.size, weight.frozen or UNASKED)
        for weight in counted
        if weight.parameter or weight.frozen is not None
    ]
    return *floats, *(FrozenSpec(*tensor, REASON) for tensor in quantised_tensors(graph))
