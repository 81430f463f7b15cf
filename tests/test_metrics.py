"""The metrics against scikit-learn, and where it has none or warns, by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sklearn  # type: ignore[import-untyped]

import pocketzo as pz
from pocketzo.tasks.metrics import METRICS, Found, Metric, metric_named
from pocketzo.tasks.objective import metric_objective

OF_PREDICTIONS = [metric for metric in METRICS.values() if metric.of == "predictions"]
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
    if metric.of == "predictions":
        with pytest.raises(ValueError, match=r"vectors of one length, got shapes \[2\] and \[1\]"):
            metric(Found(None, np.array([0, 1]), np.array([0])))
        with pytest.raises(ValueError, match=r"vectors of one length, got shapes \[1, 1\] and \[1, 1\]"):
            metric(Found(None, np.array([[0]]), np.array([[0]])))


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
    texts = {name: metric.format(0.81312) for name, metric in METRICS.items()}
    assert texts == {
        "accuracy": "81.3 %", "f1": "0.8131", "matthews": "0.8131", "loss": "0.8131", "perplexity": "0.8131"
    }  # fmt: skip
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

    metric = Metric("mistakes", "predictions", mistakes, higher_is_better=False, text="{:.0f}".format)
    monkeypatch.setitem(METRICS, "mistakes", metric)
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    result = pz.evaluate(model, data, metrics=["mistakes", "accuracy"])
    assert result["mistakes"] == pytest.approx(120 * (1 - result["accuracy"]))
    batch = data.batch(np.arange(120))
    assert metric_objective("mistakes", model.bundle)(model.run(batch), batch) == result["mistakes"]
