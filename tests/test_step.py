"""Properties of a step, for every method: what was recorded gives the same bits as what ran, whatever happened."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.journal import Entry, Journal
from pocketzo.kernels import noise
from pocketzo.optim.methods import METHODS, from_settings
from pocketzo.optim.program import Point


class Adaptive(pz.MeZO):
    """Takes directions until one of them has a steep slope: a step may have any number of directions."""

    method = "adaptive"

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        slopes: dict[int, float] = {}
        for draw in draws:
            plus = yield {draw: 1.0}
            minus = yield {draw: -1.0}
            slopes[draw] = plus - minus
            if abs(slopes[draw]) > 0.5:
                break
        return {draw: lr * slope / (2 * self.eps * len(slopes)) for draw, slope in slopes.items()}


class TwoAtOnce(pz.MeZO):
    """Shifts along two directions at a time, and passes through points that share one with the point before."""

    method = "two-at-once"
    least_queries = 2

    def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
        first, *others = draws
        total = 0.0
        for draw in others:
            total += yield {first: 0.5, draw: -2.0}
            total -= yield {first: -0.5, draw: 1.0}
        return dict.fromkeys(draws, lr * total)


ALL: dict[str, type[pz.Optimizer]] = {**METHODS, "adaptive": Adaptive, "two-at-once": TwoAtOnce}


@pytest.fixture(scope="module")
def bundles(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for dtype in "float32", "float16":
        pz.prepare(tiny_onnx, folder / dtype, dtype=dtype)
    return {dtype: folder / dtype for dtype in ("float32", "float16")}


class Weights:
    """A bundle's weights without a session, which is all that a step moves."""

    def __init__(self, bundle: Path) -> None:
        from pocketzo.runtime.weights import Weights

        self.bundle = pz.Bundle.read(bundle)
        self.weights = Weights(self.bundle)
        self.weights.read()


def image(model: Any) -> bytes:
    return b"".join(bytes(piece) for piece in model.weights._bytes())


