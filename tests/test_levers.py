"""Pacing by variance, and the choice among candidate directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import full_or_small

import pocketzo as pz
from pocketzo.formats.bundle import TensorSpec
from pocketzo.formats.journal import Entry
from pocketzo.kernels import noise
from pocketzo.optim.candidates import choose, cosines
from pocketzo.optim.methods import from_settings
from pocketzo.optim.pace import Pace
from pocketzo.optim.slopes import MeanSquare

BATCH = {
    "input_ids": np.array([[3, 4, 5, 6], [7, 8, 9, 10]]),
    "attention_mask": np.ones((2, 4), np.int64),
    "labels": np.array([0, 2]),
}
SMALL = "norm|bias"


def loss(model: pz.Model) -> float:
    return model.loss(BATCH)


def scripted(values: Sequence[float | Exception]) -> Callable[[pz.Model], float]:
    left = iter(values)

    def objective(model: pz.Model) -> float:
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return value

    return objective


def image(model: pz.Model) -> dict[str, bytes]:
    return {name: view.tobytes() for name, view in model.weights.items()}


# ---- the choice ------------------------------------------------------------------------------------------------------

TENSORS = [
    (TensorSpec(name, number, "float32", shape), lr)
    for number, (name, shape, lr) in enumerate([("a", (70, 40), 1.0), ("b", (33,), 10.0), ("c", (5, 7), 0.0)])
]


def flat(draw: int, distribution: Any) -> Any:
    parts = [
        lr * noise(math.prod(spec.shape), seed=9, tensor=spec.id, draw=draw, distribution=distribution).astype(float)
        for spec, lr in TENSORS
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_cosines_are_those_of_the_updates(distribution: Any) -> None:
    last = Entry(0.5, {3: 0.25, 4: -1.5, 2**40: 0.125})
    update = sum(value * flat(draw, distribution) for draw, value in last.coefficients.items())
    candidates = [*range(10, 40), 4]
    directions = [flat(draw, distribution) for draw in candidates]
    want = [z @ update / np.linalg.norm(z) / np.linalg.norm(update) for z in directions]
    got = cosines(candidates, last, TENSORS, seed=9, distribution=distribution)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    chosen = choose(candidates, last, TENSORS, count=5, seed=9, distribution=distribution)
    assert chosen == [candidates[i] for i in sorted(np.argsort(-np.abs(want))[:5])]
    assert 4 in chosen  # which made most of the update


def test_without_an_update_the_first_candidates_are_chosen() -> None:
    assert choose(range(7, 12), None, TENSORS, count=2, seed=1) == [7, 8]
    nothing = Entry(0.5, {1: 0.0})
    assert cosines(range(7, 12), nothing, TENSORS, seed=1) == [0.0] * 5
    assert choose(range(7, 12), nothing, TENSORS, count=2, seed=1) == [7, 8]
    assert cosines([7], Entry(1.0, {1: 1.0}), TENSORS[2:], seed=1) == [0.0]  # lr 0 moves nothing


@pytest.mark.parametrize("method", [pz.MeZO, pz.FZOO, pz.Momentum])
def test_a_step_uses_the_chosen_draws_alone(tiny_bundle: Path, method: type[pz.Optimizer]) -> None:
    model = pz.load(tiny_bundle, threads=1)
    groups = [pz.ParamGroup("bias", lr=5)]
    opt = method(model, lr=1e-3, seed=4, queries=2, candidates=6, groups=groups, trainable=SMALL)
    tensors = [(t, opt.group_of(t.name).lr) for t in model.bundle.tensors if t.name in opt.names]
    last = None
    for step in range(4):
        entries: list[Entry] = []
        info = opt.step(loss, entries.append)
        expected = choose(range(6 * step, 6 * step + 6), last, tensors, count=2, seed=4, distribution=opt.distribution)
        assert list(info.coefficients) == list(entries[0].coefficients) == expected
        assert len(info.losses) == opt.forwards
        assert opt.next_draw == 6 * step + 6
        last = entries[0]
    assert expected != [18, 19]


def test_the_last_update_is_that_of_the_last_step_that_was_not_undone(tiny_bundle: Path) -> None:
    used = []
    for undone in False, True:
        opt = pz.MeZO(pz.load(tiny_bundle, threads=1), lr=1e-3, candidates=8, trainable=SMALL)
        opt.step(scripted([1.5, 1.0]))
        if undone:
            assert opt.step(scripted([1.0, math.nan])).skipped
        else:
            opt.next_draw += 8
        used.append(list(opt.step(scripted([1.0, 1.0])).coefficients))
    assert used[0] == used[1] != [16]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"candidates": 2, "queries": 3}, "candidates for 3 directions a step must be at least 3, got 2"),
        ({"candidates": 4, "subset": pz.Block(0.5)}, "candidates are not for a subset"),
        ({"pace": Pace(0.1), "share": "batch"}, "pace is not for share='batch'"),
        ({"pace": Pace(0.1, 9), "queries": 5}, r"at least 2 \* queries directions a step, 10; got 9"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_bundle: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pz.MeZO(pz.load(tiny_bundle, threads=1), lr=1e-3, **arguments)


def test_what_a_step_takes_is_known_before(tiny_bundle: Path) -> None:
    model = pz.load(tiny_bundle, threads=1)
    plain = pz.MeZO(model, lr=1e-3, queries=2)
    assert (plain.forwards, plain.passes) == (4, 4)
    chosen = pz.MeZO(model, lr=1e-3, queries=2, candidates=9)
    assert (chosen.forwards, chosen.passes) == (4, 4 + 9 + 2)
    paced = pz.MeZO(model, lr=1e-3, queries=2, candidates=9, pace=Pace(0.5))
    assert (paced.forwards, paced.passes) == (8, 8 + 2 * (9 + 4))


def test_no_draws_are_left_for_candidates(tiny_bundle: Path) -> None:
    opt = pz.MeZO(pz.load(tiny_bundle, threads=1), lr=1e-3, candidates=4, trainable=SMALL)
    opt.next_draw = 2**64 - 3
    with pytest.raises(ValueError, match="no draws are left"):
        opt.step(loss)


# ---- the pace --------------------------------------------------------------------------------------------------------


def test_the_variance_is_that_between_the_halves_means() -> None:
    slopes, usual = [0.5, -2.0, 1.5, 0.25, -0.75], MeanSquare()
    usual.take(Entry(0.5, {0: 0.5, 1: -0.25}))  # slopes 2 and -1
    assert usual.value == 2.5
    size = 200_000
    z = [noise(size, seed=1, tensor=2, draw=draw).astype(float) for draw in range(5)]
    estimates = [slope * direction for slope, direction in zip(slopes, z, strict=True)]
    means = [np.mean(estimates[:2], axis=0), np.mean(estimates[2:], axis=0)]
    exact = float(np.sum((means[0] - means[1]) ** 2)) / (2 * size)
    assert Pace(0.1).variance(slopes, usual) * 2.5 == pytest.approx(exact, rel=0.01)
    # The kernel has it exactly.
    halves = [{0: 0.25, 1: -1.0}, {2: 0.5, 3: 0.25 / 3, 4: -0.25}]
    (aa, _), (ab, bb) = pz.kernels.products(size, halves, seed=1, tensor=2).tolist()
    assert (aa - 2 * ab + bb) / (2 * size) == pytest.approx(exact, rel=1e-5)
    # Relative to the mean, the halves say nothing: whatever the slopes, the directions are orthogonal.
    assert (aa - 2 * ab + bb) / (aa + 2 * ab + bb) == pytest.approx(1, abs=0.02)


def test_slopes_of_the_usual_size_need_two_by_the_threshold() -> None:
    usual = MeanSquare()
    usual.take(Entry(1.0, {0: 3.0}))
    for count in 2, 4, 20:
        assert Pace(1.0).variance([3.0] * count, usual) == pytest.approx(2 / count)
        assert Pace(1.0).variance([6.0] * count, usual) == pytest.approx(8 / count)
        assert Pace(1.0).variance([7.0] * count, MeanSquare()) == pytest.approx(2 / count)
    assert Pace(1.0).variance([3.0], usual) == math.inf
    assert Pace(1.0).variance([0.0, 0.0], MeanSquare()) == 0.0
    assert [Pace(0.1).usual(q) for q in (1, 3, 8)] == [20, 21, 24]
    assert [Pace(0.1, 10).usual(q) for q in (1, 3)] == [10, 9]
    assert [Pace(5.0).usual(q) for q in (1, 3)] == [2, 3]


def walk(slopes: Sequence[float], eps: float = 1e-3) -> list[float]:
    return [loss for slope in slopes for loss in (1.0 + eps * slope, 1.0 - eps * slope)]


def test_a_step_waits_until_the_pace_is_kept(tiny_bundle: Path) -> None:
    opt = pz.MeZO(pz.load(tiny_bundle, threads=1), lr=1e-3, queries=2, pace=Pace(0.5, 10), trainable=SMALL)
    first = opt.step(scripted(walk([1.0] * 10)))
    assert list(first.coefficients) == [0, 1, 2, 3]  # no usual slope is known: 2 / 4
    assert first.coefficients[0] == pytest.approx(1e-3 / 4, rel=1e-6)
    assert len(opt.step(scripted(walk([0.1] * 10))).coefficients) == 2  # much less than usual
    assert len(opt.step(scripted(walk([9.0] * 10))).coefficients) == 10  # the most
    assert opt.next_draw == 16


@pytest.mark.parametrize("wrong", [math.nan, math.inf, RuntimeError("no")], ids=str)
def test_a_step_that_is_undone_takes_no_more_directions(tiny_bundle: Path, wrong: float | Exception) -> None:
    opt = pz.MeZO(pz.load(tiny_bundle, threads=1), lr=1e-3, queries=2, pace=Pace(0.01, 30), trainable=SMALL)
    entries: list[Entry] = []
    values: list[float | Exception] = [*walk([5.0] * 30)]
    values[5] = wrong  # in the second round
    try:
        opt.step(scripted(values), entries.append)
    except RuntimeError:
        assert isinstance(wrong, RuntimeError)
    assert entries == [Entry(0.0, dict.fromkeys(range(4), 0.0))]
    assert opt._usual.value == 0.0


def test_a_method_without_slopes_has_no_pace(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="pace is not for fzoo: it divides the estimate by the spread of its losses"):
        pz.FZOO(pz.load(tiny_bundle, threads=1), lr=1e-3, pace=Pace(0.1))


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 64), (-1.0, 64), (math.nan, 64), (0.1, 1)])
def test_a_pace_must_be_possible(threshold: float, most: int) -> None:
    with pytest.raises(ValueError, match="pace"):
        Pace(threshold, most)


# ---- replay and resume -----------------------------------------------------------------------------------------------


@given(
    method=st.sampled_from([pz.MeZO, pz.Momentum]),
    exact=st.booleans(),
    queries=st.integers(1, 3),
    candidates=st.none() | st.integers(3, 7),
    pace=st.none() | st.builds(Pace, st.sampled_from([0.2, 0.5, 1.0]), st.integers(6, 9)),
    script=st.lists(st.floats(-3, 3) | st.just(math.nan), min_size=60, max_size=60),
    cut=st.integers(1, 4),
)
@settings(max_examples=full_or_small(25, 5), deadline=None)
def test_a_resumed_run_goes_on_with_the_same_directions(
    tiny_bundle: Path,
    method: type[pz.Optimizer],
    exact: bool,
    queries: int,
    candidates: int | None,
    pace: Pace | None,
    script: list[float],
    cut: int,
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    whole = method(
        model, lr=1e-3, seed=8, queries=queries, candidates=candidates, pace=pace, exact=exact, trainable="bias"
    )

    def objectives() -> list[Callable[[pz.Model], float]]:
        return [scripted([*script[7 * step :], *([0.5] * 60)]) for step in range(6)]

    entries: list[Entry] = []
    for objective in objectives():
        whole.step(objective, entries.append)
    again = from_settings(again_model := pz.load(tiny_bundle, threads=1), whole.settings())
    assert again.settings() == whole.settings()
    again.replay(entries[:cut])
    went_on: list[Entry] = []
    for objective in objectives()[cut:]:
        again.step(objective, went_on.append)
    assert entries[cut:] == went_on
    assert again.next_draw == whole.next_draw
    replayed = from_settings(replayed_model := pz.load(tiny_bundle, threads=1), whole.settings())
    replayed.replay(entries)
    assert image(again_model) == image(replayed_model) == image(model)


def test_a_run_resumes_from_a_snapshot_with_the_same_choice(
    tiny_bundle: Path, data: pz.Dataset, tmp_path: Path
) -> None:
    def trainer(run: Path, steps: int) -> pz.Trainer:
        model = pz.load(tiny_bundle, threads=1)
        opt = pz.MeZO(model, lr=1e-3, candidates=5, pace=Pace(0.5, 8), trainable=SMALL)
        return pz.Trainer(model, opt, data, batch_size=4, steps=steps, run=run, snapshot_every=3)

    trainer(tmp_path / "whole", 8).fit()
    part = trainer(tmp_path / "part", 8)
    part.callback = lambda progress: setattr(part, "stop_requested", progress.info.step == 4)
    part.fit()
    assert pz.Run(tmp_path / "part").steps == 5
    pz.Trainer.resume(tmp_path / "part", data).fit()
    whole, resumed = pz.Run(tmp_path / "whole"), pz.Run(tmp_path / "part")
    assert resumed.entries == whole.entries
    assert any(len(entry.coefficients) > 2 for entry in whole.entries)
