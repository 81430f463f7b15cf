"""The kernels: regenerate a noise vector z, and apply it to arrays in place.

z is a pure function of (seed, tensor, draw, element): its bits do not depend on instruction set, thread count or
chunking. ``cpp/SPEC.md`` defines it. It is not a cryptographic generator.

The environment variable ``POCKETZO_ISA`` (``scalar``, ``neon``, ``avx2`` or ``avx512``) selects an instruction set.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import pocketzo._core as _core

__all__ = [
    "SPEC_VERSION",
    "available",
    "isa",
    "noise",
    "perturb",
    "products",
    "set_threads",
    "step",
    "threads",
    "use",
]

Distribution = Literal["gaussian", "rademacher"]
Rounding = Literal["nearest", "stochastic"]

SPEC_VERSION: int = _core.SPEC_VERSION
"""Version of cpp/SPEC.md, which every journal carries."""


def isa() -> str:
    """Return the name of the instruction set in use."""
    return _core.isa()


def available() -> list[str]:
    """Return the names of the instruction sets that this build has and this CPU can run, best first."""
    return _core.available()


def use(name: str) -> None:
    """Select the instruction set called ``name``.

    Raises
    ------
    ValueError
        ``name`` is unknown, or this build or this CPU lacks it.
    """
    _core.use(name)


def threads() -> int:
    """Return the number of threads that share the work, including the caller."""
    return _core.threads()


def set_threads(count: int) -> None:
    """Set the number of threads that share the work, including the caller. It does not change the bits.

    Raises
    ------
    ValueError
        ``count`` is not in 1 to 256.
    RuntimeError
        The system refuses to start so many threads.
    """
    _core.set_threads(count)


def noise(
    n: int, *, seed: int, tensor: int, draw: int, offset: int = 0, distribution: Distribution = "gaussian"
) -> NDArray[np.float32]:
    """Return elements ``offset`` to ``offset + n`` of a noise vector z.

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
        Standard normal values, at most 6.56 in magnitude; or +1 and -1 with equal probability.

    Returns
    -------
    ndarray
        float32, shape (n,).

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of range, or the distribution is unknown.
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
    """Perturb weights in place: w = fma(scale, z, w), rounded to float32 and then to the dtype of ``w``.

    Parameters
    ----------
    w : ndarray
        float32, float16 or bfloat16 (of the package ml_dtypes); any shape; C-contiguous and writable. Its elements are
        those of the tensor from ``offset`` on.
    seed, tensor, draw, offset, distribution
        As for :func:`noise`.
    scale : float
        Finite; rounded to float32.
    rounding : {"nearest", "stochastic"}
        Of 16-bit weights: to nearest even; or up or down at random, so that many changes far below one unit in the last
        place are right on average.

    Raises
    ------
    TypeError
        ``w`` is no array of such a dtype, or a number is of a wrong type.
    ValueError
        ``w`` is not contiguous, not aligned or not writable, a number is out of range, or a name is unknown.
    """
    _core.step(
        w,
        seed=seed,
        tensor=tensor,
        passes=[(draw, scale)],
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

    Computes, in this order and each line rounded to float32, the bits of separate passes::

        w = fma(scale, z[draw], w)
        w = fma(-decay, w, w)                 unless decay is 0
        w = fma(next_scale, z[next_draw], w)

    16-bit weights are rounded stochastically after the first two lines, which are the update, and to nearest after the
    last. Parameters and errors are those of :func:`perturb`.
    """
    _core.step(
        w,
        seed=seed,
        tensor=tensor,
        passes=[(draw, scale), (next_draw, next_scale)],
        decay=decay,
        offset=offset,
        distribution=distribution,
        rounding="stochastic",
    )


def products(
    n: int,
    vectors: Sequence[Mapping[int, float]],
    *,
    seed: int,
    tensor: int,
    offset: int = 0,
    distribution: Distribution = "gaussian",
) -> NDArray[np.float64]:
    """Return scalar products of sums of directions, which are regenerated and never stored.

    Vector i is what ``perturb`` with each draw and scale of ``vectors[i]``, in order, makes of ``n`` zeros.

    Parameters
    ----------
    n : int
        Number of elements, at least 1.
    vectors : sequence of mapping of int to float
        By draw, finite scales, which are rounded to float32. At least one vector.
    seed, tensor, offset, distribution
        As for :func:`noise`.

    Returns
    -------
    ndarray
        float64, shape (vectors, 2): of each vector, the product with the first one, and with itself. cpp/SPEC.md has
        the order of summation.

    Raises
    ------
    TypeError
        A number is of a wrong type.
    ValueError
        A number is out of range, the distribution is unknown, or there is no vector.
    """
    return _core.products(
        n,
        seed=seed,
        tensor=tensor,
        vectors=[list(vector.items()) for vector in vectors],
        offset=offset,
        distribution=distribution,
    )


if forced := os.environ.get("POCKETZO_ISA"):
    try:
        use(forced)
    except ValueError as error:
        raise ValueError(f"POCKETZO_ISA: {error}") from None
