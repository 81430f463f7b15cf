"""The noise and what is done with it: z is a pure function of (seed, tensor, draw, element), bit for bit the same on
every instruction set, thread count and chunking. ``cpp/SPEC.md`` defines it; it is not a cryptographic generator.

The environment variable ``POCKETZO_ISA`` (``scalar``, ``neon``, ``avx2`` or ``avx512``) forces an instruction set.
"""  # noqa: D205

from __future__ import annotations

import operator
import os
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketzo import _core

__all__ = ["SPEC_VERSION", "available", "isa", "noise", "perturb", "set_threads", "step", "threads", "use"]

Distribution = Literal["gaussian", "rademacher"]
Rounding = Literal["nearest", "stochastic"]

SPEC_VERSION: int = _core.SPEC_VERSION
"""Version of cpp/SPEC.md, which every record carries."""


def isa() -> str:
    """Name of the instruction set in use."""
    return _core.isa()


def available() -> list[str]:
    """Names of the instruction sets that this build and this processor have, best first."""
    return _core.available()


def use(name: str) -> None:
    """Use the instruction set called ``name``; ``ValueError`` where it is unknown or cannot run here."""
    _core.use(name)


def threads() -> int:
    """Return the number of threads that share the work, the caller included."""
    return _core.threads()


def set_threads(count: int) -> None:
    """Share the work among ``count`` threads, 1 to 256. The bits do not depend on it."""
    _core.set_threads(count)


def noise(
    n: int, *, seed: int, tensor: int, draw: int, offset: int = 0, distribution: Distribution = "gaussian"
) -> NDArray[np.float32]:
    """Elements ``offset`` to ``offset + n`` of a direction z.

    Parameters
    ----------
    n : int
        Number of elements.
    seed, draw : int
        64-bit, unsigned.
    tensor : int
        32-bit, unsigned.
    offset : int
        First element, in the tensor's row-major order; 64-bit, unsigned.
    distribution : {"gaussian", "rademacher"}
        Standard normal values (at most 6.56 in size), or +1 and -1.

    Returns
    -------
    ndarray
        float32, shape (n,).

    Raises
    ------
    ValueError
        A number is out of its range.
    """
    n = operator.index(n)
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    out = np.empty(n, np.float32)
    _core.generate(out, seed=seed, tensor=tensor, draw=draw, offset=offset, distribution=distribution)
    return out


def perturb(
    w: NDArray[Any],
    *,
    seed: int,
    tensor: int,
    draw: int,
    scale: float,
    offset: int = 0,
    distribution: Distribution = "gaussian",
    rounding: Rounding = "nearest",
) -> None:
    """Shift weights in place: w = fma(scale, z, w), rounded once to float32, and then to what ``w`` holds.

    Parameters
    ----------
    w : ndarray
        float32, float16 or bfloat16 (that of the package ml_dtypes), of any shape, C-contiguous and writable; its
        elements are ``offset`` and following of the tensor.
    seed, tensor, draw, offset, distribution
        As for :func:`noise`.
    scale : float
        Finite; rounded to float32.
    rounding : {"nearest", "stochastic"}
        Of 16-bit weights: to nearest even, or up or down at random, so that many shifts much smaller than one unit in
        the last place are right on average.

    Raises
    ------
    TypeError
        ``w`` is not an array of such a type.
    ValueError
        ``w`` is not contiguous or not writable, or a number is out of its range.
    """
    passes = [(draw, scale)]
    _core.step(
        w,
        seed=seed,
        tensor=tensor,
        passes=passes,
        decay=0.0,
        offset=offset,
        distribution=distribution,
        rounding=rounding,
    )


def step(
    w: NDArray[Any],
    *,
    seed: int,
    tensor: int,
    draw: int,
    scale: float,
    next_draw: int,
    next_scale: float,
    decay: float = 0.0,
    offset: int = 0,
    distribution: Distribution = "gaussian",
) -> None:
    """Finish one step and begin the next in one pass over the weights.

    In this order, each line rounded to float32, so that the result equals that of separate passes bit for bit::

        w = fma(scale, z[draw], w)
        w = fma(-decay, w, w)                 unless decay is 0
        w = fma(next_scale, z[next_draw], w)

    16-bit weights are rounded stochastically after the first two lines, which are an update, and to nearest after the
    last. Parameters and errors are those of :func:`perturb`.
    """
    passes = [(draw, scale), (next_draw, next_scale)]
    _core.step(
        w,
        seed=seed,
        tensor=tensor,
        passes=passes,
        decay=decay,
        offset=offset,
        distribution=distribution,
        rounding="stochastic",
    )


if forced := os.environ.get("POCKETZO_ISA"):
    try:
        use(forced)
    except ValueError as error:
        raise ValueError(f"POCKETZO_ISA: {error}") from None
