from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import (
    MODELS,
    Live,
    linear,
    model_of,
    node,
    run,
    trainable_names,
    weight,
)
from onnx import TensorProto, helper, numpy_helper

from pocketzo.prepare import prepare

Array = npt.NDArray[Any]


def test_initializers_that_are_inputs_too(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx", inputs=[("x", 1, ("n", 4)), ("fc.weight", 1, (4, 3))], ir_version=3, opset=13)
    bundle = prepare(path, tmp_path / "out")
    assert [value.name for value in bundle.inputs] == ["x", "labels"]


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=weight("w", 4, 3))
    path = model_of(tmp_path / "m.onnx", [constant, node("MatMul", "x w", "logits", "/model/fc/MatMul")], [])
    bundle = prepare(path, tmp_path / "out")
    assert [tensor.name for tensor in bundle.tensors] == ["w"]
    assert Live(bundle).dead(bundle, {"x": np.ones((1, 4), np.float32), "labels": np.array([0])}) == []


def test_chains_of_views_are_folded(tmp_path: Path) -> None:
    shape, axes = (
        numpy_helper.from_array(np.array(numbers), name) for name, numbers in (("shape", [0, -1]), ("axes", [0]))
    )
    nodes = [
        node("Identity", "w", "w1"),
        node("Unsqueeze", "w1 axes", "w2"),
        node("Squeeze", "w2 axes", "w3"),
        node("Reshape", "w3 shape", "w4"),
        node("Cast", "w4", "w5", to=TensorProto.FLOAT),
        node("Flatten", "w5", "w6"),
        node("Transpose", "w6", "w7"),
        node("MatMul", "x w7", "logits"),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("w", 3, 4), shape, axes])
    bundle = prepare(path, tmp_path / "out")
    assert [(tensor.name, tensor.shape) for tensor in bundle.tensors] == [("w1", (4, 3))]
    feed = {"x": np.ones((2, 4), np.float32), "labels": np.array([0, 1])}
    np.testing.assert_array_equal(run(bundle.model_path, feed)["logits"], run(path, {"x": feed["x"]})["logits"])
    assert Live(bundle).dead(bundle, feed) == []


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2, 3])
def test_a_flattened_weight(tmp_path: Path, axis: int) -> None:
    nodes = [node("Flatten", "w", "flat", axis=axis), node("MatMul", "x flat", "logits")]
    rows = int(np.prod((2, 3, 4)[:axis]))
    inputs, outputs = [("x", TensorProto.FLOAT, (1, rows))], [("logits", (1, 24 // rows))]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("w", 2, 3, 4)], inputs=inputs, outputs=outputs)
    bundle = prepare(path, tmp_path / "out", loss="none")
    x = np.ones((1, rows), np.float32)
    np.testing.assert_array_equal(run(bundle.model_path, {"x": x})["logits"], run(path, {"x": x})["logits"])


def test_a_weight_used_inside_of_a_branch(tmp_path: Path) -> None:
    def branch(name: str, weight_name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 3])
        multiply = node("MatMul", f"x {weight_name}", f"{name}_out")
        own = [weight("inner.weight", 4, 3)] if weight_name == "inner.weight" else []
        return helper.make_graph([multiply], name, [], [output], own)

    choose = helper.make_node(
        "If", ["flag"], ["logits"], then_branch=branch("a", "outer"), else_branch=branch("b", "inner.weight")
    )
    path = model_of(
        tmp_path / "m.onnx",
        [node("Transpose", "outer.weight", "outer"), choose],
        [weight("outer.weight", 3, 4)],
        inputs=[("x", TensorProto.FLOAT, ("batch", 4)), ("flag", TensorProto.BOOL, ())],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"outer.weight", "inner.weight"}
    live = Live(bundle)
    for flag, name in (True, "outer.weight"), (False, "inner.weight"):
        feed = {"x": np.ones((1, 4), np.float32), "flag": np.array(flag), "labels": np.array([0])}
        before = live.outputs(feed)[0]
        np.testing.assert_allclose(before, run(path, {"x": feed["x"], "flag": feed["flag"]})["logits"], rtol=1e-6)
        live.weights[name] *= 2
        np.testing.assert_allclose(live.outputs(feed)[0], 2 * before, rtol=1e-6)


def test_tensors_of_one_name_in_two_branches(tmp_path: Path) -> None:
    """As exporters' merged decoders have them: names belong to the inner graph."""

    def branch(name: str, seed: int) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 3])
        scale = helper.make_node("Constant", [], ["scale"], value=weight("scale", 3, seed=seed))
        nodes = [scale, node("MatMul", "x W", "y"), node("Mul", "y scale", f"{name}_out")]
        return helper.make_graph(nodes, name, [], [output], [weight("W", 4, 3, seed=seed)])

    choose = helper.make_node("If", ["flag"], ["logits"], then_branch=branch("a", 1), else_branch=branch("b", 2))
    inputs = [("x", TensorProto.FLOAT, ("batch", 4)), ("flag", TensorProto.BOOL, ())]
    path = model_of(tmp_path / "m.onnx", [choose], [], inputs=inputs)
    bundle = prepare(path, tmp_path / "out")
    assert len(trainable_names(bundle)) == 4
    for flag in np.array(True), np.array(False):
        feed = {"x": np.ones((1, 4), np.float32), "flag": flag}
        labels = {"labels": np.array([0])}
        np.testing.assert_array_equal(
            run(bundle.model_path, feed | labels)["logits"], run(path, feed)["logits"], err_msg=f"flag {flag}"
        )


