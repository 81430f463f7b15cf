"""The metrics against scikit-learn, and where it has none or warns, by hand."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from sklearn import metrics as sklearn  # type: ignore[import-untyped]

import pocketzo as pz
from pocketzo.tasks.metrics import METRICS, Found, Metric, metric_named
from pocketzo.tasks.objective import metric_objective

OF_PREDICTIONS = [metric for metric in METRICS.values() if metric.of == "classes"]
PEERS = {
    "accuracy": lambda labels, predictions: sklearn.accuracy_score(labels, predictions),
    "f1": lambda labels, predictions: sklearn.f1_score(labels, predictions, average="macro"),
    "matthews": lambda labels, predictions: sklearn.matthews_corrcoef(labels, predictions),
}


def value(name: str, predictions: Any, labels: Any) -> float:
    return METRICS[name](Found(None, np.asarray(predictions), np.asarray(labels)))


def pairs(most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, most), st.integers(0, most)), min_size=1, max_size=40)


@pytest.mark.parametrize("name", PEERS)
@settings(deadline=None)
@given(found=st.integers(0, 5).flatmap(pairs))
def test_metrics_are_those_of_scikit_learn(name: str, found: list[tuple[int, int]]) -> None:
    predictions, labels = (np.array(numbers) for numbers in zip(*found, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where one class is all there is
        expected = PEERS[name](labels, predictions)
    assert value(name, predictions, labels) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_many_classes_and_examples(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50_000, 200_000)  # a vocabulary's classes: no table of classes x classes is made
    predictions = np.where(rng.random(labels.size) < 0.6, labels, rng.permutation(labels))
    few = labels % 91, predictions % 91
    assert value(name, few[1], few[0]) == pytest.approx(PEERS[name](*few), rel=1e-9)
    assert 0.1 < value(name, predictions, labels) < 0.9


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        # Class 0: precision 1, recall 1/2. Class 1: 2/3 and 1. Matthews: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1).
        ([0, 1, 1, 1], [0, 0, 1, 1], {"accuracy": 3 / 4, "f1": (2 / 3 + 4 / 5) / 2, "matthews": 2 / math.sqrt(12)}),
        # A class that is only predicted, or only a label, counts with an F1 of 0; one that is neither (1) not at all.
        ([0, 2], [0, 0], {"accuracy": 1 / 2, "f1": (2 / 3 + 0) / 2, "matthews": 0.0}),
        ([0, 0], [0, 2], {"accuracy": 1 / 2, "f1": (2 / 3 + 0) / 2, "matthews": 0.0}),
        ([3, 3], [3, 3], {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}),  # nothing to be correlated with
        ([1, 0], [0, 1], {"accuracy": 0.0, "f1": 0.0, "matthews": -1.0}),
        ([7], [7], {"accuracy": 1.0, "f1": 1.0, "matthews": 0.0}),
        ([7], [5], {"accuracy": 0.0, "f1": 0.0, "matthews": 0.0}),
    ],
)
def test_by_hand(predictions: list[int], labels: list[int], expected: dict[str, float]) -> None:
    for name, number in expected.items():
        assert value(name, predictions, labels) == pytest.approx(number, rel=1e-15), name


OF_SETS = {
    "subset-accuracy": lambda labels, predictions: sklearn.accuracy_score(labels, predictions),
    "micro-f1": lambda labels, predictions: sklearn.f1_score(labels, predictions, average="micro", zero_division=0),
    "macro-f1": lambda labels, predictions: sklearn.f1_score(labels, predictions, average="macro", zero_division=0),
}
OF_NUMBERS = {
    "r2": lambda labels, predictions: sklearn.r2_score(labels, predictions),
    "pearson": lambda labels, predictions: np.mean(
        [stats.pearsonr(x, y).statistic for x, y in zip(columns(predictions), columns(labels), strict=True)]
    ),
    "mse": lambda labels, predictions: sklearn.mean_squared_error(labels, predictions),
    "mae": lambda labels, predictions: sklearn.mean_absolute_error(labels, predictions),
}


def columns(values: NDArray[Any]) -> Any:
    return values.reshape(len(values), -1).T


def test_every_metric_has_a_peer() -> None:
    for of, peers in ("classes", PEERS), ("label sets", OF_SETS), ("numbers", OF_NUMBERS):
        assert {name for name, metric in METRICS.items() if metric.of == of} == set(peers)


@pytest.mark.parametrize("name", OF_SETS)
@settings(deadline=None)
@given(shape=st.tuples(st.integers(1, 20), st.integers(2, 5)), seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_metrics_of_label_sets_are_those_of_scikit_learn(
    name: str, shape: tuple[int, int], seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    labels, predictions = (rng.random((2, *shape)) < share).astype(np.int64)
    expected = OF_SETS[name](labels, predictions)
    assert value(name, predictions, labels) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", OF_NUMBERS)
@pytest.mark.parametrize("shape", [(2,), (50,), (30, 4)])
def test_metrics_of_numbers_are_those_of_scikit_learn_and_scipy(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(3, 2, shape).astype(np.float32)  # as batches hold them
    predictions = labels + rng.normal(0, 1, shape)
    expected = OF_NUMBERS[name](labels.astype(np.float64), predictions)
    assert value(name, predictions, labels) == pytest.approx(expected, rel=1e-12)


def test_numbers_that_do_not_vary() -> None:
    flat, other = np.full(3, 0.1), np.array([1.0, 2.0, 4.0])  # the mean of three times 0.1 is not 0.1
    assert value("pearson", flat, other) == value("pearson", other, flat) == 0
    assert value("r2", flat, flat) == sklearn.r2_score(flat, flat) == 1
    assert value("r2", other, flat) == 0  # scikit-learn divides by the rounding here: -3e34
    assert value("r2", [1.0, 2.0], [3.0, 3.0]) == sklearn.r2_score([3.0, 3.0], [1.0, 2.0]) == 0
    assert math.isnan(value("r2", [1.0], [1.0]))
    assert value("pearson", [1.0], [1.0]) == 0
    assert METRICS["mae"].score({"mae": 1.0}) > METRICS["mae"].score({"mae": 2.0})
    assert METRICS["r2"].cost(0.25) == 0.75


@pytest.mark.parametrize("name", [*OF_SETS, *OF_NUMBERS])
def test_scores_that_are_not_finite_have_no_value(name: str) -> None:
    labels = np.ones((2, 2))
    assert math.isnan(value(name, np.zeros((0, 2)), np.zeros((0, 2))))
    for bad in [-1.0] if name in OF_SETS else [math.nan, math.inf]:
        assert math.isnan(value(name, np.array([[1, 1], [1, bad]]), labels))


@pytest.mark.parametrize("metric", OF_PREDICTIONS, ids=lambda metric: metric.name)
def test_the_better_predictions_have_the_better_score(metric: Metric) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 400)
    errors = [np.where(rng.random(400) < share, (labels + 1) % 4, labels) for share in (0.0, 0.1, 0.3)]
    evaluations = [{metric.name: metric(Found(None, predictions, labels))} for predictions in errors]
    scores = [metric.score(evaluation) for evaluation in evaluations]
    assert scores == sorted(scores, reverse=True)
    costs = [metric.cost(metric(Found(None, predictions, labels))) for predictions in errors]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(0)
    assert metric.cost_name == f"1 - {metric.name}"


@pytest.mark.parametrize("metric", OF_PREDICTIONS, ids=lambda metric: metric.name)
def test_without_a_label_or_with_scores_that_are_nan_there_is_no_value(metric: Metric) -> None:
    nothing = np.array([], np.int64)
    assert math.isnan(metric(Found(0.5, nothing, nothing)))
    assert math.isnan(metric(Found(0.5, np.array([0, -1]), np.array([0, 1]))))
    assert math.isnan(metric.cost(math.nan))
    assert metric.score({metric.name: math.nan}) == -math.inf


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_what_a_metric_needs_must_be_there(metric: Metric) -> None:
    with pytest.raises(ValueError, match=f"metric '{metric.name}' needs "):
        metric(Found())
    if not metric.of_loss:
        shapes = {
            "classes": ("vectors", (1, 1), (2,)),
            "label sets": ("matrices", (1,), (2, 3)),
            "numbers": ("vectors or matrices", (1, 1, 1), (2,)),
        }
        expected, wrong, right = shapes[metric.of]
        for labels, predictions in (wrong, wrong), (right, (1, *right[1:])):
            got = f"{list(predictions)} and {list(labels)}"
            with pytest.raises(ValueError, match=f"must be {expected} of one shape, got {re.escape(got)}"):
                metric(Found(None, np.zeros(predictions, np.int64), np.zeros(labels, np.int64)))


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [(0.0, 1.0), (math.log(50), 50.0), (1000.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)],
)
def test_loss_and_perplexity(loss: float, perplexity: float) -> None:
    assert METRICS["perplexity"](Found(loss)) == pytest.approx(perplexity, rel=1e-12, nan_ok=True)
    assert METRICS["loss"](Found(loss)) == pytest.approx(loss, nan_ok=True)
    assert METRICS["perplexity"].cost(3.5) == 3.5
    assert METRICS["perplexity"].cost_name == "perplexity"
    assert METRICS["loss"].score({"loss": 1.0}) > METRICS["loss"].score({"loss": 2.0})
    assert METRICS["loss"].score({"loss": None}) == METRICS["loss"].score({}) == -math.inf


def test_as_text() -> None:
    percent = {"accuracy", "subset-accuracy"}
    for name, metric in METRICS.items():
        assert metric.format(0.81312) == ("81.3 %" if name in percent else "0.8131"), name
    assert METRICS["mse"].format(123456.0) == "1.235e+05"
    assert METRICS["accuracy"].format(None) == "-"
    assert METRICS["accuracy"].format(math.nan) == "nan"
    assert METRICS["perplexity"].format(math.inf) == "inf"


def test_an_unknown_metric_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"metric must be one of accuracy, f1, .*, got 'F1'"):
        metric_named("F1")


def test_a_new_metric_is_one_entry_of_the_table(
    tiny_bundle: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistakes(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
        return float(np.count_nonzero(predictions != labels))

    metric = Metric("mistakes", "classes", mistakes, higher_is_better=False, text="{:.0f}".format)
    monkeypatch.setitem(METRICS, "mistakes", metric)
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    result = pz.evaluate(model, data, metrics=["mistakes", "accuracy"])
    assert result["mistakes"] == pytest.approx(120 * (1 - result["accuracy"]))
    batch = data.batch(np.arange(120))
    assert metric_objective("mistakes", model.bundle)(model.run(batch), batch) == result["mistakes"]
