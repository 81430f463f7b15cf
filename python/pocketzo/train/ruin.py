"""Why losses are no longer finite: an update that ruined the weights, shifts that are too large, or the data."""

from __future__ import annotations

import math
from collections.abc import Callable

from pocketzo.errors import TrainingError


def explain(
    said: str, updated: int, loss: Callable[[int], float], go_back: Callable[[int], bool], *, is_fp16: bool
) -> TrainingError:
    """Return the error of a run whose losses are no longer finite; if an update ruined the weights, go back before it.

    Parameters
    ----------
    said : str
        Where losses were not finite.
    updated : int
        Number of the last step, from 1, that was not undone; its losses were finite. 0 if there is none.
    loss : callable
        ``loss(step) -> float``: the loss on the batch of a step, from 1, with the weights as they are now.
    go_back : callable
        ``go_back(steps) -> bool`` ends the journal, and sets the weights to those, after so many steps. False if the
        run has no journal.
    is_fp16 : bool
        Whether the weights are fp16.
    """
    if math.isfinite(loss(max(updated, 1))):
        hint = ", or a bundle in float32: fp16 ends at 65504" if is_fp16 else ""
        return TrainingError(
            f"{said}, though it is with weights that are not shifted: they are as before these steps. Try a smaller "
            f"eps{hint}"
        )
    if not updated:
        return TrainingError(
            f"{said}, nor is it with the weights of the bundle: there is no label that counts, or the model does not "
            f"fit the data"
        )
    kept = f"the weights in memory are those after step {updated}"
    if go_back(updated - 1):
        kept = f"the run now ends after step {updated - 1}" if updated > 1 else "they are again those before the run"
    return TrainingError(f"{said}: the update of step {updated} ruined the weights; {kept}. Try a smaller lr")
