"""Weights that the bodies of If, Loop and Scan read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Live, model_of, node, run, trainable_names, weight
from onnx import TensorProto, helper, numpy_helper

from pocketzo.prepare import prepare

NAMES = {"embedding.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"}


def decoder(name: str, own: Sequence[TensorProto]) -> onnx.GraphProto:
    """A tied decoder, as a branch."""
    output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", "sequence", 9])
    nodes = [
        node("Gather", "embedding.weight ids", "x"),
        node("LayerNormalization", "x norm.weight norm.bias", "y"),
        node("Transpose", "fc.weight", "w"),
        node("MatMul", "y w", "a"),
        node("Add", "a fc.bias", "b"),
        node("Transpose", "embedding.weight", "t"),
        node("MatMul", "b t", "c"),
        node("Mul", "c scale", f"{name}_out"),
    ]
    scale = numpy_helper.from_array(np.array({"then": 1, "else": 2}[name], np.float32), "scale")
    return helper.make_graph(nodes, name, [], [output], [*own, scale])


@pytest.mark.parametrize("copied", [False, True], ids=["shared", "a copy in each branch"])
def test_a_merged_decoder(tmp_path: Path, copied: bool) -> None:
    """Its branches share all weights: also those of which each has a copy, and the embedding that is the projection."""
    table, *others = (
        weight("embedding.weight", 9, 4),
        weight("norm.weight", 4),
        weight("norm.bias", 4),
        weight("fc.weight", 4, 4),
        weight("fc.bias", 4),
    )
    then, otherwise = (decoder(name, others if copied else []) for name in ("then", "else"))
    path = model_of(
        tmp_path / "m.onnx",
        [helper.make_node("If", ["use_cache_branch"], ["logits"], then_branch=then, else_branch=otherwise)],
        [table] if copied else [table, *others],
        inputs=[("ids", TensorProto.INT64, ("batch", "sequence")), ("use_cache_branch", TensorProto.BOOL, ())],
        outputs=[("logits", ("batch", "sequence", 9))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == NAMES
    assert [(tensor.elements, tensor.kind) for tensor in bundle.frozen] == [(1, "constant")] * 2
    for flag in np.array(True), np.array(False):
        feed = {"ids": np.array([[1, 2, 3]]), "use_cache_branch": flag}
        labels = {"labels": np.zeros((1, 3), np.int64)}
        live = Live(bundle)
        result = live.outputs(feed | labels)[0]
        np.testing.assert_allclose(result, run(path, feed)["logits"], rtol=1e-5, err_msg=str(flag))
        assert live.dead(bundle, feed | labels) == []


def test_a_weight_that_a_branch_makes_a_constant_of(tmp_path: Path) -> None:
    """The runtime folds it there, too."""

    def branch(name: str, own: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 3])
        nodes = [node("Add", f"{own} one", "w", f"shift_{name}"), node("Mul", "x w", "y")]
        return helper.make_graph([*nodes, node("MatMul", "y fc.weight", f"{name}_out")], name, [], [output])

    choose = helper.make_node("If", ["flag"], ["logits"], then_branch=branch("a", "u"), else_branch=branch("b", "v"))
    path = model_of(
        tmp_path / "m.onnx",
        [choose],
        [
            weight("u", 4),
            weight("v", 4),
            weight("fc.weight", 4, 3),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
        ],
        inputs=[("x", TensorProto.FLOAT, ("batch", 4)), ("flag", TensorProto.BOOL, ())],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    kinds = {tensor.name: tensor.kind for tensor in bundle.frozen}
    assert kinds == {"u": "folded", "v": "folded", "one": "constant"}


def loop() -> onnx.NodeProto:
    values = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 4]),
    ]
    results = [
        helper.make_tensor_value_info("went", TensorProto.BOOL, []),
        helper.make_tensor_value_info("next", TensorProto.FLOAT, ["batch", 4]),
    ]
    nodes = [
        node("Identity", "go", "went"),
        node("Transpose", "inner.weight", "w"),
        node("MatMul", "state w", "s"),
        node("Add", "s outer.bias", "t"),
        node("Tanh", "t", "next"),
    ]
    body = helper.make_graph(nodes, "body", values, results, [weight("inner.weight", 4, 4)])
    return helper.make_node("Loop", ["times", "", "x"], ["h"], body=body)


def scan() -> onnx.NodeProto:
    values = [
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("row", TensorProto.FLOAT, [4]),
    ]
    results = [
        helper.make_tensor_value_info("next", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, [4]),
    ]
    nodes = [
        node("MatMul", "row inner.weight", "r"),
        node("Add", "r outer.bias", "t"),
        node("Add", "t state", "next"),
        node("Tanh", "next", "out"),
    ]
    body = helper.make_graph(nodes, "body", values, results, [weight("inner.weight", 4, 4)])
    return helper.make_node("Scan", ["start", "x"], ["end", "h"], body=body, num_scan_inputs=1)


@pytest.mark.parametrize("make", [loop, scan])
def test_weights_of_a_body_are_live(tmp_path: Path, make: Callable[[], onnx.NodeProto]) -> None:
    one = make()
    read = {"times": np.array(3), "start": np.zeros(4, np.float32)}
    path = model_of(
        tmp_path / "m.onnx",
        [one, node("MatMul", "h fc.weight", "logits")],
        [weight("outer.bias", 4), weight("fc.weight", 4, 3)]
        + [numpy_helper.from_array(array, name) for name, array in read.items() if name in one.input],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"inner.weight", "outer.bias", "fc.weight"}
    feed = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
    live = Live(bundle)
    labels = {"labels": np.array([0, 1])}
    np.testing.assert_allclose(live.outputs(feed | labels)[0], run(path, feed)["logits"], rtol=1e-5)
    assert live.dead(bundle, feed | labels) == []


def test_names_of_one_branch_that_another_computes(tmp_path: Path) -> None:
    """A constant of a branch moves to the main graph, where it must not be taken for a value of the other branch."""

    def branch(name: str, nodes: Sequence[onnx.NodeProto], own: Sequence[TensorProto]) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", 3])
        return helper.make_graph([*nodes, node("MatMul", "y fc.weight", f"{name}_out")], name, [], [output], own)

    shape = numpy_helper.from_array(np.array([-1, 4]), "shape")
    then = branch("a", [node("Reshape", "x shape", "z"), node("Mul", "z scale", "y")], [shape, weight("scale", 4)])
    otherwise = branch(
        "b", [node("Shape", "x", "shape"), node("Reshape", "x shape", "scale"), node("Mul", "scale x", "y")], []
    )
    choose = helper.make_node("If", ["flag"], ["logits"], then_branch=then, else_branch=otherwise)
    inputs = [("x", TensorProto.FLOAT, ("batch", 4)), ("flag", TensorProto.BOOL, ())]
    path = model_of(tmp_path / "m.onnx", [choose], [weight("fc.weight", 4, 3)], inputs=inputs)
    bundle = prepare(path, tmp_path / "out")
    assert len(trainable_names(bundle)) == 2
    for flag in np.array(True), np.array(False):
        feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "flag": flag}
        result = run(bundle.model_path, feed | {"labels": np.array([0, 1])})
        np.testing.assert_allclose(result["logits"], run(path, feed)["logits"], rtol=1e-6, err_msg=str(flag))
