"""An independent implementation of the noise specification, version 1, in numpy. It shares no line with the kernels.

It is slow and meant to be read beside cpp/SPEC.md, whose sections the docstrings name. Philox uses uint64. All fp32
operations are correctly rounded: numpy's ``+ - *`` and ``sqrt``, and :func:`fma32`, which test_reference.py checks
against exact fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

Distribution = Literal["gaussian", "rademacher"]
Storage = Literal["float16", "bfloat16"]
Rounding = Literal["nearest", "stochastic", "later"]
Role = Literal["shift", "gather", "follow"]
U32: TypeAlias = NDArray[np.uint32]
F32: TypeAlias = NDArray[np.float32]
Words: TypeAlias = int | NDArray[np.uint64]

SPEC_VERSION = 1
LANES = 16
SLOTS = 4
BLOCK = LANES * SLOTS  # elements that share 16 quads
SECTION, UNIT = 1 << 11, 1 << 16  # elements that are summed together
ROWS = 128  # Rademacher: sign bits in the four words of a quad

_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


# ---- Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) ---------------------------------


def philox4x32(rounds: int, counter: Sequence[Words], key: Sequence[Words]) -> tuple[U32, U32, U32, U32]:
    """Return the four output words; counter words and key words broadcast against each other."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(rounds):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + np.uint64(0x9E3779B9)) & _MASK
        k1 = (k1 + np.uint64(0xBB67AE85)) & _MASK
    x0, x1, x2, x3 = (np.asarray(c).astype(np.uint32) for c in np.broadcast_arrays(c0, c1, c2, c3))
    return x0, x1, x2, x3


def subkey(seed: int, tensor: int, draw: int, window: Words) -> tuple[U32, U32, U32, U32]:
    """Section 1: the words K[0..3]; ``window`` is the fourth counter word."""
    low = 0xFFFFFFFF
    return philox4x32(10, (draw & low, draw >> 32, tensor, window), (seed & low, seed >> 32))


def _words(seed: int, tensor: int, draw: int, first: int, count: int, window_bits: int) -> U32:
    group = (np.uint64(first) + np.arange(count, dtype=np.uint64))[:, None]
    lane = np.arange(LANES, dtype=np.uint64)[None, :]
    q = (group * np.uint64(LANES) + lane) & _MASK
    k0, k1, k2, k3 = (
        k.astype(np.uint64) for k in subkey(seed, tensor, draw, (group >> np.uint64(28)) | np.uint64(window_bits))
    )
    return np.stack(philox4x32(7, (q, k2, k3, 0), (k0, k1)), axis=1)


def words(seed: int, tensor: int, draw: int, first: int, count: int) -> U32:
    """Section 1: the words of blocks ``first`` to ``first + count`` of 64 elements.

    Returns
    -------
    ndarray
        Shape (count, 4, 16): x[j] of the quad in each lane.
    """
    return _words(seed, tensor, draw, first, count, 0)


# ---- fp32 ------------------------------------------------------------------------------------------------------------


def bits(x: F32) -> U32:
    """Bit patterns of ``x``."""
    return np.asarray(x, np.float32).view(np.uint32)


def from_bits(x: NDArray[Any]) -> F32:
    """Floats of the 32-bit patterns ``x``."""
    return np.asarray(x).astype(np.uint32).view(np.float32)


def fma32(a: F32 | np.float32, b: F32 | np.float32, c: F32 | np.float32) -> F32:
    """Fp32 ``a * b + c``, rounded once, to nearest even; subnormals included.

    In float64 the product is exact (48 bits of 53, exponents far from its limits). The sum is rounded to odd: where it
    is not exact, of its two neighbours the one whose last bit is set. As float64 has more than two bits above fp32,
    rounding that to fp32 equals rounding the exact sum (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        addend = np.asarray(c, np.float64)
        total = np.atleast_1d(product + addend)
        # Knuth's TwoSum: total + error is the exact sum.
        back = total - product
        error = (product - (total - back)) + (addend - back)
        pattern = total.view(np.int64)
        to_odd = np.isfinite(total) & (error != 0) & (pattern & 1 == 0)
        outward = (error > 0) == (total > 0)
        odd = np.where(to_odd, np.where(outward, pattern + 1, pattern - 1), pattern).view(np.float64)
        return odd.astype(np.float32).reshape(np.shape(product + addend))


def _horner(coefficients: F32, x: F32) -> F32:
    """Evaluate a polynomial, whose constant coefficient comes first, by Horner's rule with fma."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = fma32(value, x, coefficient)
    return value


def _table(text: str) -> F32:
    values = [float.fromhex(number) for number in text.split()]
    table = np.array(values, np.float32)
    assert table.astype(np.float64).tolist() == values, "a coefficient is not an fp32 number"
    return table


