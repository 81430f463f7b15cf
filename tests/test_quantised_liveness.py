"""Quantised operators round coarsely: live weights beside them are not called dead, and dead ones are found."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from graphs import model_of, node, weight
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo.formats.bundle import Bundle
from pocketzo.runtime import loader, variables
from pocketzo.runtime.liveness import Verify
from pocketzo.runtime.noise import read_as_noise
from pocketzo.runtime.outputs import float_outputs, tolerance_of, unoptimised_outputs
from pocketzo.runtime.session import open_plain
from pocketzo.runtime.weights import Weights

WIDTH = 64
LAYERS = 6


def integers(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng([1, *name.encode()]).integers(-127, 128, shape)
    return numpy_helper.from_array(values.astype(np.int8), name)


def number(name: str, value: float, dtype: npt.DTypeLike = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def product(kind: str, i: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes that multiply x_i by a quantised weight to m_i, and their constants."""
    if kind == "dynamic":
        quantise = helper.make_node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"qs{i}", f"qz{i}"])
        nodes = [
            quantise,
            node("MatMulInteger", f"q{i} W{i} qz{i}", f"i{i}"),
            node("Cast", f"i{i}", f"if{i}", to=TensorProto.FLOAT),
            node("Mul", f"qs{i} step", f"is{i}"),
            node("Mul", f"if{i} is{i}", f"m{i}"),
        ]
        return nodes, [integers(f"W{i}", WIDTH, WIDTH)]
    if kind == "qdq":
        nodes = [
            node("QuantizeLinear", f"x{i} range zero", f"q{i}"),
            node("DequantizeLinear", f"q{i} range zero", f"d{i}"),
            node("DequantizeLinear", f"W{i} step zero", f"w{i}"),
            node("MatMul", f"d{i} w{i}", f"m{i}"),
        ]
        return nodes, [integers(f"W{i}", WIDTH, WIDTH)]
    packed = np.random.default_rng(i).integers(0, 256, (WIDTH, WIDTH // 32, 16)).astype(np.uint8)
    scales = np.full(WIDTH * WIDTH // 32, 0.03, np.float32)
    attributes: dict[str, Any] = {"N": WIDTH, "K": WIDTH, "bits": 4, "block_size": 32, "accuracy_level": 4}
    inputs = [f"x{i}", f"W{i}", f"S{i}"]
    bits = helper.make_node("MatMulNBits", inputs, [f"m{i}"], domain="com.microsoft", **attributes)
    return [bits], [numpy_helper.from_array(packed, f"W{i}"), numpy_helper.from_array(scales, f"S{i}")]


def stack(path: Path, kind: str, layers: int = LAYERS) -> Path:
    """Write layers of a quantised product, a bias, a GELU and a norm, as exporters write these."""
    nodes: list[onnx.NodeProto] = []
    weights = [
        number("step", 0.002),
        number("range", 0.03),
        number("zero", 0, np.int8),
        number("two", 2),
        number("root", 2**0.5),
        number("one", 1),
        number("half", 0.5),
        number("epsilon", 1e-5),
        weight("head", WIDTH, 3),
    ]
    for i in range(layers):
        multiply, constants = product(kind, i)
        weights += [*constants, weight(f"b{i}", WIDTH), weight(f"scale{i}", WIDTH), weight(f"shift{i}", WIDTH)]
        nodes += [
            *multiply,
            node("Add", f"m{i} b{i}", f"a{i}"),
            node("Div", f"a{i} root", f"a{i}d"),
            node("Erf", f"a{i}d", f"a{i}e"),
            node("Add", f"a{i}e one", f"a{i}o"),
            node("Mul", f"a{i} a{i}o", f"a{i}p"),
            node("Mul", f"a{i}p half", f"g{i}"),
            node("ReduceMean", f"g{i}", f"g{i}m", axes=[-1]),
            node("Sub", f"g{i} g{i}m", f"c{i}"),
            node("Pow", f"c{i} two", f"c{i}s"),
            node("ReduceMean", f"c{i}s", f"v{i}", axes=[-1]),
            node("Add", f"v{i} epsilon", f"v{i}e"),
            node("Sqrt", f"v{i}e", f"v{i}r"),
            node("Div", f"c{i} v{i}r", f"n{i}"),
            node("Mul", f"n{i} scale{i}", f"n{i}s"),
            node("Add", f"n{i}s shift{i}", f"x{i + 1}"),
        ]
    nodes.append(node("MatMul", f"x{layers} head", "logits"))
    model_of(path, nodes, weights, inputs=(("x0", TensorProto.FLOAT, ("batch", WIDTH)),))
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", params=["dynamic", "qdq", "bits"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose probing batch is so large that some activations are tipped over to the next integer."""
    folder = tmp_path_factory.mktemp(request.param)
    probe = {"x0": np.random.default_rng(1).normal(size=(500, WIDTH)).astype(np.float32)}
    bundle = pz.prepare(stack(folder / "m", request.param), folder / "b", probe=probe)
    assert {f"scale{LAYERS - 1}", "shift0", "b0", "head"} <= {t.name for t in bundle.tensors if t.trainable}
    return bundle


@pytest.mark.parametrize("kind", ["dynamic", "qdq"])
def test_roundings_of_8_bits_stay_within_the_tolerance(tmp_path: Path, kind: str) -> None:
    # The figures at tolerance_of are of this, with other widths and depths.
    probe = {"x0": np.random.default_rng(1).normal(size=(500, WIDTH)).astype(np.float32)}
    bundle = pz.prepare(stack(tmp_path / "m", kind, layers=24), tmp_path / "b", probe=probe)
    weights = Weights(bundle)
    differences = []
    for draw in range(4):
        read_as_noise(weights, bundle, draw)
        session = open_plain(bundle, weights.image.values, 1)
        for batch, expected in zip(*unoptimised_outputs(bundle, weights.image.values), strict=True):
            difference = np.abs(float_outputs(bundle, session, batch) - expected).max()
            differences.append(difference / np.abs(expected).max())
    assert 0 < max(differences) < tolerance_of(bundle)


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_live_weights_of_quantised_models_are_seen(quantised: Bundle, verify: Verify) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pz.load(quantised, threads=1, prepack=False, verify=verify)


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("name", ["b0", "shift0", "scale0", f"scale{LAYERS - 1}", "head"])
def test_dead_weights_of_quantised_models_are_found(
    quantised: Bundle, verify: Verify, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(bundle: Bundle, values: dict[str, ort.OrtValue], threads: int) -> ort.InferenceSession:
        return open_plain(bundle, {key: value for key, value in values.items() if key != name}, threads)

    monkeypatch.setattr(loader, "open_plain", without)  # which reads this weight from the file
    with pytest.raises(pz.DeadWeightError, match=rf"does not see what is written to {name},"):
        pz.load(quantised, threads=1, prepack=False, verify=verify)


def test_weights_are_prepacked_beside_quantised_ones(quantised: Bundle) -> None:
    # Among the constants that the session packs when it is created are the scales of 4-bit weights.
    assert pz.load(quantised, threads=1, prepack=True, verify="full").prepacked


def norms_of_4_bits(folder: Path) -> Bundle:
    """Prepare layers of a large product of 4 bits and a norm, where only the norms and a table can be trained."""
    rng = np.random.default_rng(0)
    size = 1024
    nodes = [node("Gather", "table ids", "x0")]
    weights = [weight("table", 50, size)]
    attributes: dict[str, Any] = {"N": size, "K": size, "bits": 4, "block_size": 32, "accuracy_level": 4}
    for i in range(2):
        packed = rng.integers(0, 256, (size, size // 32, 16)).astype(np.uint8)
        scales = np.full(size * size // 32, 0.01, np.float32)
        weights += [numpy_helper.from_array(packed, f"W{i}"), numpy_helper.from_array(scales, f"S{i}")]
        weights += [weight(f"scale{i}", size), weight(f"shift{i}", size)]
        factors = [f"x{i}", f"W{i}", f"S{i}"]
        nodes += [
            helper.make_node("MatMulNBits", factors, [f"m{i}"], domain="com.microsoft", **attributes),
            node("LayerNormalization", f"m{i} scale{i} shift{i}", f"x{i + 1}"),
        ]
    inputs = [("ids", TensorProto.INT64, ("batch",))]
    model_of(folder / "m", nodes, weights, inputs=inputs, outputs=[("x2", ("batch", size))])
    model = onnx.load(folder / "m")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, folder / "m")
    return pz.prepare(folder / "m", folder / "b")


def seconds(model: pz.Model) -> float:
    batch = {"ids": np.arange(1)}
    times = []
    for _ in range(10):
        started = time.perf_counter()
        model.run(batch)
        times.append(time.perf_counter() - started)
    return min(times)


def test_constants_are_prepacked_where_weights_are_not(tmp_path: Path) -> None:
    bundle = norms_of_4_bits(tmp_path)
    plain = pz.load(bundle, threads=1, prepack=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the graph multiplies by no weight, so nothing is slower
        model = pz.load(bundle, threads=1, verify="full")
    assert seconds(model) < seconds(plain) / 3  # 200 times on x86-64
    batch = {"ids": np.arange(5)}
    for name in ("scale0", "shift1", "table"):
        before = model.run(batch)["x2"]
        for each in (model, plain):
            each.weights[name] = each.weights[name] + 1
        after = model.run(batch)["x2"]
        assert np.abs(after - before).max() > 0.1
        np.testing.assert_allclose(after, plain.run(batch)["x2"], rtol=0, atol=0.05 * np.abs(after).max())


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_weights_that_are_prepacked_as_constants_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Verify
) -> None:
    # The graph cannot be prepacked, as two products share a weight, and nothing is declared as an input.
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), *product("qdq", 0)[0]]
    nodes = [*nodes[:2], node("Identity", "b", "x0"), *nodes[2:], node("Add", "m0 bias", "logits")]
    weights = [weight("w", WIDTH, WIDTH), weight("bias", WIDTH), *product("qdq", 0)[1]]
    constants = [number("step", 0.002), number("range", 0.03), number("zero", 0, np.int8)]
    source = model_of(
        tmp_path / "m",
        nodes,
        [*weights, *constants],
        inputs=[("x", TensorProto.FLOAT, ("batch", WIDTH))],
        outputs=[("logits", ("batch", WIDTH))],
    )
    bundle = pz.prepare(source, tmp_path / "b")
    with pytest.warns(UserWarning, match="constants, but not weights, are prepacked.*: w is a factor of 2"):
        pz.load(bundle, threads=1, verify=verify)
    monkeypatch.setattr(variables, "declare_inputs", lambda graph, bundle: None)
    with pytest.warns(UserWarning, match="weights are not prepacked, which is slower: w is a factor of 2"):
        pz.load(bundle, threads=1, verify=verify)
