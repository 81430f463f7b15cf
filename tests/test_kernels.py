"""pocketzo.kernels: which arguments it refuses, and that the bits depend on the arguments alone."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from sizes import full_or_small
from vectors import reference

import pocketzo as pz
from pocketzo import _core
from pocketzo.optim.program import TERM as TERM_STRUCT

F32 = NDArray[np.float32]
Distribution = Literal["gaussian", "rademacher"]

DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")
SETS = pz.kernels.available()
UNIT = 1 << 16  # elements that a thread takes at a time
LAST = 2**64 - 1


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    name, threads = pz.kernels.isa(), pz.kernels.threads()
    yield
    pz.kernels.use(name)
    pz.kernels.set_threads(threads)


def weights(n: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def assert_same_bits(actual: F32, expected: F32) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32), strict=True)


# ---- arguments -------------------------------------------------------------------------------------------------------

KEY: dict[str, Any] = {"seed": 1, "tensor": 2, "draw": 3}
PERTURB: dict[str, Any] = {**KEY, "scale": 0.5}
STEP: dict[str, Any] = {**PERTURB, "next_draw": 4, "next_scale": 0.25}

IN_PLACE: dict[str, Callable[[Any], None]] = {
    "perturb": lambda w: pz.kernels.perturb(w, **PERTURB),
    "step": lambda w: pz.kernels.step(w, **STEP),
}


def _misaligned() -> F32:
    return np.frombuffer(bytearray(4 * 8 + 1), np.uint8)[1:].view(np.float32)


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize(
    ("array", "error", "got"),
    [
        pytest.param([1.0, 2.0], TypeError, "<class 'list'>", id="list"),
        pytest.param(None, TypeError, "NoneType", id="none"),
        pytest.param(np.float32(1), TypeError, "numpy.float32", id="scalar"),
        pytest.param(memoryview(bytearray(16)), TypeError, "memoryview", id="buffer"),
        pytest.param(np.zeros(8), TypeError, "dtype 'float64'", id="float64"),
        pytest.param(np.zeros(8, ">f2"), TypeError, "dtype '>f2'", id="big-endian-16"),
        pytest.param(np.zeros(8, np.int32), TypeError, "dtype 'int32'", id="int32"),
        pytest.param(np.zeros(8, ">f4"), TypeError, "dtype '>f4'", id="big-endian"),
        pytest.param(np.zeros(8, np.float32)[::2], ValueError, "not contiguous", id="every-second"),
        pytest.param(np.zeros(8, np.float32)[::-1], ValueError, "not contiguous", id="reversed"),
        pytest.param(np.zeros((3, 4), np.float32).T, ValueError, "not contiguous", id="transposed"),
        pytest.param(np.zeros((4, 4), np.float32)[:, :3], ValueError, "not contiguous", id="columns"),
        pytest.param(np.broadcast_to(np.float32(1), 8), ValueError, "not contiguous", id="broadcast"),
        pytest.param(np.frombuffer(bytes(16), np.float32), ValueError, "read-only", id="read-only"),
        pytest.param(_misaligned(), ValueError, "multiple of 4", id="misaligned"),
    ],
)
def test_an_array_that_cannot_be_worked_on_is_refused(
    function: str, array: Any, error: type[Exception], got: str
) -> None:
    before = np.array(array)
    with pytest.raises(
        error, match="w must be a writable, C-contiguous float32, float16 or bfloat16 array, got"
    ) as raised:
        IN_PLACE[function](array)
    assert got in str(raised.value)
    np.testing.assert_array_equal(np.array(array), before)


@pytest.mark.parametrize(("name", "bits"), [("seed", 64), ("tensor", 32), ("draw", 64), ("offset", 64)])
@pytest.mark.parametrize("function", ["noise", "perturb", "step"])
def test_numbers_out_of_range_are_refused(function: str, name: str, bits: int) -> None:
    def call(value: Any) -> None:
        if function == "noise":
            pz.kernels.noise(0, **{**KEY, name: value})
        elif function == "perturb":
            pz.kernels.perturb(w, **{**PERTURB, name: value})
        else:
            pz.kernels.step(w, **{**STEP, name: value})

    w = np.zeros(0, np.float32)
    largest = 2**bits - 1
    for fine in (0, largest, np.uint64(largest), np.int16(7), True):
        call(fine)
    for value in (-1, 2**bits, 2**200, np.int64(-5)):
        with pytest.raises(ValueError, match=rf"{name} must be in 0 \.\. 2\*\*{bits} - 1, got ") as raised:
            call(value)
        assert repr(value) in str(raised.value)
    for other in (1.0, np.float32(1), "1", None, [1]):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
            call(other)


def test_the_second_draw_of_a_step_is_checked_too() -> None:
    w = weights(100)
    before = w.copy()
    for value, error in ((-1, ValueError), (2**64, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="draw must be"):
            pz.kernels.step(w, **{**STEP, "next_draw": value})
    assert_same_bits(w, before)


@pytest.mark.parametrize("n", [0, 1, 64, 1000])
def test_a_tensor_ends_before_element_2_64(n: int) -> None:
    last = LAST - n
    w = np.zeros(n, np.float32)
    pz.kernels.perturb(w, **PERTURB, offset=last)
    assert_same_bits(w, np.float32(0.5) * pz.kernels.noise(n, **KEY, offset=last))
    if n > 0:
        for call in (
            lambda: pz.kernels.noise(n, **KEY, offset=last + 1),
            lambda: pz.kernels.perturb(w, **PERTURB, offset=last + 1),
            lambda: pz.kernels.step(w, **STEP, offset=last + 1),
        ):
            with pytest.raises(ValueError, match=rf"offset \+ size must not exceed 2\*\*64 - 1, got offset {last + 1}"):
                call()


def test_other_arguments_are_refused() -> None:
    w = weights(4)
    before = w.copy()
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        pz.kernels.noise(-1, **KEY)
    with pytest.raises(TypeError):
        pz.kernels.noise(2.5, **KEY)  # type: ignore[arg-type]
    uniform: Any = "uniform"
    for call in (
        lambda: pz.kernels.noise(1, **KEY, distribution=uniform),
        lambda: pz.kernels.perturb(w, **PERTURB, distribution=uniform),
        lambda: pz.kernels.step(w, **STEP, distribution=uniform),
    ):
        with pytest.raises(ValueError, match="distribution must be 'gaussian' or 'rademacher', got 'uniform'"):
            call()
    for name in ("scale", "next_scale", "decay"):
        for value in ("0.1", None, 1j):
            with pytest.raises(TypeError):
                pz.kernels.step(w, **{**STEP, name: value})
    with pytest.raises(TypeError, match="positional"):
        pz.kernels.perturb(w, 1, 2, 3, 0.5)  # type: ignore[call-arg]
    assert_same_bits(w, before)


# ---- in place, any shape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (7,), (64,), (3, 5, 7), (2, 1, 130), (257, 255)])
def test_any_shape_is_worked_on_in_place(shape: tuple[int, ...], distribution: Distribution) -> None:
    size = int(np.prod(shape))
    room = weights(size + 40)
    untouched = room.copy()
    w = room[20 : 20 + size].reshape(shape)
    assert np.shares_memory(w, room) or size == 0
    flat = w.copy().reshape(-1)
    assert pz.kernels.perturb(w, **PERTURB, distribution=distribution) is None  # type: ignore[func-returns-value]
    pz.kernels.perturb(flat, **PERTURB, distribution=distribution)
    assert_same_bits(room[20 : 20 + size], flat)
    assert size == 0 or not np.array_equal(flat, untouched[20 : 20 + size])
    assert_same_bits(room[:20], untouched[:20])
    assert_same_bits(room[20 + size :], untouched[20 + size :])


def test_subclasses_and_views_of_foreign_memory_are_worked_on() -> None:
    buffer = bytearray(4 * 100)
    w = np.frombuffer(buffer, np.float32)
    pz.kernels.perturb(w, **PERTURB)
    assert_same_bits(np.frombuffer(bytes(buffer), np.float32), np.float32(0.5) * pz.kernels.noise(100, **KEY))

    class Sub(np.ndarray[Any, Any]):
        pass

    again = np.zeros(100, np.float32)
    pz.kernels.perturb(again.view(Sub), **PERTURB)
    assert_same_bits(again, w)


def test_noise_returns_a_new_float32_vector() -> None:
    z = pz.kernels.noise(5, **KEY)
    assert z.dtype == np.float32
    assert z.shape == (5,)
    assert z.flags.writeable
    assert pz.kernels.noise(0, **KEY).shape == (0,)
    assert set(pz.kernels.noise(1000, **KEY, distribution="rademacher").tolist()) == {-1.0, 1.0}


# ---- the bits are a function of the arguments ------------------------------------------------------------------------

edges = st.sampled_from([0, 64, 2048, UNIT, 2**32, 2**34, 2**39, 2**63, LAST - 4000])
offsets = st.one_of(
    st.tuples(edges, st.integers(-300, 300)).map(lambda pair: min(max(sum(pair), 0), LAST - 4000)),
    st.integers(0, LAST - 4000),
)
keys = st.fixed_dictionaries(
    {"seed": st.integers(0, LAST), "tensor": st.integers(0, 2**32 - 1), "draw": st.integers(0, LAST)}
)
distributions = st.sampled_from(DISTRIBUTIONS)
scales = st.floats(-1e3, 1e3, width=32)
# Weights may be anything: zeros of both signs, subnormals, the largest numbers, infinities.
arrays = st.builds(
    lambda n, seed, special, at: _with_special(weights(n, seed), special, at),
    st.integers(0, 400),
    st.integers(0, 2**32),
    st.lists(st.floats(width=32, allow_nan=False), max_size=8),
    st.integers(0, 400),
)


def _with_special(w: F32, special: list[float], at: int) -> F32:
    w[at : at + len(special)] = special[: max(len(w) - at, 0)]
    return w


@given(keys, distributions, offsets, st.lists(st.integers(0, 3000), max_size=6))
def test_a_tensor_may_be_cut_anywhere(
    key: dict[str, int], distribution: Distribution, offset: int, cuts: list[int]
) -> None:
    whole = pz.kernels.noise(3000, **key, offset=offset, distribution=distribution)
    w = weights(3000)
    parts = w.copy()
    pz.kernels.step(
        w, **key, scale=0.3, next_draw=7, next_scale=-0.2, decay=0.1, offset=offset, distribution=distribution
    )
    bounds = [0, *sorted(cuts), 3000]
    for start, stop in pairwise(bounds):
        piece = pz.kernels.noise(stop - start, **key, offset=offset + start, distribution=distribution)
        assert_same_bits(piece, whole[start:stop])
        pz.kernels.step(
            parts[start:stop],
            **key,
            scale=0.3,
            next_draw=7,
            next_scale=-0.2,
            decay=0.1,
            offset=offset + start,
            distribution=distribution,
        )
    assert_same_bits(parts, w)


@given(keys, distributions, offsets, arrays, scales)
def test_perturb_is_one_fma(key: dict[str, int], distribution: Distribution, offset: int, w: F32, scale: float) -> None:
    z = pz.kernels.noise(len(w), **key, offset=offset, distribution=distribution)
    expected = reference.fma32(np.float32(scale), z, w)
    pz.kernels.perturb(w, **key, scale=scale, offset=offset, distribution=distribution)  # type: ignore[arg-type]
    assert_same_bits(w, expected)


@given(keys, distributions, offsets, st.integers(0, 300))
def test_z_is_that_of_the_specification(key: dict[str, int], distribution: Distribution, offset: int, n: int) -> None:
    expected = reference.noise(distribution, key["seed"], key["tensor"], key["draw"], offset, n)
    assert_same_bits(pz.kernels.noise(n, **key, offset=offset, distribution=distribution), expected)


@given(keys, distributions, offsets, arrays, scales, st.integers(0, LAST), scales, st.sampled_from([0.0, 1e-4, 0.3]))
def test_step_is_its_separate_passes(
    key: dict[str, Any],
    distribution: Distribution,
    offset: int,
    w: F32,
    scale: float,
    next_draw: int,
    next_scale: float,
    decay: float,
) -> None:
    apart = w.copy()
    place: dict[str, Any] = {"offset": offset, "distribution": distribution}
    pz.kernels.perturb(apart, **key, scale=scale, **place)
    if decay:
        apart = reference.fma32(np.float32(-decay), apart, apart)
    pz.kernels.perturb(apart, **{**key, "draw": next_draw}, scale=next_scale, **place)
    pz.kernels.step(w, **key, scale=scale, next_draw=next_draw, next_scale=next_scale, decay=decay, **place)
    assert_same_bits(w, apart)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", SETS)
def test_every_set_gives_the_bits_of_the_scalar_one(name: str, distribution: Distribution) -> None:
    n = UNIT + 77
    results = []
    for each in ("scalar", name):
        pz.kernels.use(each)
        assert pz.kernels.isa() == each
        for offset in (0, 2**34 - 1000, 2**39 - UNIT // 2, LAST - n):
            w = weights(n)
            w[:6] = [0.0, -0.0, 1e-45, np.inf, np.nan, 3.4e38]
            pz.kernels.step(w, **STEP, decay=0.01, offset=offset, distribution=distribution)
            results += [w, pz.kernels.noise(n, **KEY, offset=offset, distribution=distribution)]
    half = len(results) // 2
    for scalar, other in zip(results[:half], results[half:], strict=True):
        assert_same_bits(other, scalar)


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_number_of_threads_changes_no_bit(distribution: Distribution) -> None:
    n = 5 * UNIT + 333
    results = []
    for threads in (1, 2, 3, 4):
        pz.kernels.set_threads(threads)
        assert pz.kernels.threads() == threads
        w = weights(n)
        pz.kernels.step(w, **STEP, decay=0.01, offset=UNIT - 5, distribution=distribution)
        results.append(w)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_the_number_of_threads_has_bounds() -> None:
    before = pz.kernels.threads()
    for count, error, message in (
        (0, ValueError, r"threads must be in 1 \.\. 256, got 0"),
        (257, ValueError, r"threads must be in 1 \.\. 256, got 257"),
        (-1, ValueError, "threads must be in .*, got -1"),
        (1.0, TypeError, "threads must be an integer, got 1.0"),
        ("2", TypeError, "threads must be an integer, got '2'"),
    ):
        with pytest.raises(error, match=message):
            pz.kernels.set_threads(count)  # type: ignore[arg-type]
    assert pz.kernels.threads() == before
    for count in (256, 1):
        pz.kernels.set_threads(count)
        assert pz.kernels.threads() == count


def test_an_unknown_set_is_refused_and_the_known_ones_are_named() -> None:
    before = pz.kernels.isa()
    with pytest.raises(ValueError, match="instruction set 'mmx' is unknown") as raised:
        pz.kernels.use("mmx")
    assert str(raised.value).endswith("there is: " + ", ".join(SETS))
    assert pz.kernels.isa() == before
    assert SETS[-1] == "scalar"


def test_python_threads_go_on_during_a_call() -> None:
    w = np.zeros(1 << 22, np.float32)
    started = threading.Lock()
    started.acquire()
    ran: list[bool] = []

    def other() -> None:
        with started:
            ran.append(True)

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    try:
        thread.start()
        sys.setswitchinterval(1000)  # so that this thread loses the GIL only by releasing it
        started.release()
        deadline = time.monotonic() + 10
        while not ran and time.monotonic() < deadline:
            pz.kernels.perturb(w, **PERTURB)
        during = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert during


def test_calls_from_several_python_threads_do_not_disturb_each_other() -> None:
    pz.kernels.set_threads(2)
    n = 2 * UNIT + 9

    def work(seed: int) -> F32:
        w = weights(n)
        for draw in range(5):
            pz.kernels.perturb(w, seed=seed, tensor=1, draw=draw, scale=0.1)
        return w

    expected = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for actual, alone in zip(pool.map(work, range(4)), expected, strict=True):
            assert_same_bits(actual, alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_working_threads() -> None:
    script = """