def test_scalars_stay_scalars(tmp_path: Path) -> None:
    """``Range`` takes nothing else."""
    zero, three, one = (numpy_helper.from_array(np.array(n, np.float32), f"n{n}") for n in (0, 3, 1))
    nodes = [node("Range", "n0 n3 n1", "r"), node("MatMul", "x fc.weight", "y"), node("Add", "y r", "logits")]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3), zero, three, one])
    bundle = prepare(path, tmp_path / "out")
    x = np.ones((2, 4), np.float32)
    result = run(bundle.model_path, {"x": x, "labels": np.array([0, 1])})
    np.testing.assert_array_equal(result["logits"], run(path, {"x": x})["logits"])


def test_nodes_in_any_order(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x t", "logits"), node("Transpose", "val_1", "t"), node("Identity", "fc.weight", "val_1")]
    bundle = prepare(model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 3, 4)]), tmp_path / "out")
    assert [(tensor.name, tensor.shape) for tensor in bundle.tensors] == [("fc.weight", (4, 3))]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_external_data_behind_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """As in the cache of the Hugging Face hub."""
    for name in "bert-new-external.onnx", "bert-new-external.onnx.data":
        shutil.copy(MODELS / name, tmp_path / name)
    (tmp_path / "snapshot").mkdir()
    for name in "bert-new-external.onnx", "bert-new-external.onnx.data":
        link(tmp_path / "snapshot" / name, tmp_path / name)
    bundle = prepare(tmp_path / "snapshot" / "bert-new-external.onnx", tmp_path / "out")
    assert bundle.base_sha256 == prepare(MODELS / "bert-new.onnx", tmp_path / "whole").base_sha256


