from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import (
    Live,
    model_of,
    node,
    run,
    trainable_names,
    weight,
)
from onnx import TensorProto, helper, numpy_helper

from pocketzo import DeadWeightError
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]


def shared_model(path: Path, values: Array, names: Sequence[str]) -> Path:
    """Two layers, each with the same bias."""
    nodes = [
        node("MatMul", "x fc1", "a"),
        node("Add", "a shared", "b", names[0]),
        node("MatMul", "b fc2", "c"),
        node("Add", "c shared", "d", names[1]),
        node("MatMul", "d fc3", "logits"),
    ]
    weights = [weight("fc1", 4, 4), weight("fc2", 4, 4, seed=1), weight("fc3", 4, 3)]
    return model_of(path, nodes, [*weights, numpy_helper.from_array(values.astype(np.float32), "shared")])


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        (np.zeros(4), ["/one/Add", "/two/Add"], {"one.bias", "two.bias"}),
        (np.zeros(4), ["/one/Add", "/one/Add_1"], {"shared"}),
        (np.zeros(4), ["Add_1", "Add_3"], {"shared", "Add_3.bias"}),
        (np.arange(4), ["/one/Add", "/two/Add"], {"shared"}),
    ],
    ids=["other modules", "one module twice", "no modules", "really tied"],
)
def test_only_coincidence_is_undone(tmp_path: Path, values: Array, names: list[str], expected: set[str]) -> None:
    bundle = prepare(shared_model(tmp_path / "m.onnx", values, names), tmp_path / "out")
    assert trainable_names(bundle) == {"fc1", "fc2", "fc3"} | expected


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x onnx::MatMul_1", "a", "/m/MatMul"),
        node("MatMul", "a onnx::MatMul_2", "logits", "/m/MatMul_1"),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("onnx::MatMul_1", 4, 4), weight("onnx::MatMul_2", 4, 3)])
    assert [tensor.name for tensor in prepare(path, tmp_path / "out").tensors] == ["m.weight", "m.weight.2"]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 2)])
def test_a_transposed_use_of_a_tied_weight_reads_what_is_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nodes = [
        node("Gather", "embedding.weight ids", "x"),
        node("Transpose", "embedding.weight", "t"),
        node("MatMul", "x t", "scores"),
    ]
    axes = [f"axis_{i}" for i in range(len(shape))]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("embedding.weight", 9, 4)],
        inputs=[("ids", TensorProto.INT64, axes)],
        outputs=[("scores", [*axes, 9])],
    )
    bundle = prepare(path, tmp_path / "out")
    assert [tensor.shape for tensor in bundle.tensors] == [(9, 4)]
    ids = np.resize(np.arange(9), shape)
    feed = {"ids": ids, "labels": np.zeros(shape, np.int64)} if bundle.loss else {"ids": ids}
    live = Live(bundle)
    live.weights["embedding.weight"] *= 3
    np.testing.assert_allclose(live.outputs(feed)[0], 9 * run(path, {"ids": ids})["scores"], rtol=1e-5)


@pytest.mark.parametrize("flag", [0, 1])
def test_a_gemm_that_is_tied_flips_its_flag(tmp_path: Path, flag: int) -> None:
    nodes = [
        node("Gather", "embedding.weight ids", "x"),
        node("Transpose", "embedding.weight", "t"),
        node("Gemm", "x t", "logits", transB=flag),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("embedding.weight", 4, 4)],
        inputs=[("ids", TensorProto.INT64, ["n"])],
        outputs=[("logits", ["n", 4])],
    )
    bundle = prepare(path, tmp_path / "out")
    gemm = next(n for n in onnx.load(bundle.model_path).graph.node if n.op_type == "Gemm")
    assert helper.get_node_attr_value(gemm, "transB") == 1 - flag
    feed = {"ids": np.array([1, 2])}
    expected = run(path, feed)["logits"]
    np.testing.assert_allclose(
        run(bundle.model_path, feed | {"labels": np.array([0, 1])})["logits"], expected, rtol=1e-6
    )


def test_a_tied_weight_in_forms_that_no_node_can_read(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "embedding.weight ids", "x"),
        node("Transpose", "embedding.weight", "t"),
        node("Gather", "t ids", "y", "second"),
        node("MatMul", "x y", "z"),
        node("MatMul", "z fc.weight", "logits"),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("embedding.weight", 4, 4), weight("fc.weight", 4, 3)],
        inputs=[("ids", TensorProto.INT64, [4])],
        outputs=[("logits", (4, 3))],
    )
    with pytest.raises(DeadWeightError, match=r"'embedding.weight'.*'second'"):
        prepare(path, tmp_path / "out", train="embedding")
    assert not (tmp_path / "out").exists()
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert [(tensor.name, tensor.elements, tensor.kind) for tensor in bundle.frozen] == [
        ("embedding.weight", 16, "layout")
    ]
    feed = {"ids": np.array([0, 2, 1, 3])}
    result = run(bundle.model_path, feed | {"labels": np.zeros(4, np.int64)})
    np.testing.assert_allclose(result["logits"], run(path, feed)["logits"], rtol=1e-5)