import os, pocketzo as pz
pz.kernels.set_threads(3)
key = dict(seed=1, tensor=2, draw=3)
expected = pz.kernels.noise(1 << 18, **key).tobytes()
child = os.fork()
if child == 0:
    same = pz.kernels.noise(1 << 18, **key).tobytes() == expected
    os._exit(0 if same and pz.kernels.threads() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert pz.kernels.noise(1 << 18, **key).tobytes() == expected
"""
    # Python warns against forking a process with threads, which is what this tests.
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# ---- all tensors of a model at once, as in the optimizers ------------------------------------------------------------


def test_segments_apply_terms_in_order_to_every_tensor() -> None:
    sizes = (0, 1, 63, UNIT + 3)
    arrays = [weights(n, n) for n in sizes]
    expected = [w.copy() for w in arrays]
    segments = _core.Segments([(w, tensor) for tensor, w in enumerate(arrays)])
    assert segments.size == sum(sizes)
    terms = np.zeros(12, _core.TERM)  # more than the kernels keep the subkeys of
    for i in range(len(terms)):
        terms[i] = (5, i, (0.5, -1.0, 0.25), 0.01 * (i % 2), i % 4, i % 2, 0, 0, 0, (0,) * 3, 0)
    segments.apply(terms)
    for tensor, w in enumerate(expected):
        program = [
            reference.Term(5, i, (0.5, -1.0, 0.25)[: i % 4], float(np.float32(0.01 * (i % 2))), DISTRIBUTIONS[i % 2])
            for i in range(len(terms))
        ]
        assert_same_bits(arrays[tensor], reference.apply(w, program, tensor=tensor))
    _core.Segments([]).apply(terms)
    before = arrays[3].copy()
    segments.apply(terms[:0])
    assert_same_bits(arrays[3], before)


def test_terms_as_the_optimizers_write_them_are_those_of_the_kernels() -> None:
    values: dict[str, Any] = {"seed": 2**64 - 1, "draw": 2**63 + 1, "scale": (1.5, -2.5, 3.5), "decay": 0.125}
    values |= {"count": 3, "distribution": 1, "rounding": 2, "role": 1, "rank": 7, "basis": 2**62 + 1}
    assert _core.TERM.names is not None
    assert {*_core.TERM.names} == {*values, "unused"}
    assert TERM_STRUCT.size == _core.TERM.itemsize
    seed, draw, scales, *rest = values.values()
    (term,) = np.frombuffer(TERM_STRUCT.pack(seed, draw, *scales, *rest), _core.TERM)
    for name, value in values.items():
        assert np.array_equal(term[name], value), name


def test_segments_refuse_what_they_cannot_work_on() -> None:
    w = weights(10)
    for item, error, message in (
        (
            (np.zeros(3), 1),
            TypeError,
            "weight must be a writable, C-contiguous float32, float16 or bfloat16 array, got dtype 'float64'",
        ),
        ((w[::2], 1), ValueError, "weight must be .* got one that is not contiguous"),
        ((w, 2**32), ValueError, r"tensor must be in 0 \.\. 2\*\*32 - 1"),
        ((w, "name"), TypeError, "tensor must be an integer, got 'name'"),
        ((w,), ValueError, "each item must be"),
    ):
        with pytest.raises(error, match=message):
            _core.Segments([item])  # type: ignore[list-item]
    segments = _core.Segments([(w, 1)])
    with pytest.raises(TypeError):
        segments.apply(np.zeros(3, np.float64))
    with pytest.raises(ValueError, match="one-dimensional"):
        segments.apply(np.zeros((1, 1), _core.TERM))
    terms = np.zeros(2, _core.TERM)
    terms["count"][1] = 4
    before = w.copy()
    with pytest.raises(ValueError, match="term 1 has 4 scales"):
        segments.apply(terms)
    terms["count"][1], terms["role"][1] = 1, 3
    with pytest.raises(ValueError, match="role 3; at most 3, 1, 2 and 2 are known"):
        segments.apply(terms)
    terms["role"][1] = 2
    with pytest.raises(ValueError, match="term 1 has role 2, which needs the momentum of every tensor"):
        segments.apply(terms)
    terms["role"] = 0
    for ranks, wrong in ((0, 2), 1), ((17, 17), 0):
        terms["rank"] = ranks
        with pytest.raises(ValueError, match=f"term {wrong} has rank {ranks[wrong]} and role 0; all .* at most 16"):
            segments.apply(terms)
    terms["rank"], terms["role"] = 2, 1
    with pytest.raises(ValueError, match=r"term 0 has rank 2 and role 1; .* role 0 unless it is 0"):
        segments.apply(terms)
    assert_same_bits(w, before)
    for momentum, error, message in (
        (np.zeros(10), TypeError, "momentum must be a writable, C-contiguous float32 array, got dtype 'float64'"),
        (np.zeros(9, np.float32), ValueError, "momentum must have as many elements as the weight, 10, got 9"),
        (np.zeros(20, np.float32)[::2], ValueError, "momentum must be .* got one that is not contiguous"),
    ):
        with pytest.raises(error, match=message):
            _core.Segments([(w, 1, None, momentum)])  # type: ignore[list-item]


# ---- 16-bit weights --------------------------------------------------------------------------------------------------

STORAGES: dict[reference.Storage, Any] = {"float16": np.float16, "bfloat16": bfloat16}
storages = st.sampled_from(list(STORAGES))
roundings = st.sampled_from(["nearest", "stochastic", "later"])
ROUNDINGS = ("nearest", "stochastic", "later")
ROLES = ("shift", "gather", "follow")
terms16 = st.builds(
    reference.Term,
    st.integers(0, LAST),
    st.integers(0, LAST),
    st.lists(scales, max_size=3).map(tuple),
    st.sampled_from([0.0, 2.0**-10, -(2.0**-3)]),
    distributions,
    roundings,
)


moving = st.builds(
    reference.Term,
    st.integers(0, 1),
    st.integers(0, 1),  # so that terms often share a direction
    st.lists(st.floats(-1, 1, width=32), max_size=3).map(tuple),
    st.sampled_from([0.0, 2.0**-10, -(2.0**-3)]),
    distributions,
    roundings,
    st.sampled_from(["shift", "gather", "follow"]),
)


def as_terms(program: list[reference.Term]) -> NDArray[np.void]:
    terms = np.zeros(len(program), _core.TERM)
    for i, term in enumerate(program):
        scale = (*term.scales, 0.0, 0.0, 0.0)[:3]
        codes = DISTRIBUTIONS.index(term.distribution), ROUNDINGS.index(term.rounding), ROLES.index(term.role)
        terms[i] = (term.seed, term.draw, scale, term.decay, len(term.scales), *codes, term.rank, (0,) * 3, term.basis)
    return terms


@given(st.sampled_from(["float32", *STORAGES]), arrays, st.lists(moving, max_size=6))
def test_terms_of_the_momentum_are_those_of_the_specification(
    dtype: Any, w: NDArray[np.float32], program: list[reference.Term]
) -> None:
    w = np.clip(w, -1000, 1000)  # no result is infinite in fp16
    momentum = np.flip(w).copy()
    expected_momentum = momentum.copy()
    if dtype == "float32":
        got: NDArray[Any] = w.copy()
        expected: NDArray[Any] = reference.apply(w, program, tensor=7, m=expected_momentum)
    else:
        got = w.astype(STORAGES[dtype])
        wide = got.astype(np.float32)
        patterns = reference.apply16(wide, program, storage=dtype, tensor=7, m=expected_momentum)
        expected = patterns.view(STORAGES[dtype])
    _core.Segments([(got, 7, None, momentum)]).apply(as_terms(program))
    assert_same_bits(momentum, expected_momentum)
    assert got.tobytes() == expected.tobytes()


@st.composite
def low_rank_programs(draw: st.DrawFn) -> list[reference.Term]:
    rank = draw(st.sampled_from([1, 2, 3, 4, 5, 16]))
    return [
        replace(term, rank=rank, basis=draw(st.sampled_from([0, 1, 2**64 - 1])), role="shift")
        for term in draw(st.lists(moving, min_size=1, max_size=4))
    ]


@settings(deadline=None, max_examples=full_or_small(60, 10))
@given(
    shape=st.tuples(st.integers(1, 330), st.integers(1, 330)),
    program=low_rank_programs(),
    dtype=st.sampled_from(["float32", *STORAGES]),
    isa=st.sampled_from(SETS),
    threads=st.integers(1, 3),
)
def test_terms_with_a_rank_are_those_of_the_specification(
    shape: tuple[int, int], program: list[reference.Term], dtype: Any, isa: str, threads: int
) -> None:
    rows, columns = shape
    w = weights(rows * columns, 3).reshape(shape)
    pz.kernels.use(isa)
    pz.kernels.set_threads(threads)
    if dtype != "float32":
        got = w.astype(STORAGES[dtype])
        _core.Segments([(got, 5)]).apply(as_terms(program))
        before = w.astype(STORAGES[dtype]).astype(np.float32).ravel()
        expected = reference.apply16(before, program, storage=dtype, tensor=5, columns=columns)
        np.testing.assert_array_equal(got.view(np.uint16).ravel(), expected)
        return
    want = reference.apply(w.ravel(), program, tensor=5, columns=columns).reshape(shape)
    depth = 64
    packed = []
    for transposed in False, True:  # the same tensor in both kinds of packed memory
        height, width = shape[::-1] if transposed else shape
        stride = -(-width // 16) * 16
        layout = _core.Packing(rows=height, columns=width, stride=stride, depth=depth, transposed=transposed)
        packed.append((packed_by_hand(w, transposed, stride, depth), layout, transposed, stride))
    deep = w.reshape(rows, 1, columns).copy()  # all dimensions but the first are columns
    _core.Segments([(w, 5), (deep, 5), *((memory, 5, layout) for memory, layout, *_ in packed)]).apply(
        as_terms(program)
    )
    assert_same_bits(w.ravel(), want.ravel())
    assert_same_bits(deep.ravel(), want.ravel())
    for memory, _, transposed, stride in packed:
        assert memory.tobytes() == packed_by_hand(want, transposed, stride, depth).tobytes()


@given(arrays, st.lists(terms16, max_size=3))
def test_a_rank_is_nothing_to_vectors(w: F32, program: list[reference.Term]) -> None:
    got, want = w.copy(), w.copy()
    _core.Segments([(want, 5)]).apply(as_terms(program))
    _core.Segments([(got, 5), (np.zeros((0, 3), np.float32), 6)]).apply(
        as_terms([replace(term, rank=2, basis=7) for term in program])
    )
    assert got.tobytes() == want.tobytes()


@given(storages, arrays, st.lists(terms16, max_size=4))
def test_16_bit_weights_are_those_of_the_specification(
    storage: reference.Storage, w: F32, program: list[reference.Term]
) -> None:
    with np.errstate(over="ignore"):
        stored = w.astype(STORAGES[storage])
    before = stored.astype(np.float32)
    _core.Segments([(stored, 5)]).apply(as_terms(program))
    got = stored.view(np.uint16)
    with np.errstate(invalid="ignore"):
        expected = reference.apply16(before, program, storage=storage, tensor=5) if program else got
    finite = np.isfinite(before) & ~np.isnan(expected.view(STORAGES[storage]).astype(np.float32))
    np.testing.assert_array_equal(got[finite], expected[finite])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_step_updates_stochastically_and_shifts_to_nearest(
    storage: reference.Storage, distribution: Distribution
) -> None:
    w = weights(5000).astype(STORAGES[storage])
    one, two = w.copy(), w.copy()
    pz.kernels.step(one, **STEP, decay=0.125, offset=9, distribution=distribution)
    program = [
        reference.Term(1, 3, (0.5,), 0.125, distribution, "stochastic"),
        reference.Term(1, 4, (0.25,), 0.0, distribution),
    ]
    expected = reference.apply16(w.astype(np.float32), program, storage=storage, tensor=2, offset=9)
    np.testing.assert_array_equal(one.view(np.uint16), expected)
    pz.kernels.perturb(two, **{**PERTURB, "scale": 0.3}, distribution=distribution, rounding="stochastic")
    pz.kernels.perturb(w, **{**PERTURB, "scale": 0.3}, distribution=distribution)
    apart = np.abs(two.view(np.int16).astype(int) - w.view(np.int16))  # in units, if signs are equal
    assert 0.15 < np.mean(apart > 0) < 0.35
    assert np.quantile(apart, 0.99) == 1
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        pz.kernels.perturb(w, **PERTURB, rounding="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1.0, 0.7, 3e-5, 3e-7])
def test_tiny_updates_are_right_on_average(storage: reference.Storage, distribution: Distribution, size: float) -> None:
    # 10,000 updates along one direction, each a thousandth of a unit in the last place: rounding to nearest would
    # lose all of them. 3e-5 and 3e-7 are subnormal in fp16.
    n, times = 64, 10_000
    w = np.full(n, size, STORAGES[storage])
    before = w.astype(np.float64)
    bits_kept = 10 if storage == "float16" else 7
    least = -24 if storage == "float16" else -133
    unit = 2.0 ** max(np.floor(np.log2(size)) - bits_kept, least)
    scale = float(np.float32(unit / 1000))
    segments = _core.Segments([(w, 3)])
    terms = np.zeros(times, _core.TERM)
    terms["seed"], terms["draw"] = 1, np.arange(times)
    terms["scale"][:, 0], terms["count"] = scale, 1
    terms["distribution"], terms["rounding"] = DISTRIBUTIONS.index(distribution), ROUNDINGS.index("stochastic")
    moved = np.zeros(n)
    for draw in range(times):
        moved += scale * pz.kernels.noise(n, seed=1, tensor=3, draw=draw, distribution=distribution)
    segments.apply(terms)
    off = (w.astype(np.float64) - before - moved) / unit  # a sum of rounding errors: mean 0
    # Rounding an update of d units has a variance of at most |d| (1 - |d|), here about 0.001: 10 in all.
    deviation = np.sqrt(times * 0.001)
    assert abs(off.mean()) < 4 * deviation / np.sqrt(n)
    assert 0.5 * deviation < off.std() < 1.6 * deviation
    expected = w.copy()
    for draw in range(times):  # rounded to nearest, all are lost
        pz.kernels.perturb(expected, seed=2, tensor=3, draw=draw, scale=scale, distribution=distribution)
    np.testing.assert_array_equal(expected.astype(np.float32), w.astype(np.float32))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("isa", pz.kernels.available())
def test_what_is_not_finite_stays_so(storage: reference.Storage, isa: str) -> None:
    before = pz.kernels.isa()
    special = np.tile(np.array([np.inf, -np.inf, np.nan], STORAGES[storage]), 50)
    try:
        pz.kernels.use(isa)
        w = special.copy()
        pz.kernels.step(w, **STEP)
        np.testing.assert_array_equal(w.astype(np.float32), special.astype(np.float32))
        pz.kernels.step(w, **STEP, decay=0.125)  # infinity minus infinity
        assert np.isnan(w.astype(np.float32)).all()
    finally:
        pz.kernels.use(before)


def test_16_bits_of_another_kind_are_refused() -> None:
    for dtype, name in ((">f2", ">f2"), (np.int16, "int16"), (np.uint16, "uint16")):
        with pytest.raises(TypeError, match=f"float32, float16 or bfloat16 array, got dtype '{name}'"):
            pz.kernels.perturb(np.zeros(3, dtype), **PERTURB)
    with pytest.raises(TypeError, match="out must be a writable, C-contiguous float32 array"):
        _core.generate(np.zeros(3, np.float16), seed=1, tensor=1, draw=1, offset=0, distribution="gaussian")
    packing = _core.Packing(rows=64, columns=64, stride=64, depth=64, transposed=False)
    with pytest.raises(TypeError, match="packed must be a writable, C-contiguous float32 array"):
        _core.Segments([(np.zeros(4096, np.float16), 1, packing)])


# ---- packed memory ---------------------------------------------------------------------------------------------------


def places(rows: int, columns: int, stride: int, depth: int) -> NDArray[np.int64]:
    """Index of element (k, n), by the formula of kernels.h."""
    k, n = np.mgrid[0:rows, 0:columns]
    top = k // depth * depth
    height = np.minimum(depth, rows - top)
    result: NDArray[np.int64] = top * stride + n // 16 * 16 * height + (k - top) * 16 + n % 16
    return result


def packed_by_hand(tensor: F32, transposed: bool, stride: int, depth: int) -> F32:
    factor = tensor.T if transposed else tensor
    memory = np.full(factor.shape[0] * stride, 7, np.float32)  # the padding is 7 and must not change
    rows, columns = factor.shape
    memory[places(rows, columns, stride, depth)] = factor
    return memory


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, int, int, int, bool]:
    size = st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 256, 257, 320, 512, 576]))
    rows, columns = draw(size), draw(size)
    stride = -(-columns // 16) * 16 + 16 * draw(st.integers(0, 2))
    return rows, columns, stride, draw(st.sampled_from([64, 128, 256])), draw(st.booleans())


@settings(deadline=None, max_examples=full_or_small(60, 10))
@given(
    packing=packings(),
    distribution=st.integers(0, 1),
    terms=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3), st.sampled_from([0.0, 0.01])), max_size=10),
    isa=st.sampled_from(SETS),
    threads=st.integers(1, 3),
)
def test_packed_memory_gets_the_bits_of_contiguous_memory(
    packing: tuple[int, int, int, int, bool],
    distribution: int,
    terms: list[tuple[int, int, float]],
    isa: str,
    threads: int,
) -> None:
    rows, columns, stride, depth, transposed = packing
    shape = (columns, rows) if transposed else (rows, columns)
    tensor = np.random.default_rng(0).standard_normal(shape, np.float32)
    layout = _core.Packing(rows=rows, columns=columns, stride=stride, depth=depth, transposed=transposed)
    memory = packed_by_hand(tensor, transposed, stride, depth)
    program = np.zeros(len(terms), _core.TERM)
    for i, (draw, count, decay) in enumerate(terms):
        program[i] = (3, draw, (0.5, -1.0, 0.25), decay, count, distribution, 0, 0, 0, (0,) * 3, 0)
    pz.kernels.use(isa)
    pz.kernels.set_threads(threads)
    _core.Segments([(tensor, 9)]).apply(program)
    _core.Segments([(memory, 9, layout)]).apply(program)
    assert memory.tobytes() == packed_by_hand(tensor, transposed, stride, depth).tobytes()


@settings(deadline=None, max_examples=full_or_small(60, 10))
@given(packing=packings(), cut=st.floats(0, 1), size=st.floats(0, 1))
def test_packing_copies_any_part_and_nothing_else(
    packing: tuple[int, int, int, int, bool], cut: float, size: float
) -> None:
    rows, columns, stride, depth, transposed = packing
    shape = (columns, rows) if transposed else (rows, columns)
    tensor = np.arange(rows * columns, dtype=np.float32).reshape(shape)
    layout = _core.Packing(rows=rows, columns=columns, stride=stride, depth=depth, transposed=transposed)
    start = int(cut * tensor.size)
    stop = start + int(size * (tensor.size - start))
    memory = packed_by_hand(np.full_like(tensor, -1), transposed, stride, depth)
    layout.pack(memory, tensor.ravel()[start:stop].copy(), start)
    expected = np.full(tensor.size, -1, np.float32)
    expected[start:stop] = np.arange(start, stop)
    assert memory.tobytes() == packed_by_hand(expected.reshape(shape), transposed, stride, depth).tobytes()
    out = np.empty(stop - start, np.float32)
    layout.unpack(memory, out, start)
    np.testing.assert_array_equal(out, np.arange(start, stop))


def test_large_copies_are_cut_among_threads() -> None:
    rows, columns = 600, 1500
    layout = _core.Packing(rows=rows, columns=columns, stride=1504, depth=256, transposed=False)
    tensor = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    memory = np.full(layout.size, 7, np.float32)
    layout.pack(memory, tensor, 0)
    assert memory.tobytes() == packed_by_hand(tensor, False, 1504, 256).tobytes()
    out = np.empty_like(tensor)
    layout.unpack(memory, out, 0)
    np.testing.assert_array_equal(out, tensor)


def test_the_name_of_a_packed_buffer() -> None:
    # mmh3 5.2 (PyPI): mmh3.hash_bytes(np.arange(64, dtype="<f4").tobytes(), 0, x64arch=False).hex()
    full = bytes.fromhex("1e2609a1e44551fd92a6983c895d80b5")
    first, second = np.frombuffer(full[:8], "<u4").tolist()
    assert _core.packed_hash(np.arange(64, dtype=np.float32)) == second << 32 | first & ~7


def test_a_packing_refuses_what_it_cannot_be() -> None:
    good: dict[str, Any] = {"rows": 4, "columns": 4, "stride": 16, "depth": 64, "transposed": False}
    layout = _core.Packing(**good)
    for change, message in (
        ({"rows": 0}, r"rows \* columns must be in 1 \.\. 2\*\*34, got 0 \* 4"),
        ({"rows": 2**33}, r"rows \* columns must be in"),
        ({"columns": -1}, r"columns must be in 0 \.\."),
        ({"columns": 17}, "stride must be a multiple of 16 and at least the columns, got 16"),
        ({"stride": 24}, "stride must be a multiple of 16"),
        ({"depth": 32}, "depth must be a multiple of 64, got 32"),
        ({"depth": 0}, "depth must be a multiple of 64, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.Packing(**{**good, **change})
    memory, values = np.zeros(64, np.float32), np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="packed must have 64 elements, got 63"):
        layout.pack(memory[:63].copy(), values, 0)
    with pytest.raises(ValueError, match="offset \\+ size must not exceed rows \\* columns, got offset 1"):
        layout.pack(memory, values, 1)
    with pytest.raises(ValueError, match="packed must have 64 elements, got 16"):
        _core.Segments([(values, 1, layout)])


def test_remap_refuses_what_it_cannot_replace() -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = np.frombuffer(page, np.uint8).ctypes.data
    for at, size, error, message in (
        (1, 1, ValueError, "address must be that of a page, and size not 0, got 1 and 1"),
        (address, 0, ValueError, f"address must be that of a page, and size not 0, got {address} and 0"),
        (-1, 1, ValueError, r"address must be in 0 \.\. "),
        (address, 2**61, ValueError, rf"size must be at most {(2**63 - 1) // 4}, got {2**61}"),
        (0, 2**60, OSError, os.strerror(errno.ENOMEM)),
    ):
        with pytest.raises(error, match=message):
            _core.remap(at, size, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", ["scale", "next_scale", "decay"])
def test_factors_must_be_finite_in_float32(name: str, value: float) -> None:
    w = np.ones(8, np.float32)
    arguments: dict[str, Any] = {"scale": 1.0, "next_scale": 1.0, "decay": 0.0, name: value}
    expected = "decay" if name == "decay" else "scale"
    with pytest.raises(ValueError, match=f"{expected} must be finite in float32, got {value!r}".replace("+", r"\+")):
        pz.kernels.step(w, seed=1, tensor=2, draw=3, next_draw=4, **arguments)
    assert (w == 1).all()


def test_a_step_without_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="passes must hold at least one"):
        _core.step(
            np.ones(8, np.float32),
            seed=1,
            tensor=2,
            passes=[],
            decay=0.0,
            offset=0,
            distribution="gaussian",
            rounding="nearest",
        )


def test_factors_must_be_numbers() -> None:
    with pytest.raises(TypeError, match="scale must be a number, got 'much'"):
        pz.kernels.perturb(np.ones(8, np.float32), seed=1, tensor=2, draw=3, scale="much")  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", ["uniform", None, 1])
def test_the_distribution_must_be_known(distribution: object) -> None:
    with pytest.raises(ValueError, match=f"distribution must be 'gaussian' or 'rademacher', got {distribution!r}"):
        pz.kernels.noise(8, seed=1, tensor=2, draw=3, distribution=distribution)  # type: ignore[arg-type]


# ---- products of directions ------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 5000),
    offset=st.integers(0, 2**40) | st.sampled_from([0, UNIT - 1000, 2**34 - 1000]),
    draws=st.lists(st.integers(0, LAST), min_size=1, max_size=12, unique=True),
    distribution=st.sampled_from(DISTRIBUTIONS),
    name=st.sampled_from(SETS),
)
@settings(max_examples=full_or_small(40, 5), deadline=None)
def test_products_are_those_of_the_specification(
    n: int, offset: int, draws: list[int], distribution: Distribution, name: str
) -> None:
    vectors = [{draw: 0.75 / (i + 1) for i, draw in enumerate(draws)}, {draws[0]: 1.0}, {draws[-1]: -2.0, 7: 0.5}, {}]
    terms = [[reference.Term(3, d, (s,), distribution=distribution) for d, s in x.items()] for x in vectors]
    pz.kernels.use(name)
    got = pz.kernels.products(n, vectors, seed=3, tensor=4, offset=offset, distribution=distribution)
    want = reference.products(terms, tensor=4, offset=offset, n=n)
    np.testing.assert_array_equal(got.view(np.uint64), want.view(np.uint64), strict=True)


def test_products_on_any_number_of_threads_are_the_same() -> None:
    found = []
    for threads in (1, 2, 5):
        pz.kernels.set_threads(threads)
        found.append(pz.kernels.products(300_001, [{1: 0.5, 2: -1.0}, {3: 1.0}], seed=1, tensor=2, offset=77))
    z = [pz.kernels.noise(300_001, seed=1, tensor=2, draw=d, offset=77).astype(np.float64) for d in (1, 2, 3)]
    np.testing.assert_allclose(found[0][1], [(0.5 * z[0] - z[1]) @ z[2], z[2] @ z[2]], rtol=1e-6)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


def test_products_refuse_what_they_cannot_compute() -> None:
    def call(n: Any = 5, vectors: Any = ({1: 1.0},), **more: Any) -> None:
        pz.kernels.products(n, vectors, **{"seed": 1, "tensor": 2, **more})

    call(offset=LAST - 5)
    for arguments, error, match in (
        ({"n": 0}, ValueError, r"n must be in 1 \.\. 2\*\*64 - 1 - offset, got 0 with offset 0"),
        ({"offset": LAST - 4}, ValueError, "n must be in 1"),
        ({"vectors": []}, ValueError, "vectors must hold at least one"),
        ({"vectors": [{1: float("nan")}]}, ValueError, "scale must be finite in float32, got nan"),
        ({"vectors": [{-1: 1.0}]}, ValueError, "draw must be in 0"),
        ({"vectors": [{1: "2"}]}, TypeError, "scale must be a number"),
        ({"tensor": 2**32}, ValueError, "tensor must be in 0"),
        ({"n": 1.5}, TypeError, "n must be an integer"),
        ({"distribution": "normal"}, ValueError, "distribution must be"),
    ):
        with pytest.raises(error, match=match):
            call(**arguments)
