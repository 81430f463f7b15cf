"""Loss and accuracy over a dataset."""

from __future__ import annotations

import math

import numpy as np

from pocketzo.data.order import Data
from pocketzo.errors import TrainingError
from pocketzo.runtime.model import Model


def evaluate(model: Model, data: Data, *, batch_size: int = 32) -> dict[str, float]:
    """Evaluate a model.

    Returns
    -------
    dict
        ``count`` of examples, ``loss``, their mean loss (graphs with a loss), and ``accuracy`` (graphs with logits and
        data with labels).
    """
    bundle = model.bundle
    wanted = [name for name in (bundle.loss, bundle.logits) if name is not None]
    if not wanted:
        raise TrainingError(f"{bundle.path}: the graph has neither a loss nor logits to evaluate")
    if not len(data):
        raise TrainingError("there are no examples to evaluate")
    loss = 0.0
    right = labelled = counted = 0
    for at in range(0, len(data), batch_size):
        indices = np.arange(at, min(at + batch_size, len(data)))
        batch = data.batch(indices)
        got = model.run(batch, wanted)
        labels = batch.get("labels")
        # The loss of a batch is a mean over what counts in it: examples, or tokens that have a label.
        weight = int((labels != -100).sum()) if labels is not None and labels.ndim > 1 else len(indices)
        if bundle.loss is not None and weight:
            loss += float(got[bundle.loss]) * weight
            counted += weight
        if bundle.logits is not None and labels is not None:
            right += int((got[bundle.logits].argmax(-1) == labels).sum())
            labelled += weight
    result: dict[str, float] = {"count": len(data)}
    if bundle.loss is not None:
        result["loss"] = loss / counted if counted else math.nan
    if labelled:
        result["accuracy"] = right / labelled
    return result
