"""Is the noise of the kernels normal, independent and accurate?

Seeds are fixed, so that each test always passes or always fails. With random seeds, a perfect generator would fail a
single check with a probability of about 1e-6 (4.9 standard errors), and any of the some 2,800 checks with 1 in 350.
Counts use the normal limit if at least 50 are expected.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from vectors import reference as ref

from pocketzo import kernels

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

N = 1 << 24
PAIRED = 1 << 21  # elements of the streams that are compared
SIGMAS = 4.9
ALPHA = math.erfc(SIGMAS / math.sqrt(2))
SEED, TENSOR, DRAW = 2025, 17, 3
BINS = 8
EDGES = np.array([NormalDist().inv_cdf(i / BINS) for i in range(1, BINS)], np.float32)


def draw(n: int = PAIRED, seed: int = SEED, tensor: int = TENSOR, number: int = DRAW, offset: int = 0) -> F32:
    return kernels.noise(n, seed=seed, tensor=tensor, draw=number, offset=offset)


def signs(n: int = PAIRED, seed: int = SEED, tensor: int = TENSOR, number: int = DRAW, offset: int = 0) -> F32:
    return kernels.noise(n, seed=seed, tensor=tensor, draw=number, offset=offset, distribution="rademacher")


@pytest.fixture(scope="module")
def z() -> F32:
    return draw(N)


@pytest.fixture(scope="module")
def u() -> F32:
    return signs(N)


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_sigmas(value: float, what: str) -> None:
    assert abs(value) < SIGMAS, f"{what}: {value:+.2f} standard errors"


def poisson_tails(count: int, mean: float) -> tuple[float, float]:
    """P(X <= count) and P(X >= count)."""
    below = sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count))
    at = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    return below + at, 1 - below


def check_count(count: int, n: int, p: float, what: str) -> None:
    """Check a count of events, each of probability p, in n trials."""
    mean = n * p
    if mean >= 50:
        check_sigmas((count - mean) / math.sqrt(mean * (1 - p)), what)
    else:
        assert min(poisson_tails(count, mean)) > ALPHA / 2, f"{what}: {count} where {mean:.1f} are expected"


def check_chi_square(statistic: float, degrees: int, what: str) -> None:
    """Check by the cube root of Wilson and Hilferty, which is nearly normal from some 50 degrees of freedom on."""
    spread = 2 / (9 * degrees)
    check_sigmas(((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread), what)


def check_correlation(a: NDArray[Any], b: NDArray[Any], variance: float, what: str) -> None:
    """Check two arrays of mean 0 whose product has the given variance."""
    check_sigmas(float(np.dot(a, b)) / math.sqrt(variance * a.size), what)


def check_table(a: U8, b: U8, bins: int, what: str) -> None:
    """Check the contingency table of two classifications: (bins - 1)^2 degrees of freedom, margins as observed."""
    table = np.bincount(a.astype(np.intp) * bins + b, minlength=bins * bins).reshape(bins, bins).astype(np.float64)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / a.size
    check_chi_square(float(((table - expected) ** 2 / expected).sum()), (bins - 1) ** 2, what)


def check_uniform(p: F64, what: str) -> None:
    """Kolmogorov-Smirnov test, by the limiting distribution with Stephens's correction, accurate from n = 100 on."""
    n = p.size
    p = np.sort(p)
    index = np.arange(n)
    distance = max(float(((index + 1) / n - p).max()), float((p - index / n).max()))
    argument = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    above = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * argument) ** 2) for k in range(1, 101))
    assert ALPHA < above < 1 - ALPHA, f"{what}: D sqrt(n) = {argument:.3f}, p = {above:.2g}"


def normal_cdf(x: NDArray[Any]) -> F64:
    scaled = (x.astype(np.float64) / math.sqrt(2)).tolist()
    return 0.5 + 0.5 * np.fromiter(map(math.erf, scaled), np.float64, len(scaled))


def classes(x: F32) -> U8:
    return np.searchsorted(EDGES, x).astype(np.uint8)