class Crash(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Settings, and what the objective does at each evaluation of each step."""
    method = draw(st.sampled_from(sorted(ALL)))
    queries = draw(st.integers(max(1, ALL[method].least_queries), 5))
    value = st.floats(-10, 10) | st.sampled_from([math.nan, math.inf, -math.inf, "raise", "crash", "interrupt"])
    evaluations = st.lists(st.floats(-10, 10), min_size=20, max_size=20)
    steps: list[list[Any]] = draw(st.lists(evaluations, min_size=1, max_size=4))
    for step in steps:  # in some of them, one thing that goes wrong
        if draw(st.booleans()):
            step[draw(st.integers(0, 2 * queries))] = draw(value)
    subset = draw(st.none() | st.floats(0.05, 1.0).map(pz.Block))
    return {
        "method": method,
        "steps": steps,
        "flush": draw(st.lists(st.booleans(), min_size=len(steps), max_size=len(steps))),
        "settings": {
            "queries": queries,
            "lr": draw(st.sampled_from([0.0, 1e-4, 1e-2])),
            "eps": draw(st.sampled_from([1e-3, 0.02])),
            "seed": draw(st.integers(0, 2**64 - 1)),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "distribution": draw(st.sampled_from(["gaussian", "rademacher"])),
            "groups": draw(st.sampled_from([(), (pz.ParamGroup("classifier", lr=10, eps=3),)])),
            "subset": subset,
        },
    }


def objective_of(step: list[Any]) -> Any:
    values: Iterator[Any] = iter(step)

    def objective(model: Any) -> float:
        value = next(values)
        if value == "raise":
            raise RuntimeError("out of luck")
        if value == "crash":
            raise Crash
        if value == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return 1.0
        return float(value)

    return objective


def run(opt: pz.Optimizer, plan: dict[str, Any]) -> list[Entry]:
    entries: list[Entry] = []
    for step, flush in zip(plan["steps"], plan["flush"], strict=True):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            opt.step(objective_of(step), entries.append)
        except (RuntimeError, Crash, KeyboardInterrupt):
            pass
        finally:
            signal.signal(signal.SIGINT, before)
        if flush:
            opt.model.weights.flush()
    return entries


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@settings(max_examples=full_or_small(150, 10), deadline=None)
@given(plan=plans(), merged=st.booleans())
def test_replay_gives_the_bits_of_the_live_run(
    bundles: dict[str, Path], dtype: str, plan: dict[str, Any], merged: bool
) -> None:
    model, fresh = Weights(bundles[dtype]), Weights(bundles[dtype])
    opt = ALL[plan["method"]](model, **plan["settings"])
    entries = run(opt, plan)
    assert len(entries) == len(plan["steps"]) == opt.step_number
    again = ALL[plan["method"]](fresh, **plan["settings"])
    for part in [entries] if merged else [[entry] for entry in entries]:
        again.replay(part)
    assert (again.step_number, again.next_draw) == (opt.step_number, opt.next_draw)
    assert image(fresh) == image(model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@settings(max_examples=full_or_small(60, 5), deadline=None)
@given(plan=plans())
def test_an_undone_step_has_the_same_bits_wherever_it_failed(
    bundles: dict[str, Path], dtype: str, plan: dict[str, Any]
) -> None:
    if plan["method"] == "adaptive":  # takes other directions where it fails later
        plan["settings"]["queries"] = 1
    images = set()
    forwards = ALL[plan["method"]](Weights(bundles[dtype]), **plan["settings"]).forwards
    for at in range(forwards):
        for wrong in math.nan, "raise", "crash":
            model = Weights(bundles[dtype])
            opt = ALL[plan["method"]](model, **plan["settings"])
            step: list[Any] = [0.25 * i for i in range(forwards)]
            step[at] = wrong
            (entry,) = run(opt, {"steps": [step], "flush": [True]})
            assert entry.lr == 0
            assert not any(entry.coefficients.values())
            images.add(image(model))
    assert len(images) == 1


@settings(max_examples=full_or_small(100, 10), deadline=None)
@given(plan=plans())
def test_settings_make_an_equal_optimizer(bundles: dict[str, Path], plan: dict[str, Any]) -> None:
    if plan["method"] not in METHODS:
        return
    opt = METHODS[plan["method"]](Weights(bundles["float32"]), **plan["settings"])
    again = from_settings(Weights(bundles["float32"]), opt.settings())
    assert again.settings() == opt.settings()
    assert type(again) is type(opt)


def test_a_step_of_any_number_of_directions_is_recorded(bundles: dict[str, Path], tmp_path: Path) -> None:
    opt = Adaptive(Weights(bundles["float32"]), lr=1e-3, queries=5)
    journal = Journal.create(tmp_path / "j", {})
    for steep_at in 0, 3, 9:  # the last one never comes
        evaluations = [1.0 if i == 2 * steep_at else 0.0 for i in range(10)]
        opt.step(objective_of(evaluations), journal.append)
    journal.close()
    entries = Journal.open(tmp_path / "j", write=False).entries
    assert [list(entry.coefficients) for entry in entries] == [[0], [1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_method_that_raises_leaves_the_weights_where_they_were(bundles: dict[str, Path]) -> None:
    class Broken(pz.MeZO):
        def probe(self, draws: Sequence[int], lr: float) -> Generator[Point, float, dict[int, float]]:
            yield {draws[0]: 1.0}
            raise ZeroDivisionError

    model = Weights(bundles["float32"])
    start = {name: model.weights[name] for name in model.weights}
    with pytest.raises(ZeroDivisionError):
        Broken(model, lr=1e-3).step(lambda m: 1.0)
    for name, value in start.items():
        np.testing.assert_allclose(model.weights[name], value, atol=1e-6)


def test_several_queries_are_the_mean_of_single_ones(tiny_bundle: Path) -> None:
    batch = {"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3), np.int64), "labels": np.array([1])}
    model = pz.load(tiny_bundle, threads=1)
    start = dict(model.weights)
    several = pz.MeZO(model, lr=0.1, seed=9, queries=4).step(lambda m: m.loss(batch))
    moved = {name: model.weights[name] - start[name] for name in start}
    slopes = []
    for draw in range(4):
        one = pz.load(tiny_bundle, threads=1)
        opt = pz.MeZO(one, lr=0.1, seed=9)
        opt.next_draw = draw
        info = opt.step(lambda m: m.loss(batch))
        slopes.append(info.coefficients[draw])
        assert several.coefficients[draw] == pytest.approx(slopes[draw] / 4, rel=1e-3, abs=1e-6)
    ids = {tensor.name: tensor.id for tensor in model.bundle.tensors}
    for name, change in moved.items():
        expected = -sum(
            slope / 4 * noise(change.size, seed=9, tensor=ids[name], draw=draw) for draw, slope in enumerate(slopes)
        )
        np.testing.assert_allclose(change.ravel(), expected, rtol=2e-3, atol=2e-5)


# ---- block -----------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 400))
def test_a_block_is_a_share_of_the_tensors(share: float, seed: int, step: int, count: int) -> None:
    chosen = pz.Block(share)(seed=seed, step=step, count=count)
    assert chosen == sorted(set(chosen)) == pz.Block(share)(seed=seed, step=step, count=count)
    assert len(chosen) == max(1, round(share * count))
    assert set(chosen) <= set(range(count))


def test_blocks_choose_every_tensor_as_often() -> None:
    counts = np.zeros(40)
    for step in range(4000):
        counts[pz.Block(0.25)(seed=1, step=step, count=40)] += 1
    # Mean 1000; the standard deviation of one tensor's count is sqrt(4000 * 0.25 * 0.75) = 27.
    assert counts.sum() == 40_000
    assert np.abs(counts - 1000).max() < 5 * 27.4


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_must_be_one(share: float) -> None:
    with pytest.raises(ValueError, match="block must be greater than 0 and at most 1"):
        pz.Block(share)


def test_a_block_moves_nothing_else(bundles: dict[str, Path]) -> None:
    model = Weights(bundles["float32"])
    opt = pz.MeZO(model, lr=0.1, subset=pz.Block(0.3), weight_decay=0.1)
    for step in range(12):
        before = {name: model.weights[name] for name in model.weights}
        opt.step(objective_of([1.0, 2.0]))
        moved = {name for name in before if not np.array_equal(before[name], model.weights[name])}
        assert moved == {opt.names[i] for i in pz.Block(0.3)(seed=0, step=step, count=len(opt.names))}
