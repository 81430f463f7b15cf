"""Calibrate a prompt: the mean logit of each label word over some texts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.load import load_dataset
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.load import load
from pocketzo.tasks.parts import run
from pocketzo.tasks.registry import task_of

_ROWS: Final = 16


def mean_logits(bundle: Bundle, texts: Path) -> tuple[float, ...]:
    """Return the mean logit of each label word over a file of examples, whose labels are not read.

    Parameters
    ----------
    bundle : Bundle
        Of the task ``prompt``, complete in its folder, and not calibrated.
    texts : Path

    Raises
    ------
    BundleError
        The mean is not finite.
    DataError
        The file cannot be read; see :func:`load_dataset`.
    """
    data = load_dataset(texts, bundle, require_labels=False)
    task = task_of(bundle)
    model = load(bundle, verify="fast")
    total: NDArray[np.float64] = np.zeros((), np.float64)
    for start in range(0, len(data), _ROWS):
        batch = data.batch(np.arange(start, min(start + _ROWS, len(data))))
        total = total + run(model, task, batch, ["logits"])["logits"].sum(axis=0, dtype=np.float64)
    mean = np.asarray(total / len(data), np.float32)
    if not np.isfinite(mean).all():
        raise BundleError(f"{texts}: the logits of the label words are not finite on average: {mean.tolist()}")
    return tuple(float(value) for value in mean)