_L = _table(
    "-0x1.00001p+1 0x1.000176p+0 -0x1.5523fcp-1 0x1.fe26ccp-2 -0x1.a3c3ccp-2 0x1.7e5152p-2 -0x1.e743b2p-3",
)
_S = _table("0x1.921fb4p+0 -0x1.4abbb6p-1 0x1.46676ep-4 -0x1.3232fap-8 0x1.3c4b2cp-13")
_C = _table("0x1.fffffep-1 -0x1.3bd3a6p+0 0x1.03bd06p-2 -0x1.54f61ap-6 0x1.c1f066p-11")


def box_muller(x: U32, y: U32) -> tuple[F32, F32]:
    """Section 2: cosine and sine."""
    v = np.abs((x | np.uint32(1)).view(np.int32).astype(np.float32))
    d = bits(v).view(np.int32) - np.int32(0x4EB504F3)
    ex = (d >> 23).astype(np.float32)
    f = from_bits((d & 0x7FFFFF) + np.int32(0x3F3504F3)) - np.float32(1)
    p = _horner(_L, f)
    r = np.sqrt(fma32(p, f, ex * np.float32(-1.38629436)))
    # Replaced, as r is -0 for v = 2^31: OR or XOR of the sign bit would differ.
    r = from_bits((bits(r) & np.uint32(0x7FFFFFFF)) | (x & np.uint32(0x80000000)))

    angle = y.view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    t = angle * angle
    return r * _horner(_C, t), r * (angle * _horner(_S, t))


# ---- directions ------------------------------------------------------------------------------------------------------


