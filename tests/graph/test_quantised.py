"""Quantised models: integers and scales are frozen and counted, all that is float can be trained and is live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import MODELS, Live, inputs_of, labels_for, model_of, node, run, trainable_names, weight
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from pocketzo import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.prepare import prepare

pytestmark = pytest.mark.usefixtures("quiet_quantiser")

Array = npt.NDArray[Any]


class Once(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feed: Mapping[str, Array]) -> None:
        self.feeds = iter([feed])

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self.feeds, None)


def dynamic(source: Path, path: Path, **options: Any) -> None:
    quantize_dynamic(source, path, **options)


def static(source: Path, path: Path, **options: Any) -> None:
    feed = inputs_of(source.stem)
    quantize_static(source, path, Once(feed), weight_type=QuantType.QInt8, per_channel=True, **options)


def four_bits(source: Path, path: Path, **options: Any) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, **options)
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def check(path: Path, bundle: Bundle, feed: Mapping[str, Array]) -> None:
    """Check that the bundle computes the same, that its weights are live, and that all numbers are counted."""
    expected = run(path, dict(feed))["logits"]
    batch = dict(feed) | {"labels": labels_for(expected)}
    live = Live(bundle)
    np.testing.assert_allclose(live.outputs(batch)[0], expected, rtol=1e-3, atol=1e-2)
    assert live.dead(bundle, batch) == []
    quantised = {tensor.name: tensor for tensor in bundle.frozen if tensor.kind == "quantised"}
    integers = {
        tensor.name: int(np.prod(tensor.dims))
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)
    }
    assert integers
    assert {name: quantised[name].elements for name in integers} == integers
    assert not trainable_names(bundle) & quantised.keys()


@pytest.mark.parametrize("name", ["bert-old", "gpt2-old"])
@pytest.mark.parametrize(
    ("quantise", "options"),
    [
        (dynamic, {}),
        (dynamic, {"per_channel": True}),
        (four_bits, {}),
        (four_bits, {"is_symmetric": False}),
        (static, {"quant_format": QuantFormat.QDQ, "op_types_to_quantize": ["MatMul"]}),
        (static, {"quant_format": QuantFormat.QOperator, "op_types_to_quantize": ["MatMul"]}),
    ],
)
def test_what_is_float_is_trained(
    tmp_path: Path, name: str, quantise: Callable[..., None], options: dict[str, Any]
) -> None:
    path = tmp_path / "m.onnx"
    quantise(MODELS / f"{name}.onnx", path, **options)
    bundle = prepare(path, tmp_path / "out")
    plain = prepare(MODELS / f"{name}.onnx", tmp_path / "plain")
    assert trainable_names(bundle) <= trainable_names(plain)
    assert trainable_names(bundle) >= {tensor.name for tensor in plain.tensors if len(tensor.shape) == 1}
    check(path, bundle, inputs_of(name))


def test_nothing_float_is_left(tmp_path: Path) -> None:
    static(MODELS / "gpt2-old.onnx", tmp_path / "m.onnx", quant_format=QuantFormat.QDQ)
    with pytest.raises(BundleError, match=r"no float32 or float16 weights.*[0-9],[0-9]{3} numbers quantised"):
        prepare(tmp_path / "m.onnx", tmp_path / "out")


SCALES: dict[str, Array] = {
    "s.weight": np.full(3, 0.02, np.float32),
    "xs": np.array(0.05, np.float32),
    "ws": np.array(0.02, np.float32),
    "xz": np.array(128, np.uint8),
    "wz": np.array(0, np.int8),
}


@pytest.mark.parametrize(
    "order",
    [("m xscale", "once s.weight"), ("s.weight m", "once xscale"), ("xscale s.weight", "m once")],
    ids=["activations first", "weights first", "scales first"],
)
def test_scales_of_integers_in_any_order(tmp_path: Path, order: tuple[str, str]) -> None:
    """The scale by channel has the shape of a bias, and a parameter's name."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xscale", "zero"]),
        node("MatMulInteger", "q w zero", "i"),
        node("Cast", "i", "m", to=TensorProto.FLOAT),
        node("Mul", order[0], "once"),
        node("Mul", order[1], "y"),
        node("Add", "y fc.bias", "z"),
        node("Mul", "z fc.gain", "logits"),
    ]
    integers = np.random.default_rng(0).integers(-99, 99, (4, 3), dtype=np.int8)
    tensors = [numpy_helper.from_array(integers, "w"), numpy_helper.from_array(SCALES["s.weight"], "s.weight")]
    path = model_of(tmp_path / "m.onnx", nodes, [*tensors, weight("fc.bias", 3), weight("fc.gain", 3)])
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.bias", "fc.gain"}
    check(path, bundle, {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)})


