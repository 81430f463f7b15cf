from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pocketzo as pz
from pocketzo.tasks.metrics import METRICS
from pocketzo.train.verdict import (
    Change,
    _jackknife,
    _significance,
    evaluation_changes,
    training_change,
    verdict,
    worse_than_before,
)


def trained(model: pz.Model, data: pz.Dataset, path: Path, optimizer: pz.Optimizer, **options: Any) -> pz.Run:
    pz.Trainer(model, optimizer, data, run=path, **{"steps": 30, "batch_size": 8, **options}).fit()
    return pz.Run(path)


def losses_of(model: pz.Model, data: pz.Dataset) -> Any:
    """Return the loss of each example."""
    return np.array([model.loss(data.batch(np.array([i]))) for i in range(len(data))])


# ---- a change --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "error", "higher", "expected"),
    [
        (0.5, 0.6, 0.01, True, "better"),
        (0.5, 0.6, 0.01, False, "worse"),
        (0.5, 0.4, 0.01, True, "worse"),
        (0.5, 0.4, 0.01, False, "better"),
        (0.5, 0.519, 0.01, True, "unmoved"),
        (0.5, 0.521, 0.01, True, "better"),
        (0.5, 0.5, 0.0, True, "unmoved"),
        (0.5, 0.6, None, True, "better"),
        (1.1, 1.9e6, 8.7e5, False, "worse"),  # a few of eight examples have all of it
        (1.1, 105.0, 60.0, False, "unmoved"),
        (1.1, 1.9e6, 1e6, True, "unmoved"),
        (0.5, math.nan, None, True, "worse"),
        (math.nan, 0.5, None, True, "better"),
        (math.nan, math.nan, None, True, "unmoved"),
    ],
)
def test_a_change_is_judged_by_direction_and_noise(
    before: float, after: float, error: float | None, higher: bool, expected: str
) -> None:
    change = Change("quality", before, after, error, 2.0, higher_is_better=higher, text="{:.3f}".format)
    assert change.verdict == expected
    words = {"unmoved": "did not move", "better": "rose" if higher else "fell", "worse": "fell" if higher else "rose"}
    if error is not None:
        assert f"quality {words[expected]}" in str(change)


def test_a_small_difference_has_digits() -> None:
    change = Change("loss", 1.12881, 1.12879, 1e-6, 2.0, higher_is_better=False, text="{:.4f}".format)
    assert str(change) == (
        "loss fell: from 1.1288 to 1.1288, a difference of 2e-05 with a standard error of 1e-06"
    )  # fmt: skip


