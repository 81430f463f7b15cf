"""Choose the weights that are trained, and count all others, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from pocketzo.errors import BundleError, DeadWeightError
from pocketzo.formats.frozen import FrozenSpec, elements_by_kind
from pocketzo.graph.quantised import REASON, quantised_tensors
from pocketzo.graph.weight import Weight

UNASKED = "request"


def choose(graph: ir.Graph, weights: Sequence[Weight], wanted: Callable[[str], bool] | None) -> set[str]:
    """Return the names of the trainable weights.

    Parameters
    ----------
    graph : Graph
        As :func:`extract_weights` leaves it.
    weights : sequence of Weight
        All that it returned.
    wanted : callable, optional
        Selects weights by name. By default all that can be trained are.

    Raises
    ------
    BundleError
        There are none, or `wanted` selects none, or one of a type that cannot be trained.
    DeadWeightError
        `wanted` selects a weight of which the runtime would not see changes.
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
    if wanted is None:
        return {weight.name for weight in able}
    chosen = [weight for weight in parameters if wanted(weight.name)]
    if not chosen:
        other = next((weight for weight in weights if wanted(weight.name)), None)
        frozen = f"; {other.name!r} is frozen ({other.frozen})" if other is not None else ""
        raise BundleError(
            f"'trainable' matches none of the {len(able)} weights that can be trained, such as {able[0].name!r}{frozen}"
        )
    for weight in chosen:
        if weight.frozen is not None:
            error = BundleError if weight.frozen.startswith("type") else DeadWeightError
            raise error(
                f"weight {weight.name!r} cannot be trained ({weight.frozen}); leave it out of 'trainable', or export "
                f"the model in {_remedy(weight.frozen)}"
            )
    return {weight.name for weight in chosen}


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
