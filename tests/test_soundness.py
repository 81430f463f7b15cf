from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import model_of, node, weight
from onnx import numpy_helper

import pocketzo as pz
from pocketzo.train.soundness import check_start, sum_of_squares

pytestmark = pytest.mark.filterwarnings("ignore:this processor does not compute in fp16")
SIZE = 200


def bundle_of(folder: Path, dtype: Any = "float32") -> pz.Bundle:
    """Prepare two products with a frozen bias between them."""
    arrays = {
        "first.weight": numpy_helper.to_array(weight("first.weight", 4, SIZE)) * np.float32(0.05),
        "frozen.bias": numpy_helper.to_array(weight("frozen.bias", SIZE)),
        "second.weight": numpy_helper.to_array(weight("second.weight", SIZE, 3)) * np.float32(0.05),
    }
    nodes = [
        node("MatMul", "x first.weight", "a"),
        node("Add", "a frozen.bias", "b"),
        node("MatMul", "b second.weight", "logits"),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    path = model_of(folder / "model.onnx", nodes, weights)
    return pz.prepare(path, folder / "bundle", train="weight", dtype=dtype)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("first.weight", math.nan, True),
        ("first.weight", math.inf, True),
        ("second.weight", -math.inf, True),
        ("second.weight", 1e20, False),
        ("frozen.bias", math.nan, True),
        ("frozen.bias", -math.inf, False),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, name: str, value: float, refused: bool
) -> None:
    model = pz.load(bundle_of(tmp_path), threads=1)
    array = model.weights[name].copy()
    array[..., 1] = value
    model.weights[name] = array
    optimizer = pz.MeZO(model, lr=0.1, eps=1e12 if value == 1e20 else 1.0)
    if not refused:
        check_start(optimizer, 1)
        return
    with pytest.raises(pz.BundleError, match=f"weights.safetensors: weight '{name}' holds NaN or infinity"):
        check_start(optimizer, 1)


@pytest.mark.parametrize("prepack", ["auto", False])
def test_sums_of_squares(tiny_bundle: Path, prepack: Any) -> None:
    model = pz.load(tiny_bundle, threads=1, prepack=prepack)
    for name, array in model.weights.items():
        assert sum_of_squares(model.weights, name) == pytest.approx(float((array.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_eps_that_would_lose_the_weights_is_refused_and_the_estimate_is_right(tmp_path: Path, dtype: str) -> None:
    bundle = bundle_of(tmp_path, dtype)
    model = pz.load(bundle, threads=1)
    eps = 200.0 if dtype == "float32" else 0.05
    before = {name: model.weights[name].astype(np.float64) for name in ("first.weight", "second.weight")}
    batch = {"x": np.ones((2, 4), np.float32), "labels": np.array([0, 2])}
    optimizer = pz.MeZO(model, lr=0.0, eps=eps, seed=1)
    for _ in range(100):
        optimizer.step(lambda m: m.loss(batch))
    moved = np.concatenate([(model.weights[name] - array).ravel() for name, array in before.items()])
    rounding = 2.0**-24 if dtype == "float32" else 2.0**-11
    estimate = eps * rounding * math.sqrt(200)
    assert estimate / 5 < moved.std() < estimate * 2
    fresh = pz.load(bundle, threads=1)
    size = math.sqrt(np.mean(np.concatenate([array.ravel() for array in before.values()]) ** 2))
    largest = 0.1 * size / rounding / math.sqrt(2 * 100)
    check_start(pz.MeZO(fresh, lr=0.1, eps=0.99 * largest), 100)
    message = rf"eps \S+ is too large for weights of root mean square {size:.3g}: the roundings of 200 shifts"
    with pytest.raises(ValueError, match=message):
        check_start(pz.MeZO(fresh, lr=0.1, eps=1.01 * largest), 100)
    with pytest.raises(ValueError, match="too large"):
        check_start(pz.MeZO(fresh, lr=0.1, eps=0.99 * largest), 200)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_eps_that_shifts_nothing_is_refused(tmp_path: Path, dtype: str) -> None:
    model = pz.load(bundle_of(tmp_path, dtype), threads=1)
    eps = 1e-12 if dtype == "float32" else 1e-8
    with pytest.raises(ValueError, match=f"eps {eps:g} is too small for weights of .* {dtype} has a spacing of about"):
        check_start(pz.MeZO(model, lr=0.1, eps=eps), 10)


def test_the_eps_of_each_group_is_checked(tmp_path: Path) -> None:
    model = pz.load(bundle_of(tmp_path), threads=1)
    with pytest.raises(ValueError, match="for weights of group 'second' of root"):
        check_start(pz.MeZO(model, lr=0.1, groups=[pz.ParamGroup("second", eps=1e9)]), 10)


def test_a_head_of_zeros_takes_any_eps(tmp_path: Path) -> None:
    model = pz.load(bundle_of(tmp_path), threads=1)
    model.weights["second.weight"] = 0.0
    for eps in (1e-30, 1e3):
        check_start(pz.MeZO(model, lr=0.1, eps=eps, trainable="second"), 100)


@pytest.mark.parametrize("make", [lambda m: pz.MeZO(m, lr=0.1, eps=1e30), lambda m: pz.FZOO(m, lr=0.1, eps=1e-30)])
def test_a_run_is_refused_before_it_begins(
    tiny_bundle: Path, tiny_data: Path, tmp_path: Path, make: Callable[[pz.Model], pz.Optimizer]
) -> None:
    model = pz.load(tiny_bundle, threads=1)
    data = pz.load_dataset(tiny_data, model.bundle)
    before = model.weights.sha256()
    with pytest.raises(ValueError, match=r"eps 1e.30 is too (large|small)"):
        pz.Trainer(model, make(model), data, run=tmp_path / "run", steps=9).fit()
    assert model.weights.sha256() == before
    assert not (tmp_path / "run").exists()
