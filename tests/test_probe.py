from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketzo import MissingExtraError
from pocketzo.demo import probe
from pocketzo.demo.run import run_demo

Array = npt.NDArray[Any]


def clusters(rows: int, seed: int, spread: float) -> tuple[Array, Array]:
    """Return three Gaussian clusters in 5 dimensions, whose scales differ by a factor of 1e6."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, rows)
    features = 4 * np.eye(3, 5)[labels] + spread * random.standard_normal((rows, 5))
    return features * 10.0 ** np.arange(-3, 2), labels


def test_probe_separates_what_is_separable() -> None:
    train, test = clusters(60, 0, 0.1), clusters(200, 1, 0.1)
    assert probe.linear_probe(*train, *test) == 1.0
    assert probe.linear_probe(train[0].astype(np.float32), train[1], *test, l2=1e-6) == 1.0


def test_probe_is_at_chance_on_noise() -> None:
    random = np.random.default_rng(0)
    train, test = random.standard_normal((300, 4)), random.standard_normal((3000, 4))
    accuracy = probe.linear_probe(train, np.arange(300) % 2, test, np.arange(3000) % 2)
    assert 0.45 < accuracy < 0.55


def test_probe_ignores_constant_columns_and_knows_unbalanced_classes() -> None:
    features, labels = np.ones((50, 3)), np.array([0] * 40 + [1] * 10)
    assert probe.linear_probe(features, labels, features, labels) == 0.8


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_solution_is_the_minimum(classes: int) -> None:
    features, labels = clusters(90, 0, 3.0)
    features, labels = features[labels < classes], labels[labels < classes]
    standard = (features - features.mean(0)) / features.std(0)
    x = np.column_stack([standard, np.ones(len(labels))])
    y = np.eye(classes)[labels]
    l2 = np.array([[0.05]] * 5 + [[0.0]])

    def objective(weights: Array) -> float:
        scores = np.exp(x @ weights)
        return float(-np.log((scores / scores.sum(1, keepdims=True) * y).sum(1)).mean() + (l2 * weights**2).sum() / 2)

    model = probe._fit(standard, labels, 0.05)
    best = np.vstack([model.coef_.T, model.intercept_])
    if classes == 2:
        best = np.hstack([-best / 2, best / 2])
    gradient = np.zeros_like(best)
    for index in np.ndindex(*best.shape):
        step = np.zeros_like(best)
        step[index] = 1e-5
        gradient[index] = (objective(best + step) - objective(best - step)) / 2e-5
    np.testing.assert_allclose(gradient, 0, atol=2e-5)  # and the objective is convex


def test_probe_refuses_what_does_not_fit() -> None:
    features, labels = clusters(20, 0, 1.0)
    with pytest.raises(ValueError, match=r"got \(20, 5\) and \(19,\)"):
        probe.linear_probe(features, labels[:19], features, labels)
    with pytest.raises(ValueError, match=r"for testing \(20, 4\)"):
        probe.linear_probe(features, labels, features[:, :4], labels)
    with pytest.raises(ValueError, match="got 20 and 0"):
        probe.linear_probe(features, labels, features[:0], labels[:0])
    with pytest.raises(ValueError, match="2 classes, got 1"):
        probe.linear_probe(features, labels * 0, features, labels)
    rare = np.array([1] * 16 + [0] * 4)
    with pytest.raises(ValueError, match="each class to choose l2 by, got 4 of one"):
        probe.linear_probe(features, rare, features, labels)
    assert 0 <= probe.linear_probe(features, rare, features, rare, l2=0.1) <= 1


def test_without_scikit_learn_the_demo_says_so_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    features, labels = clusters(20, 0, 1.0)
    with pytest.raises(MissingExtraError, match=r"'scikit-learn'.*pip install 'pocketzo\[demo\]'"):
        probe.linear_probe(features, labels, features, labels)
    with pytest.raises(MissingExtraError, match="'scikit-learn'"):
        run_demo(tmp_path / "out", checkpoint=tmp_path, say=lambda line: None)
    assert not (tmp_path / "out").exists()