@pytest.mark.parametrize("parts", [2, 4, 8, 16, 32])
def test_one_of_twenty_changes_that_are_noise_is_called_one(parts: int) -> None:
    rng = np.random.default_rng(parts)
    found = 0
    for _ in range(4000):
        noise = rng.normal(size=parts)
        without = (noise.sum() - noise) / (parts - 1)
        error, count = _jackknife([0.0] * parts, without.tolist())
        assert error is not None
        assert error == pytest.approx(noise.std(ddof=1) / math.sqrt(parts))
        found += abs(noise.mean()) > _significance(count - 1) * error
    assert 0.035 < found / 4000 < 0.065


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_the_paired_differences(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    before = losses_of(model, data)
    run = trained(model, data, tmp_path / "run", pz.MeZO(model, lr=1e-3, seed=3), eval=data)
    changes = {change.name: change for change in evaluation_changes(run, run.steps)}
    assert list(changes) == ["accuracy", "loss"], "the metric of the run comes first"
    differences = (losses_of(model, data) - before).reshape(30, 4).mean(axis=1)  # 30 parts of 4 examples
    change = changes["loss"]
    assert change.after - change.before == pytest.approx(differences.mean(), rel=1e-4)
    assert change.error == pytest.approx(differences.std(ddof=1) / math.sqrt(30), rel=1e-3)
    plain = losses_of(model, data).std(ddof=1) / math.sqrt(120)
    assert change.error < plain, "pairing does not help"


def test_every_metric_has_an_error_that_shrinks_with_the_data(model: pz.Model, data: pz.Dataset) -> None:
    from pocketzo.tasks.evaluate import evaluate_in_parts

    names = ["accuracy", "f1", "matthews", "loss", "perplexity"]
    found = evaluate_in_parts(model, data, batch_size=4, metrics=names, parts=32)
    assert found.values == pz.evaluate(model, data, batch_size=4, metrics=names)
    rest = data.batch(np.arange(4, 120))
    first = {name: values[0] for name, values in found.without.items()}
    assert first["accuracy"] == (model.run(rest)["logits"].argmax(-1) == rest["labels"]).mean()
    assert first["loss"] == pytest.approx(model.loss(rest), rel=1e-6)
    assert first["perplexity"] == pytest.approx(math.exp(model.loss(rest)), rel=1e-6)
    assert {len(values) for values in found.without.values()} == {30}
    assert len(evaluate_in_parts(model, data, batch_size=1, metrics=names, parts=32).without["f1"]) == 32
    assert evaluate_in_parts(model, data, batch_size=120, metrics=names, parts=32).without["f1"] == []


def test_a_run_that_learnt_has_nothing_to_try(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    optimizer = pz.FZOO(model, lr=2e-3, seed=3)
    run = trained(model, data, tmp_path / "run", optimizer, eval=data, steps=150, batch_size=32)
    lines = verdict(run)
    assert lines[0].startswith("accuracy rose: from ")
    assert lines[1].startswith("loss fell: from ")
    assert len(lines) == 2
    assert worse_than_before(run, run.steps) is None
    assert worse_than_before(run, 0) is None


def test_a_run_that_got_worse_says_so_and_names_the_best_step(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    first = trained(model, data, tmp_path / "good", pz.FZOO(model, lr=2e-3, seed=3), steps=150, batch_size=32)
    first.replay(tmp_path / "better")
    better = pz.load(tmp_path / "better", threads=1)
    run = trained(better, data, tmp_path / "run", pz.FZOO(better, lr=30.0, seed=3), eval=data, metric="loss")
    assert run.best_step == 0
    assert verdict(run)[0].startswith("loss rose: from ")
    assert verdict(run)[-1] == "try: a tenth of the lr, --lr 3, or --best, which gives step 0: loss got worse"
    assert str(worse_than_before(run, 30)).startswith("the weights after step 30 are worse than those before the run: ")


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_moved_too_little_says_so(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, evaluated: bool
) -> None:
    options = {"eval": data} if evaluated else {}
    run = trained(model, data, tmp_path / "run", pz.FZOO(model, lr=1e-7, seed=3), **options)
    assert "ten times the lr, --lr 1e-06" in verdict(run)[-1]


@pytest.mark.parametrize("method", [pz.FZOO, pz.MeZO])
def test_a_run_that_saw_no_difference_says_so(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, method: type[pz.Optimizer]
) -> None:
    run = trained(model, data, tmp_path / "run", method(model, lr=1e-3, eps=1e-6), eval=data, objective="accuracy")
    assert verdict(run)[-1] == (
        "try: a larger --eps and a larger --batch-size: in 30 of 30 steps all losses were equal with an eps of 1e-06, "
        "so that nothing was learnt"
    )


def test_steps_that_were_undone_are_counted(model: pz.Model, data: pz.Dataset, tmp_path: Path) -> None:
    calls = 0

    def objective(outputs: Any, batch: Any) -> float:
        nonlocal calls
        calls += 1
        return math.inf if calls % 6 == 0 else float(outputs["loss"])

    run = trained(model, data, tmp_path / "run", pz.MeZO(model, lr=1e-3), objective=objective)
    assert "try: a smaller --lr or --eps: 10 of 30 steps were undone, as losses were not finite" in verdict(run)


def with_losses(run: pz.Run, losses: Sequence[float | None]) -> pz.Run:
    lines = [{"step": i + 1, "loss": loss, "lr": 0.1, "seconds": 0.1} for i, loss in enumerate(losses)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pz.Run(run.path)


def test_without_any_evaluation_the_first_and_last_losses_are_compared(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    run = trained(model, data, tmp_path / "run", pz.MeZO(model, lr=1e-3), objective=lambda outputs, batch: 1.0)
    assert training_change(run) == Change(
        "objective of the first and the last 6 steps", 1.0, 1.0, 0.0, 2.23, False, "{:.4g}".format
    ) or "did not move" in str(training_change(run))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 30)
    for slope, expected in (0.0, "unmoved"), (-0.05, "better"), (0.05, "worse"):
        run = with_losses(run, (2 + slope * np.arange(30) + noise).tolist())
        change = training_change(run)
        assert change is not None
        assert change.verdict == expected
    run = with_losses(run, [1.0, None, 2.0, 1.5] + [None] * 26)
    assert training_change(run) is None
    assert verdict(run)[0] == "too few steps to say whether the loss moved beyond its noise"


def test_without_evaluation_data_the_loss_of_the_same_training_examples_is_compared(
    model: pz.Model, data: pz.Dataset, tmp_path: Path
) -> None:
    run = trained(model, data, tmp_path / "run", pz.FZOO(model, lr=5e-3, seed=3), steps=200, batch_size=16)
    samples = run.evaluations("sample")
    assert list(samples) == [0, 200]
    assert verdict(run)[0].startswith("loss of some training examples fell: from ")
    assert run.evaluations() == {}
    count = samples[0]["count"]
    assert count is not None
    assert 16 * 4 <= count <= 120


@pytest.mark.parametrize(("loss", "recommended"), [(0.9, True), (8.0, False)])
def test_a_best_step_is_recommended_unless_it_is_worse_itself(
    model: pz.Model, data: pz.Dataset, tmp_path: Path, loss: float, recommended: bool
) -> None:
    run = trained(model, data, tmp_path / "run", pz.MeZO(model, lr=1e-3), eval=data)
    lines = []
    for step, accuracy, value in (0, 0.30, 1.0), (10, 0.31, loss), (30, 0.30, 9.0):
        scatter = [
            accuracy,
            accuracy + 0.002 * step,
            accuracy - 0.002 * step,
        ]  # an accuracy that moved within its noise
        values = {"accuracy": accuracy, "loss": value}
        lines.append({"step": step, "eval": values, "without": {"accuracy": scatter, "loss": [value] * 3}})
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.best_step == 10
    assert ("--best, which gives step 10" in verdict(run)[-1]) == recommended
    assert "a tenth of the lr, --lr 0.0001" in verdict(run)[-1]
    assert (worse_than_before(run, 10) is None) == recommended


def test_every_metric_can_be_judged() -> None:
    for metric in METRICS.values():
        change = Change(metric.name, 0.5, 0.25, 0.01, 2.0, metric.higher_is_better, metric.text)
        assert change.verdict == ("worse" if metric.higher_is_better else "better")