@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_that_the_runtime_makes_an_integer(tmp_path: Path, fused: bool) -> None:
    """Where the result is quantised too, onnxruntime fuses all into one operator of integers, and the bias with it."""
    nodes = [
        node("QuantizeLinear", "x xs xz", "xq"),
        node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "w ws wz", "wd"),
        node("Gemm", "xd wd fc.bias", "y"),
        node("QuantizeLinear", "y xs xz", "yq") if fused else node("Identity", "y", "yq"),
        node("DequantizeLinear", "yq xs xz", "z") if fused else node("Identity", "yq", "z"),
        node("Mul", "z fc.gain", "logits"),
    ]
    integers = np.random.default_rng(0).integers(-99, 99, (4, 3), dtype=np.int8)
    scales = [numpy_helper.from_array(SCALES[name], name) for name in ("xs", "ws", "xz", "wz")]
    tensors = [numpy_helper.from_array(integers, "w"), *scales, weight("fc.bias", 3), weight("fc.gain", 3)]
    path = model_of(tmp_path / "m.onnx", nodes, tensors)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == ({"fc.gain"} if fused else {"fc.gain", "fc.bias"})
    check(path, bundle, {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)})


def test_a_quantised_embedding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            ["table", "ids", "scales.weight"],
            ["x"],
            domain="com.microsoft",
            bits=4,
            block_size=16,
            quantize_axis=1,
        ),
        node("LayerNormalization", "x norm.weight norm.bias", "y"),
        node("MatMul", "y fc.weight", "logits"),
    ]
    tensors = [
        numpy_helper.from_array(rng.integers(0, 255, (8, 16), dtype=np.uint8), "table"),
        numpy_helper.from_array(rng.random((8, 2), np.float32), "scales.weight"),
        weight("norm.weight", 32),
        weight("norm.bias", 32),
        weight("fc.weight", 32, 3),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, tensors, inputs=[("ids", TensorProto.INT64, ("batch",))], opset=21)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"norm.weight", "norm.bias", "fc.weight"}
    check(path, bundle, {"ids": np.array([3, 5])})


def test_offsets_of_blocks(tmp_path: Path) -> None:
    """MatMulNBits has no minimum for each block: graphs add it, by nodes that read weights elsewhere."""
    rng = np.random.default_rng(0)
    blocks: dict[str, Any] = {"domain": "com.microsoft", "bits": 4, "block_size": 16}
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["table", "ids", "ts3"], ["rows"], gather_axis=0, quantize_axis=2, **blocks
        ),
        node("Gather", "table.offsets ids", "minima"),
        node("Unsqueeze", "minima last", "minima3"),
        node("Add", "minima3 rows", "blocks"),
        node("Reshape", "blocks flat", "x"),
        helper.make_node("MatMulNBits", ["x", "w", "w.scales"], ["q"], K=32, N=16, **blocks),
        node("Reshape", "x split", "parts"),
        node("ReduceSum", "parts last", "sums", keepdims=0),
        node("MatMul", "sums w.offsets", "o"),
        node("Add", "q o", "y"),
        # an adapter is added in the same way, and trained
        node("MatMul", "x lora.a", "a"),
        node("MatMul", "a lora.b", "b"),
        node("Add", "y b", "z"),
        helper.make_node("MatMulNBits", ["x", "w", "w.scales"], ["p"], K=32, N=16, **blocks),
        node("MatMul", "x side.weight", "side"),
        node("Add", "p side", "sum"),
        node("Add", "z sum", "all"),
        node("MatMul", "all fc.weight", "logits"),
    ]
    constants = {"last": [-1], "flat": [-1, 32], "split": [-1, 2, 16]}
    tensors = [
        numpy_helper.from_array(rng.integers(0, 255, (8, 2, 8), dtype=np.uint8), "table"),
        numpy_helper.from_array(rng.integers(0, 255, (16, 2, 8), dtype=np.uint8), "w"),
        weight("ts3", 8, 2, 1),
        weight("table.offsets", 8, 2),
        weight("w.scales", 16, 2),
        weight("w.offsets", 2, 16),
        weight("lora.a", 32, 2),
        weight("lora.b", 2, 16),
        weight("side.weight", 32, 16),
        weight("fc.weight", 16, 3),
        *(numpy_helper.from_array(np.array(value), name) for name, value in constants.items()),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, tensors, inputs=[("ids", TensorProto.INT64, ("batch",))], opset=21)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"lora.a", "lora.b", "side.weight", "fc.weight"}
    reasons = {tensor.name: tensor.reason for tensor in bundle.frozen}
    assert reasons["w.offsets"] == "quantised: an offset of MatMulNBits"
    assert reasons["table.offsets"] == "quantised: an offset of GatherBlockQuantized"
    check(path, bundle, {"ids": np.array([3, 5])})