def test_functions_in_the_model_are_inlined(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function(
        "local", "Linear", ["a", "w"], ["y"], [node("Transpose", "w", "t"), node("MatMul", "a t", "y")], opsets[:1]
    )
    graph = helper.make_graph(
        [helper.make_node("Linear", ["x", "fc.weight"], ["logits"], domain="local")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [weight("fc.weight", 3, 4)],
    )
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    bundle = prepare(tmp_path / "m.onnx", tmp_path / "out")
    assert [(tensor.name, tensor.shape) for tensor in bundle.tensors] == [("fc.weight", (4, 3))]


def test_constants_that_are_no_weights_are_not_trainable(tmp_path: Path) -> None:
    mask = np.triu(np.full((300, 300), np.finfo(np.float32).min, np.float32), 1)
    nodes = [
        node("Mul", "x scale", "a"),
        node("Add", "a eps", "b"),
        node("Add", "b mask", "c"),
        node("Mul", "c rotary.cos_cached", "d"),
        node("MatMul", "d fc.weight", "logits"),
    ]
    constants = {"scale": np.array([0.125], np.float32), "eps": np.float32(1e-5), "mask": mask}
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [
            weight("fc.weight", 300, 3),
            weight("rotary.cos_cached", 300, 300),
            *(numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()),
        ],
        inputs=[("x", TensorProto.FLOAT, (300, 300))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert {tensor.name for tensor in bundle.tensors} == {"fc.weight", "mask", "rotary.cos_cached"}


def test_large_constants_of_other_types_are_external_and_frozen(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.arange(4000) % 4, "table")
    path = model_of(
        tmp_path / "m.onnx",
        [node("Gather", "table x", "ids"), node("Gather", "fc.weight ids", "logits")],
        [weight("fc.weight", 4, 3), table],
        inputs=[("x", TensorProto.INT64, ("batch",))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert [(t.name, t.dtype, t.trainable) for t in bundle.tensors] == [
        ("fc.weight", "float32", True),
        ("table", "int64", False),
    ]
    feed = {"x": np.array([5, 2])}
    expected = run(path, feed)["logits"]
    np.testing.assert_array_equal(run(bundle.model_path, feed | {"labels": np.array([0, 0])})["logits"], expected)


def test_a_large_constant_of_a_branch_is_external_too(tmp_path: Path) -> None:
    def branch(name: str, step: int) -> onnx.GraphProto:
        table = numpy_helper.from_array(np.arange(0, 4000 * step, step) % 4, "table")
        nodes = [node("Gather", "table x", "ids"), node("Gather", "fc.weight ids", f"{name}_out")]
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 3])
        return helper.make_graph(nodes, name, [], [output], [table])

    choose = helper.make_node("If", ["flag"], ["logits"], then_branch=branch("a", 1), else_branch=branch("b", 3))
    inputs = [("x", TensorProto.INT64, ("batch",)), ("flag", TensorProto.BOOL, ())]
    path = model_of(tmp_path / "m.onnx", [choose], [weight("fc.weight", 4, 3)], inputs=inputs)
    bundle = prepare(path, tmp_path / "out")
    assert [(t.dtype, t.trainable) for t in bundle.tensors] == [("float32", True), ("int64", False), ("int64", False)]
    for flag in np.array(True), np.array(False):
        feed = {"x": np.array([5, 3]), "flag": flag}
        result = run(bundle.model_path, feed | {"labels": np.array([0, 0])})
        np.testing.assert_array_equal(result["logits"], run(path, feed)["logits"])


@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_recurrent_weights_are_live(tmp_path: Path, operator: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[operator]
    axes = numpy_helper.from_array(np.array([0]), "axes")
    nodes = [
        helper.make_node(operator, ["x", "w", "r", "b"], ["", "h"], "/rnn/Cell", hidden_size=5),
        node("Squeeze", "h axes", "last"),
        node("Gemm", "last fc.weight", "logits", transB=1),
    ]
    weights = [weight("w", 1, 5 * gates, 4), weight("r", 1, 5 * gates, 5), weight("b", 1, 10 * gates), axes]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [*weights, weight("fc.weight", 3, 5)],
        inputs=[("x", TensorProto.FLOAT, ("time", "batch", 4))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"w", "r", "b", "fc.weight"}
    assert Live(bundle).dead(bundle, {"x": np.ones((2, 1, 4), np.float32), "labels": np.array([0])}) == []
