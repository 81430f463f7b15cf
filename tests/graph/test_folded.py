from __future__ import annotations

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
from onnx import TensorProto, numpy_helper

from pocketzo import DeadWeightError
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]


SCALED = [
    node("Mul", "fc.weight fc.scale", "scaled", "scaling"),
    node("MatMul", "x scaled", "y"),
    node("Add", "y fc.bias", "logits"),
]
SHIFTED = [
    node("Add", "norm.weight one", "scale", "shift"),
    node("Mul", "x scale", "y"),
    node("MatMul", "y fc.weight", "logits"),
]
POSITIONS = [
    node("Gather", "position.weight ids", "p", "lookup"),
    node("Add", "x p", "y"),
    node("MatMul", "y fc.weight", "logits"),
]
PROJECTED = [
    node("MatMul", "latents proj.weight", "p", "projection"),
    node("Add", "x p", "y"),
    node("MatMul", "y fc.weight", "logits"),
]


@pytest.mark.parametrize(
    ("nodes", "weights", "names"),
    [
        (
            SCALED,
            [weight("fc.weight", 4, 3), weight("fc.scale", 4, 1), weight("fc.bias", 3)],
            ("scaling", "fc.weight"),
        ),
        (
            SHIFTED,
            [
                weight("norm.weight", 4),
                numpy_helper.from_array(np.array(1, np.float32), "one"),
                weight("fc.weight", 4, 3),
            ],
            ("shift", "norm.weight"),
        ),
        (
            POSITIONS,
            [weight("position.weight", 5, 4), numpy_helper.from_array(np.array([2]), "ids"), weight("fc.weight", 4, 3)],
            ("lookup", "position.weight"),
        ),
        (
            PROJECTED,
            [weight("latents", 1, 6), weight("proj.weight", 6, 4), weight("fc.weight", 4, 3)],
            ("projection", "latents"),
        ),
    ],
    ids=["weight times scale", "one plus weight", "fixed positions", "projected constants"],
)
def test_what_the_runtime_would_fold_is_frozen(
    tmp_path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto], names: tuple[str, str]
) -> None:
    """And counted, with the node as the reason; it is refused only if it was asked for."""
    path = model_of(tmp_path / "m.onnx", nodes, weights)
    with pytest.raises(DeadWeightError, match=f"{names[1]!r} .*folded.*{names[0]!r}"):
        prepare(path, tmp_path / "out", train=rf"^{names[1]}$")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    bundle = prepare(path, tmp_path / "out")
    assert names[1] not in trainable_names(bundle)
    (frozen,) = (tensor for tensor in bundle.frozen if tensor.name == names[1])
    assert frozen.kind == "folded"
    assert repr(names[0]) in frozen.reason
    feed = {"x": np.ones((1, 4), np.float32)}
    result = run(bundle.model_path, feed | {"labels": np.array([0])})
    np.testing.assert_allclose(result["logits"], run(path, feed)["logits"], rtol=1e-6)
    assert Live(bundle).dead(bundle, feed | {"labels": np.array([0])}) == []


def test_a_weight_that_is_live_in_one_use_only_is_frozen(tmp_path: Path) -> None:
    """Its norm would stay as it was, while the matrix moves."""
    nodes = [
        node("ReduceL2", "proj.weight", "norm", keepdims=0),
        node("MatMul", "x proj.weight", "y"),
        node("Div", "y norm", "z"),
        node("MatMul", "z fc.weight", "logits"),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("proj.weight", 4, 4), weight("fc.weight", 4, 3)])
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}
    assert [(tensor.name, tensor.kind) for tensor in bundle.frozen] == [("proj.weight", "folded")]


def test_a_weight_whose_shape_is_read_stays_trainable(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "fc.weight", "shape"),
        node("Gather", "shape zero", "width"),
        node("Cast", "width", "number", to=TensorProto.FLOAT),
        node("Mul", "x number", "y"),
        node("MatMul", "y fc.weight", "logits"),
    ]
    path = model_of(
        tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3), numpy_helper.from_array(np.array(0), "zero")]
    )
    assert trainable_names(prepare(path, tmp_path / "out")) == {"fc.weight"}


def test_tables_of_sines_made_of_constants_are_no_weights(tmp_path: Path) -> None:
    """As in a rotary embedding whose number of positions is fixed."""
    nodes = [
        node("MatMul", "rotary.inv_freq /rotary/Cast_output_0", "angles"),
        node("Cos", "angles", "cos"),
        node("Mul", "x cos", "y"),
        node("Add", "half halves", "offset"),
        node("Where", "flag y offset", "z"),
        node("MatMul", "z fc.weight", "logits"),
    ]
    constants = {
        "rotary.inv_freq": np.linspace(0, 1, 4).reshape(1, 4, 1),
        "/rotary/Cast_output_0": np.arange(4.0).reshape(1, 1, 4),
        "half": np.array(0.5),
        "halves": np.full(4, 0.5),
    }
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [
            weight("fc.weight", 4, 3),
            numpy_helper.from_array(np.array(True), "flag"),
            *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()),
        ],
        outputs=[("logits", (1, 4, 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert [tensor.name for tensor in bundle.tensors] == ["fc.weight"]


def test_what_is_multiplied_from_the_left_is_no_weight(tmp_path: Path) -> None:
    """As a rotary embedding's frequencies are with the positions, though they have a parameter's name."""
    nodes = [
        node("Mul", "scales.weight two", "frequencies"),
        node("MatMul", "frequencies x", "angles"),
        node("MatMul", "angles fc.weight", "logits"),
    ]
    two = numpy_helper.from_array(np.array(2, np.float32), "two")
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("scales.weight", 1, 4, 1), weight("fc.weight", 5, 3), two],
        inputs=[("x", TensorProto.FLOAT, ("batch", 1, 5))],
        outputs=[("logits", ("batch", 4, 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight"}


def test_a_bias_that_shares_its_zeros_with_a_constant(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x fc.weight", "a"),
        node("Greater", "a zeros", "positive"),
        node("Add", "a zeros", "b"),
        node("Where", "positive b a", "logits"),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("fc.weight", 4, 3), numpy_helper.from_array(np.zeros(3, np.float32), "zeros")],
    )
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {"fc.weight", "zeros"}
    live = Live(bundle)
    feed = {"x": np.ones((1, 4), np.float32), "labels": np.array([0])}
    before = live.outputs(feed)[0]
    live.weights["zeros"] += 100
    np.testing.assert_allclose(live.outputs(feed)[0], np.where(before > 0, before + 100, before), rtol=1e-6)


def test_a_dead_weight_may_stay_frozen(tmp_path: Path) -> None:
    weights = [
        weight("position.weight", 5, 4),
        numpy_helper.from_array(np.array([2]), "ids"),
        weight("fc.weight", 4, 3),
    ]
    path = model_of(tmp_path / "m.onnx", POSITIONS, weights)
    bundle = prepare(path, tmp_path / "out", train="^fc")
    assert trainable_names(bundle) == {"fc.weight"}
    x = np.ones((1, 4), np.float32)
    labels = np.array([0])
    np.testing.assert_allclose(
        run(bundle.model_path, {"x": x, "labels": labels})["logits"], run(path, {"x": x})["logits"], rtol=1e-6
    )