def check_independent(a: F32, b: F32, what: str) -> None:
    """Check two normal arrays: correlation of values and of squares, and the joint table of octiles."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    check_correlation(a64, b64, 1, f"{what}: correlation")
    check_correlation(a64**2 - 1, b64**2 - 1, 4, f"{what}: correlation of squares")
    check_table(classes(a), classes(b), BINS, f"{what}: joint octiles")


# ---- the checks can fail ---------------------------------------------------------------------------------------------


def test_the_checks_see_small_faults() -> None:
    a, b = draw(number=100), draw(number=101)
    mixed = (a * np.float32(0.005) + b * np.float32(math.sqrt(1 - 0.005**2))).astype(np.float32)
    with pytest.raises(AssertionError, match="correlation"):
        check_independent(a, mixed, "a mixture")
    flipped = np.where(np.abs(a) > 1, np.abs(b), -np.abs(b)).astype(np.float32)  # uncorrelated, but not independent
    with pytest.raises(AssertionError, match="joint octiles"):
        check_table(classes(a), classes(flipped), BINS, "joint octiles")
    with pytest.raises(AssertionError, match="p = "):
        check_uniform(normal_cdf(a[: 1 << 20] * np.float32(1.01)), "one per cent too wide")
    with pytest.raises(AssertionError, match="expected"):
        check_count(40, N, 10 / N, "tail")
    with pytest.raises(AssertionError, match="standard errors"):
        check_chi_square(160.0, 49, "chi-square")
    assert poisson_tails(3, 2.0) == pytest.approx((0.857123, 0.323324), abs=1e-6)


# ---- one stream is normal --------------------------------------------------------------------------------------------


def test_moments(z: F32) -> None:
    # E z^k = 0, 1, 0, 3, 0, 15, 0, 105; the variance of z^k is E z^2k - (E z^k)^2.
    moment = [math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0 for k in range(13)]
    power = np.ones(N)
    for k, what in enumerate(["mean", "variance", "skewness", "kurtosis", "fifth moment", "sixth moment"], 1):
        power *= z
        error = math.sqrt((moment[2 * k] - moment[k] ** 2) / N)
        check_sigmas((float(power.mean()) - moment[k]) / error, what)


@pytest.mark.parametrize("limit", [0.5, 1, 2, 3, 4, 4.5, 5, 5.5, 6])
def test_tails(z: F32, limit: float) -> None:
    p = math.erfc(limit / math.sqrt(2)) / 2
    check_count(int(np.count_nonzero(z > limit)), N, p, f"z > {limit}")
    check_count(int(np.count_nonzero(z < -limit)), N, p, f"z < -{limit}")


def test_largest_value(z: F32) -> None:
    assert 5 < float(np.abs(z).max()) <= 6.56
    # Nearly the largest possible value: x = 0 in slot 2, and a cosine near 1.
    assert 6.4 < float(kernels.noise(1, seed=7, tensor=11, draw=13, offset=2324579048)[0]) <= 6.56


@pytest.mark.parametrize("part", range(4))
def test_kolmogorov_smirnov(z: F32, part: int) -> None:
    quarter = 1 << 20
    check_uniform(normal_cdf(z[part * quarter * 4 : part * quarter * 4 + quarter]), f"part {part}")


def test_every_lane_and_slot_is_normal(z: F32) -> None:
    places = z.reshape(-1, 64).astype(np.float64)
    n = len(places)
    for place, (mean, square) in enumerate(zip(places.mean(0), (places**2).mean(0), strict=True)):
        check_sigmas(float(mean) * math.sqrt(n), f"mean of place {place}")
        check_sigmas((float(square) - 1) * math.sqrt(n / 2), f"variance of place {place}")


def test_histogram(z: F32) -> None:
    bins = 1024
    counts = np.bincount((normal_cdf(z[: 1 << 22]) * bins).astype(np.intp), minlength=bins)
    expected = (1 << 22) / bins
    check_chi_square(float(((counts - expected) ** 2 / expected).sum()), bins - 1, "1,024 equally likely intervals")


# ---- its elements are independent ------------------------------------------------------------------------------------


def test_lags(z: F32) -> None:
    part = z[: 1 << 22].astype(np.float64)
    squares = part**2 - 1
    octiles = classes(z[: 1 << 22])
    for lag in [*range(1, 65), 80, 96, 112, 127, 128, 129, 256, 1024, 2048, 4096, 1 << 16]:
        check_correlation(part[:-lag], part[lag:], 1, f"lag {lag}")
        check_correlation(squares[:-lag], squares[lag:], 4, f"squares, lag {lag}")
        check_table(octiles[:-lag], octiles[lag:], BINS, f"octiles, lag {lag}")


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_slots_of_a_quad(z: F32, a: int, b: int) -> None:
    # Lags 16, 32 and 48 within a block: (0, 1) and (2, 3) share a radius.
    slots = z.reshape(-1, 4, 16)
    check_independent(slots[:, a].reshape(-1), slots[:, b].reshape(-1), f"slots {a} and {b}")


@pytest.mark.parametrize("pair", [0, 1])
def test_radius_and_angle(z: F32, pair: int) -> None:
    slots = z.reshape(-1, 4, 16).astype(np.float64)
    cosine, sine = slots[: 1 << 16, 2 * pair].reshape(-1), slots[: 1 << 16, 2 * pair + 1].reshape(-1)
    tail = np.exp(-(cosine**2 + sine**2) / 2)
    turn = np.arctan2(sine, cosine) / (2 * math.pi) + 0.5
    check_uniform(tail, "radius")
    check_uniform(turn, "angle")
    check_table((tail * 7.999).astype(np.uint8), (turn * 7.999).astype(np.uint8), BINS, "radius and angle")


def test_sums_of_neighbours(z: F32) -> None:
    for width in (4, 64, 1024):
        sums = z.reshape(-1, width).sum(1, dtype=np.float64) / math.sqrt(width)
        check_uniform(normal_cdf(sums[: 1 << 20]), f"sums of {width} neighbours")


# ---- streams are independent -----------------------------------------------------------------------------------------

NEIGHBOURS: dict[str, dict[str, int]] = {
    "next seed": {"seed": SEED + 1},
    "seed, top bit": {"seed": SEED ^ 1 << 63},
    "seed, bit 32": {"seed": SEED ^ 1 << 32},
    "next tensor": {"tensor": TENSOR + 1},
    "tensor, top bit": {"tensor": TENSOR ^ 1 << 31},
    "next draw": {"number": DRAW + 1},
    "draw, bit 32": {"number": DRAW ^ 1 << 32},
    "draw, top bit": {"number": DRAW ^ 1 << 63},
    "tensor and draw swapped": {"tensor": DRAW, "number": TENSOR},
    "seed and draw swapped": {"seed": DRAW, "number": SEED},
    "next window": {"offset": 1 << 34},
    "window 2": {"offset": 2 << 34},
    "last window": {"offset": (1 << 64) - (1 << 34)},
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_streams(z: F32, name: str) -> None:
    other = draw(**NEIGHBOURS[name])
    check_independent(z[:PAIRED], other, name)
    check_independent(z[:PAIRED], np.roll(other, 1), f"{name}, shifted by one element")


@pytest.mark.parametrize("what", ["seed", "tensor", "number"])
def test_many_neighbouring_streams(what: str) -> None:
    # 128 streams of the same 2^15 elements: all pairs, and their sums.
    count, n = 128, 1 << 15
    streams = np.stack([draw(n, **{what: i}) for i in range(count)]).astype(np.float64)
    products = streams @ streams.T / math.sqrt(n)
    pairs = products[np.triu_indices(count, 1)]
    assert np.abs(pairs).max() < 6.43, "the largest of 8,128 correlations"  # 1e-6 for all of them
    check_sigmas(float((pairs**2 - 1).sum()) / math.sqrt(2 * pairs.size), "all squared correlations")
    check_uniform(normal_cdf(streams.sum(0) / math.sqrt(count)), "sums over streams")


# ---- accuracy --------------------------------------------------------------------------------------------------------


def exact_box_muller(seed: int, tensor: int, number: int, first: int, count: int) -> F64:
    """Box-Muller in double precision from the same words: the specified fp32 value of x, and all bits of y."""
    x = ref.words(seed, tensor, number, first, count)
    slots = []
    for magnitude, angle in ((x[:, 0], x[:, 1]), (x[:, 2], x[:, 3])):
        uniform = np.abs((magnitude | np.uint32(1)).view(np.int32).astype(np.float32)).astype(np.float64) / 2.0**31
        radius = np.copysign(np.sqrt(-2 * np.log(uniform)), magnitude.view(np.int32).astype(np.float64))
        turn = angle.view(np.int32).astype(np.float64) * (math.pi / 2**32)
        slots += [radius * np.cos(turn), radius * np.sin(turn)]
    return np.stack(slots, axis=1).reshape(-1)


def test_accuracy(z: F32) -> None:
    chunk, worst, square, n = 1 << 13, 0.0, 0.0, 1 << 23
    for first in range(0, n // 64, chunk):
        exact = exact_box_muller(SEED, TENSOR, DRAW, first, chunk)
        error = z[first * 64 : (first + chunk) * 64] - exact
        worst = max(worst, float(np.abs(error).max()))
        square += float((error**2).sum())
    assert worst <= 1.1e-6
    assert math.sqrt(square / n) <= 1.4e-7


# ---- Rademacher ------------------------------------------------------------------------------------------------------


def check_bytes(negative: NDArray[np.bool_], what: str) -> None:
    """Check that the 256 patterns of eight consecutive bits, not overlapping, are equally likely."""
    counts = np.bincount(np.packbits(negative), minlength=256)
    expected = counts.sum() / 256
    check_chi_square(float(((counts - expected) ** 2 / expected).sum()), 255, what)


def test_signs_are_signs(u: F32) -> None:
    assert np.array_equal(np.abs(u), np.ones(N, np.float32))


def test_signs_are_balanced(u: F32) -> None:
    check_sigmas(float(u.sum(dtype=np.float64)) / math.sqrt(N), "all")
    for rows, shape in (("lane", (-1, 16)), ("place of 2,048", (-1, 2048))):
        table = u.reshape(shape).astype(np.float64)
        for place, total in enumerate(table.sum(0).tolist()):
            check_sigmas(total / math.sqrt(len(table)), f"{rows} {place}")


def test_signs_have_no_lags(u: F32) -> None:
    part = u[: 1 << 22].astype(np.float64)
    for lag in [*range(1, 65), *range(80, 2049, 16), 4096, 1 << 16]:
        check_correlation(part[:-lag], part[lag:], 1, f"lag {lag}")


def test_sign_patterns(u: F32) -> None:
    negative = u < 0
    check_bytes(negative, "bytes along the elements")
    words = np.ascontiguousarray(negative.reshape(-1, 128, 16).transpose(0, 2, 1))
    check_bytes(words, "bytes along a word")
    check_bytes(np.ascontiguousarray(words[:, :, ::16]), "top and middle bits of a quad")


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_signs(u: F32, name: str) -> None:
    change = dict(NEIGHBOURS[name])
    if "offset" in change:
        change["offset"] = change["offset"] << 5 & (1 << 64) - 1  # its windows are 2^39 elements
    other = signs(**change).astype(np.float64)
    mine = u[:PAIRED].astype(np.float64)
    check_correlation(mine, other, 1, name)
    check_correlation(mine[:-1], other[1:], 1, f"{name}, shifted by one element")
    check_correlation(mine[:-16], other[16:], 1, f"{name}, shifted by one row")
    check_bytes(mine * other < 0, f"{name}: patterns of agreement")


def test_signs_and_normals_of_one_key(z: F32, u: F32) -> None:
    part = z[:PAIRED].astype(np.float64)
    for shift in (0, 1, 16, 32, 64):
        other = np.roll(u[:PAIRED], shift).astype(np.float64)
        check_correlation(part, other, 1, f"shift {shift}")
        check_correlation(part**2 - 1, other, 2, f"squares, shift {shift}")
