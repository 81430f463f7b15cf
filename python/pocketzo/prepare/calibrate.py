"""Calibrate a prompt: the mean logit of each label word over some texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pocketzo.data.load import load_dataset
from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime.load import load

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
    inputs = tuple(value for value in bundle.inputs if value.name != "positions")  # no column of a file fills it
    data = load_dataset(texts, replace(bundle, inputs=inputs), require_labels=False)
    mask_token = None if bundle.task is None else bundle.task.settings["mask_token"]
    model = load(bundle, verify="fast")
    total: NDArray[np.float64] = np.zeros((), np.float64)
    for start in range(0, len(data), _ROWS):
        batch = data.batch(np.arange(start, min(start + _ROWS, len(data))))
        ids = batch["input_ids"]
        real = batch["attention_mask"] != 0 if "attention_mask" in batch else np.ones(ids.shape, bool)
        counted = real if mask_token is None else ids == mask_token
        if not counted.any(axis=1).all():
            raise BundleError(f"{texts}: the mask of the template is cut off: allow more tokens by --max-length")
        last = ids.shape[1] - 1 - np.argmax(counted[:, ::-1], axis=1)
        logits = model.run({**batch, "positions": np.arange(len(ids)) * ids.shape[1] + last}, ["logits"])["logits"]
        total = total + logits.sum(axis=0, dtype=np.float64)
    mean = np.asarray(total / len(data), np.float32)
    if not np.isfinite(mean).all():
        raise BundleError(f"{texts}: the logits of the label words are not finite on average: {mean.tolist()}")
    return tuple(float(value) for value in mean)
