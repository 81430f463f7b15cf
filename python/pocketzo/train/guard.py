"""Checks of the weights before a run: whether they are finite, and whether eps suits their size."""

from __future__ import annotations

import math

import numpy as np

from pocketzo.errors import TrainingError
from pocketzo.optim.optimizer import Optimizer

_CHUNK = 1 << 16  # elements
_HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11}  # relative, of a number's rounding
_MOST_LOSS = 0.01  # of the weights' root mean square, by the rounding of one shift


def check_weights(optimizer: Optimizer) -> None:
    """Check the trained weights, in one pass over them.

    Raises
    ------
    TrainingError
        A weight is not finite; names it.
    ValueError
        eps is so large that the way back from a shift would round the weights away, or so small that a shift would
        change none of them.
    """
    total = 0.0
    for name in optimizer.names:
        memory = optimizer.model.weights.segments(name)[0][0].reshape(-1)
        for at in range(0, memory.size, _CHUNK):
            chunk = memory[at : at + _CHUNK].astype(np.float32, copy=False)
            squares = float(np.dot(chunk, chunk))
            if not math.isfinite(squares):
                values = optimizer.model.weights[name]  # without the padding of prepacked memory
                bad = int(np.count_nonzero(~np.isfinite(values)))
                if bad:
                    raise TrainingError(
                        f"{optimizer.model.bundle.path}: {bad:,} of {values.size:,} elements of weight {name!r} are "
                        "not finite: every loss would be NaN. Export the model again, or leave this weight out of "
                        "'trainable'"
                    )
                squares = float(np.square(chunk, dtype=np.float64).sum())
            total += squares
    size = math.sqrt(total / optimizer.parameters)
    if not size:
        return
    dtype = "float16" if optimizer.model.bundle.is_fp16 else "float32"
    largest = size * _MOST_LOSS / _HALF_ULP[dtype]
    smallest = size * _HALF_ULP[dtype] / 4
    for eps in optimizer.shifts:
        if eps > largest:
            raise ValueError(
                f"eps is {eps:g}: a shift by eps z and back would round the weights by about "
                f"{eps * _HALF_ULP[dtype]:.2g}, and their root mean square is {size:.2g}; give an eps of at most "
                f"{largest:.2g}"
            )
        if eps < smallest:
            raise ValueError(
                f"eps is {eps:g}: a shift by eps z would change no weight, as they are rounded to about "
                f"{size * _HALF_ULP[dtype]:.2g} (their root mean square is {size:.2g}); give an eps of at least "
                f"{smallest:.2g}"
            )
