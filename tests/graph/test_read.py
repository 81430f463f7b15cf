from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from graphs import model_of, node, weight
from onnx import TensorProto, helper

from pocketzo import BundleError
from pocketzo.prepare import prepare

PRODUCT = node("MatMul", "x fc.weight", "logits")


def of(*nodes: onnx.NodeProto, tensor: TensorProto | None = None) -> Callable[[Path], object]:
    """Makes a graph of nodes and, beside the weight, a tensor."""
    tensors = [weight("fc.weight", 4, 3), *([] if tensor is None else [tensor])]
    return lambda path: model_of(path, nodes, tensors)


def with_a_map(path: Path) -> None:
    model = onnx.load(model_of(path, [PRODUCT, node("ZipMap", "logits", "z")], [weight("fc.weight", 4, 3)]))
    element = model.graph.output.add(name="z").type.sequence_type.elem_type.map_type
    element.key_type = TensorProto.INT64
    element.value_type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, path)


def with_a_function_that_calls_itself(path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    call = helper.make_node("Again", ["a"], ["b"], domain="local")
    model = onnx.load(model_of(path, [helper.make_node("Again", ["x"], ["y"], domain="local"), PRODUCT], []))
    model.functions.append(helper.make_function("local", "Again", ["a"], ["b"], [call], opsets))
    model.opset_import.append(opsets[1])
    onnx.save(model, path)


def with_an_offset(offset: str) -> Callable[[Path], object]:
    tensor = TensorProto(name="fc.weight", dims=[4, 3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in ("location", "model.onnx"), ("offset", offset), ("length", "48"):
        tensor.external_data.add(key=key, value=value)
    return lambda path: model_of(path, [PRODUCT], [tensor])


MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "input of nothing": (
        of(node("Add", "x y", "z", "sum"), PRODUCT),
        "node 'sum' (Add) reads 'y', which nothing computes",
    ),
    "output of nothing": (of(node("MatMul", "x fc.weight", "y")), "nothing computes the graph's output 'logits'"),
    "cycle": (of(node("Add", "x b", "a"), node("Abs", "a", "b"), PRODUCT), "cycle"),
    "two values of one name": (of(PRODUCT, PRODUCT), "'logits' is redeclared"),
    "a map": (with_a_map, "Map types are not supported"),
    "recursion": (with_a_function_that_calls_itself, "functions cannot be inlined"),
    "negative offset": (with_an_offset("-4"), "'fc.weight'"),
    "no offset": (with_an_offset("x"), "'x'"),
    "an unknown type": (of(PRODUCT, tensor=TensorProto(name="q", dims=[2], data_type=99)), "99"),
    "a negative size": (of(PRODUCT, tensor=TensorProto(name="q", dims=[-2], data_type=1)), "'q' cannot be read"),
    "few elements": (
        of(PRODUCT, tensor=TensorProto(name="q", dims=[3], data_type=TensorProto.INT32, int32_data=[1])),
        "'q' cannot be read",
    ),
    "few bytes": (
        of(PRODUCT, tensor=TensorProto(name="q", dims=[3], data_type=TensorProto.INT4, raw_data=b"1")),
        "'q': 2 bytes expected, 1 there; its data is cut off",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("make", "fault"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_graph_is_one_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path], object],
    fault: str,
    dtype: Literal["float32", "float16"],
) -> None:
    make(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=re.escape(fault)) as caught:
        prepare(tmp_path / "model.onnx", tmp_path / "out", dtype=dtype)
    assert "\n" not in str(caught.value)
    assert not caplog.records, "without a handler, Python prints warnings"


def test_packed_integers_stay_in_the_graph(tmp_path: Path) -> None:
    """safetensors has no type of less than eight bits; in a file of their own they are no longer found."""
    values = np.arange(4096) % 16 - 8
    raw = ((values[::2] & 15) | (values[1::2] & 15) << 4).astype(np.uint8).tobytes()
    packed = TensorProto(name="q", dims=[4096], data_type=TensorProto.INT4, raw_data=raw)
    nodes = [node("Cast", "q", "f", to=TensorProto.FLOAT), node("Gather", "f ids", "y"), node("Add", "y b", "logits")]
    inputs = [("ids", TensorProto.INT64, ("batch", 3))]
    path = model_of(tmp_path / "m.onnx", nodes, [packed, weight("b", 3)], inputs=inputs, opset=21, ir_version=10)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data")
    assert raw in (tmp_path / "m.data").read_bytes()
    bundle = prepare(path, tmp_path / "out")
    (stored,) = (tensor for tensor in onnx.load(bundle.model_path).graph.initializer if tensor.name == "q")
    assert stored.data_location == TensorProto.DEFAULT
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored).astype(np.int64), values)


def test_a_model_of_other_operators_alone(tmp_path: Path) -> None:
    scaler = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[2.0])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([scaler], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)]), tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=r"operators of ai\.onnx\.ml alone, and none of ai\.onnx, so no weights"):
        prepare(tmp_path / "m.onnx", tmp_path / "out")
