"""The kernels against what numpy would do, on one array beyond the caches; nothing here is asserted.

python -m pytest bench/passes.py --benchmark-group-by=func --benchmark-columns=min,median,rounds
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

import pocketzo as pz
from pocketzo.kernels import Distribution

SIZE = 1 << 26  # elements, 256 MiB
Weights = NDArray[np.float32]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return np.zeros(SIZE, np.float32)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = pz.kernels.threads()
    pz.kernels.set_threads(request.param)
    yield request.param
    pz.kernels.set_threads(before)


def measure(benchmark: BenchmarkFixture, work: Callable[[], object]) -> None:
    benchmark.pedantic(work, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["ns an element"] = benchmark.stats.stats.median / SIZE * 1e9


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_perturb(benchmark: BenchmarkFixture, weights: Weights, threads: int, distribution: Distribution) -> None:
    measure(
        benchmark,
        lambda: pz.kernels.perturb(weights, seed=1, tensor=2, draw=3, scale=1e-3, distribution=distribution),
    )


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_step(benchmark: BenchmarkFixture, weights: Weights, threads: int, distribution: Distribution) -> None:
    measure(
        benchmark,
        lambda: pz.kernels.step(
            weights, seed=1, tensor=2, draw=3, scale=1e-3, next_draw=4, next_scale=1e-3, distribution=distribution
        ),
    )


def test_numpy_scale_in_place(benchmark: BenchmarkFixture, weights: Weights) -> None:
    """The memory bound of one thread: read and write every element, one multiplication each."""
    measure(benchmark, lambda: np.multiply(weights, np.float32(0.999), out=weights))


@pytest.mark.parametrize("bits", [np.random.SFC64, np.random.Philox], ids=["SFC64", "Philox"])
def test_numpy_normal_and_add(
    benchmark: BenchmarkFixture, weights: Weights, bits: type[np.random.BitGenerator]
) -> None:
    """What MeZO does without kernels of its own: draw all of z, then add it."""

    def work() -> None:
        z = np.random.Generator(bits(3)).standard_normal(SIZE, np.float32)
        z *= np.float32(1e-3)
        weights.__iadd__(z)

    measure(benchmark, work)