def normal(seed: int, tensor: int, draw: int, offset: int, n: int, window: int = 0) -> F32:
    """Section 2: elements ``offset`` to ``offset + n`` of the Gaussian direction; ``window`` is that of section 7."""
    first = offset // BLOCK
    count = -(-(offset + n) // BLOCK) - first
    x = _words(seed, tensor, draw, first, count, window)
    slots = [*box_muller(x[:, 0], x[:, 1]), *box_muller(x[:, 2], x[:, 3])]
    z = np.stack(slots, axis=1).reshape(-1)  # element 64 block + 16 slot + lane
    start = offset - first * BLOCK
    return z[start : start + n]


def rademacher(seed: int, tensor: int, draw: int, offset: int, n: int, window: int = 0) -> F32:
    """Section 3: elements ``offset`` to ``offset + n`` of the Rademacher direction; ``window`` as for normal."""
    group_size = LANES * ROWS
    first = offset // group_size
    count = -(-(offset + n) // group_size) - first
    x = _words(seed, tensor, draw, first, count, window | 1 << 31)
    shift = 31 - np.arange(32, dtype=np.uint32)
    bit = (x[:, :, None, :] >> shift[None, None, :, None]) & np.uint32(1)  # group, word, row of that word, lane
    u = np.where(bit == 1, np.float32(-1), np.float32(1)).reshape(-1)
    start = offset - first * group_size
    return u[start : start + n]


def noise(distribution: Distribution, seed: int, tensor: int, draw: int, offset: int, n: int) -> F32:
    """Elements ``offset`` to ``offset + n`` of z(seed, tensor, draw)."""
    return (normal if distribution == "gaussian" else rademacher)(seed, tensor, draw, offset, n)


def low_rank(
    distribution: Distribution, seed: int, tensor: int, draw: int, basis: int, rank: int, shape: tuple[int, int]
) -> F32:
    """Section 7: z of a matrix."""
    make = normal if distribution == "gaussian" else rademacher
    rows, columns = (-(-length // BLOCK) * BLOCK for length in shape)
    u = make(seed, tensor, draw, 0, rank * rows, 1 << 30).reshape(rank, rows)[:, : shape[0]]
    v = make(seed, tensor, basis, 0, rank * columns, (1 << 30) + 1).reshape(rank, columns)[:, : shape[1]]
    u = (np.float32(1) / np.sqrt(np.float32(rank))) * u
    z: F32 = u[0, :, None] * v[0]
    for k in range(1, rank):
        z = fma32(u[k, :, None], v[k], z)
    return z


# ---- their use -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A direction, the scales that are applied in turn, the decay after them, and the rounding to 16 bits."""

    seed: int
    draw: int
    scales: tuple[float, ...]
    decay: float = 0.0
    distribution: Distribution = "gaussian"
    rounding: Rounding = "nearest"
    role: Role = "shift"
    rank: int = 0
    basis: int = 0


def apply(
    w: F32, terms: Sequence[Term], *, tensor: int, offset: int = 0, m: F32 | None = None, columns: int = 0
) -> F32:
    """Section 4: a new array, every line of every term rounded to fp32. The momentum ``m`` changes in place.

    For terms with a rank, ``w`` is a whole matrix with so many ``columns``, row by row.
    """
    for term in terms:
        z = _along(term, m, tensor, offset, len(w), columns)
        x = _momentum(m) if term.role == "gather" else w
        for scale in term.scales:
            x = fma32(np.float32(scale), z, x)
        if term.decay != 0:
            x = fma32(np.float32(-term.decay), x, x)
        if term.role == "gather":
            _momentum(m)[...] = x
        else:
            w = x
    return w


def _momentum(m: F32 | None) -> F32:
    assert m is not None, "a term of this role needs the momentum"
    return m


def _along(term: Term, m: F32 | None, tensor: int, offset: int, n: int, columns: int) -> F32:
    if term.role == "follow":
        return _momentum(m)
    if term.rank and columns:
        shape = n // columns, columns
        return low_rank(term.distribution, term.seed, tensor, term.draw, term.basis, term.rank, shape).reshape(-1)
    return noise(term.distribution, term.seed, tensor, term.draw, offset, n)


def products(vectors: Sequence[Sequence[Term]], *, tensor: int, offset: int, n: int) -> NDArray[np.float64]:
    """Section 6: of each vector, its product with the first one, and with itself."""
    made = [apply(np.zeros(n, np.float32), terms, tensor=tensor, offset=offset) for terms in vectors]
    return np.array([[_product(made[0], x, offset), _product(x, x, offset)] for x in made])


def _product(x: F32, y: F32, offset: int) -> float:
    total, unit_sum = 0.0, 0.0
    for start in range(offset // SECTION * SECTION, offset + len(x), SECTION):
        lanes = np.zeros(LANES)
        for first in range(start, start + SECTION, LANES):
            for element in range(max(first, offset), min(first + LANES, offset + len(x))):
                i = element - offset
                lanes[element % LANES] += np.float64(x[i]) * np.float64(y[i])
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        unit_sum += float(lanes[0])
        if (start + SECTION) % UNIT == 0:
            total, unit_sum = total + unit_sum, 0.0
    return total + unit_sum


# ---- 16-bit weights --------------------------------------------------------------------------------------------------

_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(bfloat16)}


def nearest(w: F32, storage: Storage) -> F32:
    """Round to nearest even, as numpy and ml_dtypes do."""
    with np.errstate(over="ignore"):
        rounded: F32 = w.astype(_DTYPES[storage]).astype(np.float32)
    return rounded


def random_bits(seed: int, tensor: int, draw: int, offset: int, n: int) -> U32:
    """Section 5: the 16 random bits r of each element."""
    first = offset // BLOCK
    x = words(seed, tensor, draw, first, -(-(offset + n) // BLOCK) - first)
    slots = []
    for pair, factor in enumerate((0xAC4C1B51, 0x31848BAB)):
        k = (x[:, 2 * pair] + x[:, 2 * pair + 1]) * np.uint32(factor)
        k ^= k >> np.uint32(16)
        slots += [k & np.uint32(0xFFFF), k >> np.uint32(16)]
    start = offset - first * BLOCK
    return np.stack(slots, axis=1).reshape(-1)[start : start + n]


def stochastic(w: F32, r: U32, storage: Storage) -> F32:
    """Add the fraction of a unit that r is to the magnitude, and truncate to whole units.

    Exact in float64, except for fp16's subnormal numbers, whose sum is defined to be rounded to fp32.
    """
    mantissa, least, bits_cut = (10, -14, 13) if storage == "float16" else (7, -126, 16)
    fraction = (r >> np.uint32(16 - bits_cut)).astype(np.float64) / 2**bits_cut
    size = np.abs(w.astype(np.float64))
    exponent = np.maximum(np.frexp(size)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - mantissa)
    units = size / unit + fraction
    if storage == "float16":
        rounded = fma32(np.abs(w), np.float32(2.0**24), fraction.astype(np.float32))
        units = np.where(size < 2.0**-14, rounded.astype(np.float64), units)
    cut = np.floor(units) * unit
    if storage == "float16":
        cut = np.where(cut >= 2.0**16, np.inf, cut)
    signed: F32 = np.copysign(cut, w).astype(np.float32)
    return signed


def apply16(
    w: F32,
    terms: Sequence[Term],
    *,
    storage: Storage,
    tensor: int,
    offset: int = 0,
    m: F32 | None = None,
    columns: int = 0,
) -> NDArray[np.uint16]:
    """Section 5: the bit patterns of the results; ``w`` holds values of that storage, ``columns`` as for apply."""
    for term in terms:
        if term.role == "gather":
            apply(w, [term], tensor=tensor, offset=offset, m=m)
            continue
        z = _along(term, m, tensor, offset, len(w), columns)
        for i, scale in enumerate(term.scales):
            w = fma32(np.float32(scale), z, nearest(w, storage) if i else w)
        if term.decay != 0:
            w = fma32(np.float32(-term.decay), w, w)
        if term.rounding == "stochastic":
            w = stochastic(w, random_bits(term.seed, tensor, term.draw, offset, len(w)), storage)
        elif term.rounding == "nearest":
            w = nearest(w, storage)
    patterns: NDArray[np.uint16] = nearest(w, storage).astype(_DTYPES[storage]).view(np.uint16)
    return patterns
