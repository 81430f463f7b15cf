"""The independent implementation of the noise: is it right, is answers.txt its output, and do the kernels agree?"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import full_or_small
from vectors import generate
from vectors import reference as ref

from pocketzo import kernels

ANSWERS = Path(__file__).parent / "vectors" / "answers.txt"


def answer_lines() -> list[str]:
    return [line for line in ANSWERS.read_text(encoding="ascii").splitlines() if line and not line.startswith("#")]


def array(*values: float) -> ref.F32:
    return np.array(values, np.float32)


def pattern(value: float) -> int:
    """Bits of an fp32 number."""
    return int(ref.bits(array(value))[0])


# ---- the arithmetic of the reference, against exact fractions --------------------------------------------------------


def rounded(exact: Fraction) -> float:
    """Round a non-zero number to fp32, to nearest even, in integer arithmetic."""
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    assert Fraction(2) ** exponent <= size < Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    value = round(size / unit) * unit  # round() of a Fraction rounds to even
    result = math.inf if value >= Fraction(2) ** 128 else float(value)
    return math.copysign(result, exact)


def exact_fma(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact != 0:
        return rounded(exact)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    both_zero_and_alike = c == 0 and (a == 0 or b == 0) and math.copysign(1, c) == product_sign
    return math.copysign(0.0, c) if both_zero_and_alike else 0.0


def check_fma(a: float, b: float, c: float) -> None:
    got = ref.fma32(array(a), array(b), array(c))
    want = array(exact_fma(a, b, c))
    assert ref.bits(got)[0] == ref.bits(want)[0], f"fma({a.hex()}, {b.hex()}, {c.hex()}) = {got[0]!r}, not {want[0]!r}"


def from_pattern(value: int) -> float:
    return float(ref.from_bits(np.array(value)))


fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_pattern = st.integers(0, 2**32 - 1).filter(lambda p: p & 0x7F800000 != 0x7F800000).map(from_pattern)
ordinary = st.floats(-8, 8, width=32)
subnormal = st.builds(lambda m, s: from_pattern(m | s << 31), st.integers(0, 2**23 - 1), st.integers(0, 1))
numbers = st.one_of(fp32, any_pattern, ordinary, subnormal)


@given(a=numbers, b=numbers, c=numbers)
@settings(max_examples=full_or_small(400, 10), deadline=None)
def test_fma_is_rounded_once(a: float, b: float, c: float) -> None:
    check_fma(a, b, c)


@given(a=numbers, b=numbers, steps=st.integers(-3, 3))
@settings(max_examples=full_or_small(300, 10), deadline=None)
def test_fma_where_the_product_cancels(a: float, b: float, steps: int) -> None:
    product = rounded(Fraction(a) * Fraction(b)) if a and b else 0.0
    if math.isinf(product):
        return
    c = from_pattern(max(0, min(pattern(abs(product)) + steps, 0x7F7FFFFF)))
    check_fma(a, b, math.copysign(c, -product))


@given(
    c=numbers,
    mantissa=st.integers(1, 2**24 - 1),
    shift=st.integers(-3, 50),
    exponent=st.integers(-60, 60),
    nudge=st.sampled_from([-(2.0**-23), 0.0, 2.0**-23]),
    sign=st.sampled_from([-1, 1]),
)
@settings(max_examples=full_or_small(400, 10), deadline=None)
def test_fma_near_ties(c: float, mantissa: int, shift: int, exponent: int, nudge: float, sign: int) -> None:
    # The product is half a unit in the last place of c, or differs from it by one or a few bits.
    half_unit = math.frexp(c)[1] - 25 if c else -150
    for odd in (1, mantissa | 1):
        a = math.ldexp(1 + nudge, exponent)
        power = max(-149, min(half_unit - exponent - (shift if odd > 1 else 0), 100))
        check_fma(a, sign * math.ldexp(odd, power), c)


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (2.0**-75, 2.0**-75, 0.0),  # half the smallest subnormal: a tie, to even, +0
        (2.0**-75, -(2.0**-75), 0.0),  # -0
        (2.0**-75, 2.0**-75 * (1 + 2.0**-23), 0.0),  # just above the tie
        (2.0**-149, 2.0**-149, 2.0**-149),  # far below the last bit
        (2.0**-75, 2.0**-75, 2.0**-149),  # 1.5 smallest subnormals, to even: 2
        (-(2.0**-149), 2.0**-149, 1.0),  # just below a power of two
        (2.0**-12, -(2.0**-13), 1.0),  # a quarter of the lower unit below a power of two
        (1 + 2.0**-23, 1 + 2.0**-23, -(1 + 2.0**-22)),  # only the square of the last bit remains
        (2.0**-126, 1 - 2.0**-24, 0.0),  # rounds up to the smallest normal number
        (2.0**-126, 0.5, -(2.0**-149)),
        (2.0**100, 2.0**27, 2.0**127 * (1 - 2.0**-24)),  # overflows in the last bit
        (2.0**100, 2.0**100, -(2.0**100)),
        (0.0, -1.0, 0.0),
        (0.0, -1.0, -0.0),
        (-0.0, 1.0, 0.0),
        (1.5, 2.0, -3.0),
    ],
)
def test_fma_of_nasty_numbers(a: float, b: float, c: float) -> None:
    check_fma(a, b, c)


def test_fma_on_the_paths_of_the_transform() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 4000)).astype(np.float32)
    c = (-a * b * (1 + random.normal(size=4000) * 2.0 ** random.integers(-26, 1, size=4000))).astype(np.float32)
    want = [exact_fma(*map(float, triple)) for triple in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(ref.bits(ref.fma32(a, b, c)), ref.bits(np.array(want, np.float32)))


def test_fma_of_random_patterns() -> None:
    # Exponents uniformly distributed; then exponents so close that the sum is rounded.
    random = np.random.default_rng(3)
    a, b, c = ref.from_bits(random.integers(0, 2**32, size=(3, 8000)) & 0xBFFFFFFF)  # below 2
    near = np.ldexp(a.astype(np.float64) * b * random.uniform(-1, 1, 8000), random.integers(-30, 30, 8000))
    for addend in (c, near.astype(np.float32)):
        want = [exact_fma(*map(float, triple)) for triple in zip(a, b, addend, strict=True)]
        np.testing.assert_array_equal(ref.bits(ref.fma32(a, b, addend)), ref.bits(np.array(want, np.float32)))


def test_fma_leaves_what_is_not_finite() -> None:
    w = array(math.inf, -math.inf, math.nan, 1.0)
    np.testing.assert_array_equal(
        ref.fma32(np.float32(0.5), array(1, 1, 1, 1), w), array(math.inf, -math.inf, math.nan, 1.5)
    )


def test_sqrt_is_rounded_correctly() -> None:
    random = np.random.default_rng(1)
    x = np.concatenate([random.uniform(0, 43, 3000), 2.0 ** random.uniform(-30, 6, 3000)]).astype(np.float32)
    for value, root in zip(x.tolist(), np.sqrt(x).tolist(), strict=True):
        below, above = (float(np.nextafter(np.float32(root), np.float32(to))) for to in (-math.inf, math.inf))
        low, high = (Fraction(root) + Fraction(below)) / 2, (Fraction(root) + Fraction(above)) / 2
        assert low**2 < Fraction(value) < high**2, value.hex()
    assert pattern(float(np.sqrt(array(-0.0))[0])) == 0x80000000


def test_integers_become_floats_to_nearest_even() -> None:
    random = np.random.default_rng(2)
    ties = (random.integers(2**24, 2**25, 500) | 1) << random.integers(0, 7, 500)
    x = np.concatenate([ties, -ties, ties + 1, random.integers(-(2**31), 2**31, 1000), [-(2**31), 2**31 - 1, 1, -1]])
    x = x[(x >= -(2**31)) & (x < 2**31)].astype(np.int32)
    want = np.array([rounded(Fraction(i)) for i in x.tolist()], np.float32)
    np.testing.assert_array_equal(x.astype(np.float32), want)


# ---- the reference against published answers and its own definition --------------------------------------------------


@pytest.mark.parametrize("line", generate.PHILOX.splitlines())
def test_philox_gives_the_published_answers(line: str) -> None:
    request, _, expected = line.partition(" = ")
    assert generate.answer(request) == expected


@pytest.mark.parametrize("element", [0, 1, 15, 16, 47, 63, 64, 2**34 - 1, 2**34, 2**38 + 77, 2**63 + 12345, 2**64 - 2])
def test_one_element_by_hand(element: int) -> None:
    # The specification for a single element, with Python's integers.
    seed, tensor, draw = 0x0123456789ABCDEF, 77, 2**40 + 5
    k = [
        int(word)
        for word in ref.philox4x32(10, (draw % 2**32, draw >> 32, tensor, element >> 34), (0x89ABCDEF, 0x01234567))
    ]
    q = ((element >> 6) * 16 + (element & 15)) % 2**32
    slot = (element >> 4) & 3
    x = ref.philox4x32(7, (q, k[2], k[3], 0), (k[0], k[1]))
    pair = ref.box_muller(np.atleast_1d(x[slot & 2]), np.atleast_1d(x[(slot & 2) + 1]))
    assert ref.normal(seed, tensor, draw, element, 1)[0] == pair[slot & 1][0]


@pytest.mark.parametrize("element", [0, 1, 16, 511, 512, 2047, 2048, 2**39 - 1, 2**39, 2**63 + 12345, 2**64 - 2])
def test_one_sign_by_hand(element: int) -> None:
    seed, tensor, draw = 0x0123456789ABCDEF, 77, 2**40 + 5
    window = (element >> 39) | 2**31
    k = [int(word) for word in ref.philox4x32(10, (draw % 2**32, draw >> 32, tensor, window), (0x89ABCDEF, 0x01234567))]
    q = ((element >> 11) * 16 + (element & 15)) % 2**32
    j = (element >> 4) & 127
    x = [int(word) for word in ref.philox4x32(7, (q, k[2], k[3], 0), (k[0], k[1]))]
    bit = x[j >> 5] >> (31 - (j & 31)) & 1
    assert ref.rademacher(seed, tensor, draw, element, 1)[0] == (-1 if bit else 1)


@given(
    offset=st.integers(0, 2**64 - 300) | st.sampled_from([2**34 - 100, 2**39 - 100, 2**32 - 100]),
    n=st.integers(0, 200),
    cut=st.integers(0, 200),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(max_examples=full_or_small(60, 10), deadline=None)
def test_a_stretch_can_be_cut_anywhere(offset: int, n: int, cut: int, distribution: ref.Distribution) -> None:
    cut = min(cut, n)
    whole = ref.noise(distribution, 1, 2, 3, offset, n)
    assert whole.shape == (n,)
    parts = [ref.noise(distribution, 1, 2, 3, offset, cut), ref.noise(distribution, 1, 2, 3, offset + cut, n - cut)]
    np.testing.assert_array_equal(ref.bits(whole), ref.bits(np.concatenate(parts)))


def test_apply_is_a_chain_of_fmas() -> None:
    w = generate.weights(500)
    terms = [ref.Term(1, 2, (1e-3, -2e-3), 0.125), ref.Term(1, 3, (0.5,), distribution="rademacher")]
    z, u = ref.normal(1, 4, 2, 10, 500), ref.rademacher(1, 4, 3, 10, 500)
    want = ref.fma32(np.float32(1e-3), z, w)
    want = ref.fma32(np.float32(-2e-3), z, want)
    want = ref.fma32(np.float32(-0.125), want, want)
    want = ref.fma32(np.float32(0.5), u, want)
    np.testing.assert_array_equal(ref.bits(ref.apply(w, terms, tensor=4, offset=10)), ref.bits(want))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_low_rank_is_a_product_of_two_factors(rank: int, distribution: ref.Distribution) -> None:
    rows, columns = 40, 70
    z = ref.low_rank(distribution, 1, 2, 3, 4, rank, (rows, columns)).astype(np.float64)
    assert np.linalg.matrix_rank(z, tol=1e-3) == rank
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(6 / (min(rows, columns) * rank))
    # Another draw has another U but the same V: they span the same rows. Another basis has another V.
    others = [ref.low_rank(distribution, 1, 2, *pair, rank, (rows, columns)) for pair in ((5, 4), (3, 5))]
    joined = [np.linalg.matrix_rank(np.concatenate([z, other]), tol=1e-3) for other in others]
    assert joined == [rank, 2 * rank]
    # A larger matrix does not have other elements where its sides take as many blocks.
    larger = ref.low_rank(distribution, 1, 2, 3, 4, rank, (64, 128))
    np.testing.assert_array_equal(larger[:rows, :columns], z)


@pytest.mark.parametrize(("offset", "n"), [(0, 1), (5, 40), (2040, 300), (65_530, 4200)])
def test_products_are_sums_of_products(offset: int, n: int) -> None:
    vectors = [[ref.Term(1, 2, (0.5,)), ref.Term(1, 3, (-2.0,))], [ref.Term(1, 4, (1.0,), distribution="rademacher")]]
    made = [ref.apply(np.zeros(n, np.float32), terms, tensor=5, offset=offset) for terms in vectors]
    for (across, square), x in zip(ref.products(vectors, tensor=5, offset=offset, n=n), made, strict=True):
        for got, other in ((across, made[0]), (square, x)):
            exact = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(other, x, strict=True))
            assert abs(Fraction(float(got)) - exact) <= Fraction(2) ** -45 * n


# ---- answers.txt -----------------------------------------------------------------------------------------------------


def test_the_answer_file_has_the_published_answers_first() -> None:
    assert "\n".join(answer_lines()[:6]) == generate.PHILOX
    assert ANSWERS.stat().st_size < 100_000


@pytest.mark.parametrize("line", answer_lines(), ids=lambda line: line.partition(" = ")[0][:60].replace(" ", "-"))
def test_answers_are_what_the_generator_writes(line: str) -> None:
    request, _, expected = line.partition(" = ")
    kind, *fields = request.split()
    if not kind.endswith("_crc"):
        assert generate.answer(request) == expected
        return
    # The first block, two inner ones and the last.
    *stream, offset, blocks = fields
    crcs = expected.split()
    assert len(crcs) == int(blocks)
    for block in sorted({0, int(blocks) // 3, int(blocks) // 2, int(blocks) - 1}):
        start = int(offset) + block * generate.CRC_BLOCK
        assert generate.answer(" ".join([kind, *stream, str(start), "1"])) == crcs[block]


def test_the_weight_pattern_has_what_it_promises() -> None:
    w = generate.weights(100_000)
    kind = np.arange(100_000) % 61
    tiny = np.abs(w[kind == 7])
    assert np.all(tiny < np.float32(2.0**-126))
    assert np.count_nonzero(tiny) == tiny.size
    assert np.all(ref.bits(w[kind == 13]) == 0)
    assert np.all(ref.bits(w[kind == 14]) == 0x80000000)
    assert w[0] == -0.25
    assert np.abs(w).max() <= 0.25


# ---- the kernels, against the reference ------------------------------------------------------------------------------

seeds = st.integers(0, 2**64 - 1)


@given(
    seed=seeds,
    tensor=st.integers(0, 2**32 - 1),
    draw=seeds,
    offset=st.integers(0, 2**64 - 1 - 5000) | st.sampled_from([0, 2**34 - 1000, 2**39 - 1000]),
    n=st.integers(0, 300) | st.integers(0, 5000),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(max_examples=full_or_small(100, 10), deadline=None)
def test_kernels_agree(seed: int, tensor: int, draw: int, offset: int, n: int, distribution: ref.Distribution) -> None:
    got = kernels.noise(n, seed=seed, tensor=tensor, draw=draw, offset=offset, distribution=distribution)
    want = ref.noise(distribution, seed, tensor, draw, offset, n)
    np.testing.assert_array_equal(ref.bits(got), ref.bits(want))


@given(
    draw=seeds,
    offset=st.integers(0, 2**40),
    n=st.integers(0, 300),
    scale=ordinary | subnormal,
    next_scale=ordinary | subnormal,
    decay=st.sampled_from([0.0, 1e-3, 0.5]),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(max_examples=full_or_small(100, 10), deadline=None)
def test_perturb_and_step_agree(
    draw: int, offset: int, n: int, scale: float, next_scale: float, decay: float, distribution: ref.Distribution
) -> None:
    got = generate.weights(n)
    kernels.perturb(got, seed=5, tensor=6, draw=draw, scale=scale, offset=offset, distribution=distribution)
    want = ref.apply(
        generate.weights(n), [ref.Term(5, draw, (scale,), distribution=distribution)], tensor=6, offset=offset
    )
    np.testing.assert_array_equal(ref.bits(got), ref.bits(want))
    kernels.step(
        got,
        seed=5,
        tensor=6,
        draw=draw,
        scale=scale,
        next_draw=draw ^ 1,
        next_scale=next_scale,
        decay=decay,
        offset=offset,
        distribution=distribution,
    )
    terms = [
        ref.Term(5, draw, (scale,), decay, distribution),
        ref.Term(5, draw ^ 1, (next_scale,), distribution=distribution),
    ]
    np.testing.assert_array_equal(ref.bits(got), ref.bits(ref.apply(want, terms, tensor=6, offset=offset)))
