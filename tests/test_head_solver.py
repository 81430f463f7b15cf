"""The closed form of heads: against scikit-learn, and gradients against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression, Ridge  # type: ignore[import-untyped]

from pocketzo.errors import DataError
from pocketzo.train.head.attention import Heads, Tokens, forward, gradient
from pocketzo.train.head.choose import FOLDS, folds_of
from pocketzo.train.head.losses import LOSSES
from pocketzo.train.head.pooled import LEAST_DEVIATION, Features, Pooled, Standard
from pocketzo.train.head.solve import solve

Array = npt.NDArray[Any]


def problem(rows: int, size: int, classes: int) -> tuple[Array, Array]:
    random = np.random.default_rng(rows + size)
    x = random.normal(size=(rows, size))
    return x, (x[:, :classes] + random.normal(size=(rows, classes))).argmax(axis=1)


@pytest.mark.parametrize(("rows", "size", "classes"), [(120, 12, 4), (120, 12, 2), (40, 90, 3)])
@pytest.mark.parametrize("l2", [0.03, 1.0])
def test_classes_as_scikit_learn(rows: int, size: int, classes: int, l2: float) -> None:
    x, y = problem(rows, size, classes)
    targets, kind, scale = np.eye(classes)[y], "cross-entropy", 1.0
    if classes == 2:  # scikit-learn has one vector, too
        targets, kind, scale = targets[:, 1:], "bce", 0.5
    weights = np.full((rows, 1), 1 / rows)
    found = solve(x, targets, weights, np.array([l2 * scale]), LOSSES[kind])
    expected = LogisticRegression(C=1 / (l2 * scale * rows), solver="newton-cg", tol=1e-10, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(found.weight[:, 0].T, expected.coef_, atol=2e-6)
    bias = found.bias[0] - (found.bias[0].mean() - expected.intercept_.mean() if classes > 2 else 0)
    np.testing.assert_allclose(bias, expected.intercept_, atol=2e-6)


def test_numbers_as_ridge() -> None:
    x, _ = problem(60, 8, 2)
    y = x[:, :2] @ np.array([[1.0, 2.0], [-1.0, 0.5]]) + 3
    found = solve(x, y, np.full((60, 1), 1 / 60), np.array([0.2]), LOSSES["mse"])
    expected = Ridge(alpha=0.2 * 60, solver="cholesky").fit(x, y)
    np.testing.assert_allclose(found.weight[:, 0].T, expected.coef_, atol=1e-6)
    np.testing.assert_allclose(found.bias[0], expected.intercept_, atol=1e-6)


def test_problems_do_not_depend_on_each_other() -> None:
    x, y = problem(50, 10, 3)
    targets = np.eye(3)[y]
    weights = (np.arange(50)[:, None] % 3 != np.arange(3)).astype(np.float64)
    weights /= weights.sum(axis=0)
    l2 = np.array([0.01, 0.1, 1.0])
    together = solve(x, targets, weights, l2, LOSSES["cross-entropy"])
    for number in range(3):
        one = slice(number, number + 1)
        alone = solve(x, targets, weights[:, one], l2[one], LOSSES["cross-entropy"])
        np.testing.assert_allclose(together.weight[:, one], alone.weight, atol=1e-5)


def numeric(function: Any, at: Array, step: float = 1e-6) -> Array:
    result = np.empty_like(at)
    for index in np.ndindex(at.shape):
        values = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            values.append(function(moved))
        result[index] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_and_curvature_of_losses(kind: str) -> None:
    random = np.random.default_rng(1)
    loss = LOSSES[kind]
    scores, change = random.normal(size=(2, 5, 2, 3))
    targets = np.eye(3)[random.integers(0, 3, 5)][:, None]
    value = loss.at(scores, targets)
    expected = numeric(lambda moved: loss.at(moved, targets).loss.sum(), scores)
    np.testing.assert_allclose(value.gradient, expected, atol=1e-7)
    ahead, behind = (loss.at(scores + step * change, targets).gradient for step in (1e-5, -1e-5))
    np.testing.assert_allclose(loss.curved(value.mean, change), (ahead - behind) / 2e-5, atol=1e-7)


@pytest.mark.parametrize("queries", [1, 3])
def test_gradient_of_queries(queries: int) -> None:
    random = np.random.default_rng(2)
    sizes, starts = (4, 6), np.array([0, 3, 4])
    tokens = Tokens([random.normal(size=(9, size)) for size in sizes], starts)
    weights: list[Array] = [random.normal(size=(size, 2, 3)) for size in sizes]
    at: list[Array] = [random.normal(size=(size, 2, queries)) for size in sizes]
    bias, by_score = random.normal(size=(2, 3)), random.normal(size=(3, 2, 3))
    kept = np.array([True, False, True, True, True, False, True, True, True])
    found = gradient(forward(Heads(weights, at, bias), tokens, kept), tokens, by_score)
    for tap in range(2):

        def total(query: Array, tap: int = tap) -> float:
            moved: list[Array] = [query if number == tap else one for number, one in enumerate(at)]
            return float((forward(Heads(weights, moved, bias), tokens, kept).scores * by_score).sum())

        np.testing.assert_allclose(found[tap], numeric(total, at[tap]), rtol=1e-5, atol=1e-7)


def test_queries_of_zeros_are_the_mean() -> None:
    random = np.random.default_rng(3)
    tokens = Tokens([random.normal(size=(7, 5)).astype(np.float32)], np.array([0, 2]))
    weights = [random.normal(size=(5, 1, 2)).astype(np.float32)]
    scores = forward(Heads.with_means(weights, np.zeros((1, 2), np.float32)), tokens).scores[:, 0]
    means = np.stack([tokens.taps[0][:2].mean(axis=0), tokens.taps[0][2:].mean(axis=0)])
    np.testing.assert_allclose(scores, means @ weights[0][:, 0], atol=1e-6)


@pytest.mark.parametrize("rows", [12, 80])
def test_basis_keeps_products_and_comes_back(rows: int) -> None:
    random = np.random.default_rng(4)
    states = {(layer, "mean"): random.normal(size=(rows, 30)).astype(np.float32) for layer in (1, 2)}
    pooled = Pooled(states)  # type: ignore[arg-type]
    features = Features((1, 2), "mean")
    basis = pooled.basis(features)
    wide = np.concatenate([Standard.of(states[layer, "mean"])(states[layer, "mean"]) for layer in (1, 2)], axis=1)
    np.testing.assert_allclose(basis.x @ basis.x.T, wide @ wide.T, atol=1e-8)
    weight: Array = random.normal(size=basis.x.shape[1:])
    np.testing.assert_allclose(wide @ np.concatenate(basis.by_tap(weight)), basis.x @ weight, atol=1e-8)


def test_a_constant_feature_is_not_divided_by_its_deviation() -> None:
    features = np.ones((10, 2), np.float32)
    features[:, 1] = np.arange(10)
    assert Standard.of(features).deviation[0] == LEAST_DEVIATION
    assert Standard.of(features).deviation[1] > 1


def test_folds_divide_each_class() -> None:
    labels = np.array([0] * 23 + [1] * 10)
    folds = folds_of(labels, 33, seed=0)
    assert set(np.bincount(folds[:23])) == {4, 5}
    assert (np.bincount(folds[23:]) == 2).all()
    np.testing.assert_array_equal(folds, folds_of(labels, 33, seed=0))
    assert (folds != folds_of(labels, 33, seed=1)).any()


def test_what_cannot_be_cross_validated_is_refused() -> None:
    with pytest.raises(DataError, match=f"takes {FOLDS} examples: got 4"):
        folds_of(np.array([0, 1, 0, 1]), 4, seed=0)
    with pytest.raises(DataError, match="all 6 examples have one class"):
        folds_of(np.zeros(6, np.int64), 6, seed=0)
