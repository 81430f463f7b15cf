from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import (
    Live,
    inputs_of,
    linear,
    model_of,
    node,
    run,
    trainable_names,
    weight,
)
from onnx import TensorProto, helper

from pocketzo import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]


def test_the_loss_is_exact_where_softmax_is_not(tmp_path: Path) -> None:
    bundle = prepare(linear(tmp_path / "m.onnx"), tmp_path / "out")
    live = Live(bundle)
    live.weights["fc.weight"][...] = 0
    live.weights["fc.weight"][:, 1] = 50
    x = np.ones((2, 4), np.float32)
    assert live.outputs({"x": x, "labels": np.array([1, 1])})[1] == 0
    assert live.outputs({"x": x, "labels": np.array([0, 1])})[1] == 100
    with pytest.raises(Exception, match=r"[Oo]ut of range"):
        live.outputs({"x": x, "labels": np.array([0, 3])})


def test_ignored_tokens_do_not_count(bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles("mlm-new")
    feed = inputs_of("mlm-new")
    labels = np.full((2, 7), -100)
    labels[0, 2], labels[1, 3] = 5, 9
    result = run(bundle.model_path, feed | {"labels": labels})
    logits = result["logits"].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert result["loss"] == pytest.approx(-(log_p[0, 2, 5] + log_p[1, 3, 9]) / 2, rel=1e-5)


def test_one_output_of_class_scores_is_enough(tmp_path: Path) -> None:
    path = model_of(
        tmp_path / "m.onnx",
        [node("MatMul", "x fc.weight", "scores")],
        [weight("fc.weight", 4, 3)],
        outputs=[("scores", ("batch", 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert (bundle.logits, bundle.loss) == ("scores", "loss")


def test_a_graph_without_scores_has_no_loss(tmp_path: Path) -> None:
    path = model_of(
        tmp_path / "m.onnx",
        [node("MatMul", "x fc.weight", "embedding")],
        [weight("fc.weight", 4, 3)],
        inputs=[("x", TensorProto.FLOAT, ("batch", "sequence", 4))],
        outputs=[("embedding", ("batch", "sequence", 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert (bundle.logits, bundle.loss) == (None, None)
    assert [value.name for value in bundle.inputs] == ["x"]
    with pytest.raises(BundleError, match="labels given"):
        prepare(path, tmp_path / "other", labels=["a", "b", "c"])


def test_a_loss_that_is_there_is_kept(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x fc.weight", "logits"),
        helper.make_node("SoftmaxCrossEntropyLoss", ["logits", "labels"], ["loss"]),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("fc.weight", 4, 3)],
        inputs=[("x", TensorProto.FLOAT, ("batch", 4)), ("labels", TensorProto.INT64, ("batch",))],
        outputs=[("loss", ()), ("logits", ("batch", 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    assert (bundle.loss, bundle.logits) == ("loss", "logits")
    assert [node.op_type for node in onnx.load(bundle.model_path).graph.node] == ["MatMul", "SoftmaxCrossEntropyLoss"]


def test_values_inside_that_are_called_labels_or_loss_give_way(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x fc.weight", "labels"),
        node("Tanh", "labels", "loss"),
        node("Identity", "loss", "logits"),
    ]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3)])
    bundle = prepare(path, tmp_path / "out")
    feed = {"x": np.ones((1, 4), np.float32)}
    result = run(bundle.model_path, feed | {"labels": np.array([2])})
    np.testing.assert_allclose(result["logits"], run(path, feed)["logits"], rtol=1e-6)
    assert result["loss"].shape == ()


@pytest.mark.parametrize("name", ["labels", "loss"])
def test_a_weight_that_is_called_labels_or_loss_gives_way(tmp_path: Path, name: str) -> None:
    path = model_of(tmp_path / "m.onnx", [node("MatMul", f"x {name}", "logits")], [weight(name, 4, 3)])
    bundle = prepare(path, tmp_path / "out")
    assert trainable_names(bundle) == {f"{name}.2"}
    feed = {"x": np.ones((1, 4), np.float32)}
    result = run(bundle.model_path, feed | {"labels": np.array([2])})
    np.testing.assert_array_equal(result["logits"], run(path, feed)["logits"])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"inputs": [("x", 1, ("n", 4)), ("labels", 7, ("n",))]},
            "an input 'labels', the name of an input that is added",
        ),
        ({"inputs": [("x", 1, ("n", 4)), ("loss", 1, ("n",))]}, "an input 'loss', the name of an output that is added"),
        ({"outputs": [("logits", ("n", 3)), ("labels", ("n", 3))]}, "an output 'labels', the name of an input"),
        ({"outputs": [("logits", ("n", 3)), ("loss", ("n", 3))]}, "'loss' is not a scalar"),
    ],
)
def test_a_loss_that_cannot_be_made_is_refused(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    nodes = [node("MatMul", "x fc.weight", "logits")]
    if "outputs" in options:
        nodes.append(node("Abs", "logits", options["outputs"][1][0]))
    path = model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3)], **options)
    with pytest.raises(BundleError, match=f"{fault}.* --loss none"):
        prepare(path, tmp_path / "out")
    bundle = prepare(path, tmp_path / "out", loss="none")
    assert (bundle.loss, bundle.logits) == (None, "logits")
