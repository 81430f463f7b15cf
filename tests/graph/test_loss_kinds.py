"""Which loss a graph gets, by what it ends in or by statement, and its value against numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from graphs import model_of, node, run, weight
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from pocketzo import BundleError, prepare
from pocketzo.cli.info import bundle_facts
from pocketzo.formats.bundle import Bundle
from pocketzo.tasks.registry import loss_text, task_of

Array = npt.NDArray[Any]
BATCH = 5
X = np.random.default_rng(0).normal(0, 2, (BATCH, 4)).astype(np.float32)


def axes(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values), name)


def made(
    path: Path, n: int, nodes: list[onnx.NodeProto], shape: tuple[int | str, ...], output: str = "y", opset: int = 17
) -> Path:
    """Write a graph of a linear layer ``z`` of n columns, and more nodes that compute the output from it."""
    constants = [axes("one", 1), axes("two", 2), axes("flat", -1), axes("column", -1, 1)]
    used = {name for entry in nodes for name in entry.input}
    return model_of(
        path,
        [node("Gemm", "x w b", "z"), *nodes],
        [weight("w", 4, n), weight("b", n), *(constant for constant in constants if constant.name in used)],
        outputs=[(output, shape)],
        opset=opset,
    )


def noted(path: Path, out: Path, **options: Any) -> tuple[Bundle, str]:
    lines: list[str] = []
    bundle = prepare(path, out, note=lines.append, **options)
    assert Bundle.read(out) == bundle
    assert len(lines) == 1
    assert lines[0].startswith(f"loss: {loss_text(bundle)} (")
    return bundle, lines[0]


def scores_of(path: Path) -> Array:
    """Return what the linear layer computes, in float64."""
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}
    return np.asarray(X.astype(np.float64) @ weights["w"] + weights["b"])


def cross_entropy(z: Array, labels: Array) -> float:
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return float(-np.take_along_axis(log_p, labels[..., None], -1).mean())


def binary(z: Array, labels: Array) -> float:
    return float(np.mean(np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - z * labels))


def check_same(bundle: Bundle, source: Path, labels: Array) -> float:
    """Check that plain onnxruntime computes the source's outputs, and return the loss."""
    results = run(bundle.model_path, {"x": X, "labels": labels})
    for name, values in run(source, {"x": X}).items():
        np.testing.assert_array_equal(results[name], values)
    return float(results["loss"])


CLASSES = np.array([0, 1, 2, 1, 0])
SOFTMAX = {
    "Softmax": [node("Softmax", "z", "y")],
    "Softmax over axis 1": [node("Softmax", "z", "y", axis=1)],
    "LogSoftmax": [node("LogSoftmax", "z", "y")],
    "behind Identity": [node("Softmax", "z", "p"), node("Identity", "p", "y")],
    "behind Cast": [
        node("Cast", "z", "d", to=TensorProto.DOUBLE),
        node("Softmax", "d", "p"),
        node("Cast", "p", "y", to=TensorProto.FLOAT),
    ],
    "behind Squeeze": [
        node("Unsqueeze", "z two", "u"),
        node("Softmax", "u", "p", axis=1),
        node("Squeeze", "p two", "y"),
    ],
    "behind Unsqueeze and Squeeze": [
        node("Softmax", "z", "p"),
        node("Unsqueeze", "p one", "u"),
        node("Squeeze", "u one", "y"),
    ],
    "behind Transpose": [
        node("Transpose", "z", "t", perm=[1, 0]),
        node("Softmax", "t", "p", axis=0),
        node("Transpose", "p", "y", perm=[1, 0]),
    ],
}


@pytest.mark.parametrize("nodes", SOFTMAX.values(), ids=SOFTMAX)
def test_cross_entropy_of_a_softmax_is_computed_from_its_input(tmp_path: Path, nodes: list[onnx.NodeProto]) -> None:
    path = made(tmp_path / "m.onnx", 3, nodes, ("batch", 3))
    bundle, said = noted(path, tmp_path / "out")
    assert "cross-entropy of 'y' over 3 classes (chosen as 'y' ends in " in said
    assert "Softmax" in said
    assert bundle.logits == "y"
    assert bundle.task is not None
    assert (bundle.task.name, bundle.task.settings) == ("classification", {"loss": "cross-entropy"})
    assert check_same(bundle, path, CLASSES) == pytest.approx(cross_entropy(scores_of(path), CLASSES), rel=1e-5)


def test_probabilities_that_round_to_0_have_a_finite_loss(tmp_path: Path) -> None:
    nodes = [node("Mul", "z hundred", "big"), node("Softmax", "big", "y")]
    path = model_of(
        tmp_path / "m.onnx",
        [node("Gemm", "x w b", "z"), *nodes],
        [weight("w", 4, 3), weight("b", 3), numpy_helper.from_array(np.array(100, np.float32), "hundred")],
        outputs=[("y", ("batch", 3))],
    )
    bundle = prepare(path, tmp_path / "out")
    z = 100 * scores_of(path)
    assert run(path, {"x": X})["y"].min() == 0
    worst = z.argmin(-1)
    expected = float(np.mean(z.max(-1) - z.min(-1)))  # what the other classes add rounds away
    assert check_same(bundle, path, worst) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("nodes", "shape", "op"),
    [
        ([node("Softmax", "z", "y", axis=0)], ("batch", 3), "Softmax"),  # over the batch
        ([node("Softmax", "z", "p"), node("Transpose", "p", "y")], (3, "batch"), "Softmax"),
        ([node("Softmax", "z", "p"), node("Reshape", "p column", "y")], ("n", 1), None),
        ([node("Softmax", "z", "p"), node("Reshape", "p flat", "y")], ("n",), None),
        ([node("Tanh", "z", "y")], ("batch", 3), "Tanh"),
        ([node("Add", "z z", "y")], ("batch", 3), "Add"),
        ([node("ArgMax", "z", "i", axis=1, keepdims=1), node("Cast", "i", "y", to=1)], ("batch", "n"), "ArgMax"),
        ([node("Unsqueeze", "z one", "y")], ("batch", "sequence", 3), "Gemm"),
        ([node("Unsqueeze", "z one", "u"), node("Sigmoid", "u", "y")], ("batch", "sequence", 3), "Sigmoid"),
    ],
)
def test_what_is_no_class_score_is_not_guessed(
    tmp_path: Path, nodes: list[onnx.NodeProto], shape: tuple[int | str, ...], op: str | None
) -> None:
    path = made(tmp_path / "m.onnx", 3, nodes, shape)
    if op is None:
        with pytest.raises(BundleError, match=r"m\.onnx: the output 'y' \(float32 .*\) has one column.*--loss mse"):
            prepare(path, tmp_path / "out")
        return
    bundle, said = noted(path, tmp_path / "out")
    assert (bundle.loss, bundle.logits, bundle.task) == (None, None, None)
    assert said.startswith(f"loss: none ('y' ends in {op}")
    assert said.endswith("; --loss states one)")
    assert [value.name for value in bundle.inputs] == ["x"]


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({"a": (1, ("batch", 3)), "b": (1, ("batch", 3))}, "none of the outputs 'a', 'b' is named 'logits'"),
        ({"a": (7, ("batch", 3))}, "the output 'a' is int64, which holds no scores"),
        ({"logits": (7, ("batch", 3)), "b": (1, ("batch", 3))}, "the output 'logits' is int64, which holds no scores"),
        ({"a": (1, ())}, "the output 'a' is a scalar"),
        ({"logits": (1, ("a", "b", "c", 3))}, r"'logits' has the shape \[a, b, c, 3\]"),
        ({"logits": (1, ("batch", 1, 3))}, r"'logits' of shape \[batch, 1, 3\] has the scores of one token only"),
    ],
)
def test_why_there_is_no_loss_is_said(tmp_path: Path, outputs: dict[str, Any], reason: str) -> None:
    nodes = [node("Gemm", "x w bias", "z")]
    nodes += [node("Cast", "z", name, to=kind) for name, (kind, _) in outputs.items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, ("batch", 4))],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        [weight("w", 4, 3), weight("bias", 3)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    bundle, said = noted(tmp_path / "m.onnx", tmp_path / "out")
    assert bundle.loss is None
    assert said == f"loss: none ({reason.replace(chr(92), '')}; --loss states one)"
    with pytest.raises(BundleError, match=r"m\.onnx: no bce loss can be added"):
        prepare(tmp_path / "m.onnx", tmp_path / "other", loss="bce")


def test_class_numbers_beside_their_probabilities_do_not_matter(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w b", "z"), node("ArgMax", "z", "label", axis=1), node("Softmax", "z", "probabilities")]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, ("batch", 4))],
        [
            helper.make_tensor_value_info("label", 7, ("batch", 1)),
            helper.make_tensor_value_info("probabilities", 1, ("batch", 3)),
        ],
        [weight("w", 4, 3), weight("b", 3)],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    bundle, _ = noted(path, tmp_path / "out")
    assert bundle.logits == "probabilities"
    assert check_same(bundle, path, CLASSES) == pytest.approx(cross_entropy(scores_of(path), CLASSES), rel=1e-5)


@pytest.mark.parametrize(
    ("nodes", "name", "options", "why"),
    [
        ([], "z", {}, "chosen as it is the only float output and ends in Gemm"),
        ([node("Mul", "z two", "y")], "y", {}, "chosen as it is the only float output and ends in Mul"),
        ([node("Identity", "z", "logits")], "logits", {}, "chosen by the name of the output"),
        ([node("Tanh", "z", "logits")], "logits", {}, "chosen by the name of the output"),
        ([node("Tanh", "z", "y")], "y", {"labels": ["a", "b", "c"]}, "chosen as labels are given"),
        ([node("Tanh", "z", "y")], "y", {"loss": "cross-entropy"}, "as stated"),
    ],
)
def test_logits(tmp_path: Path, nodes: list[Any], name: str, options: dict[str, Any], why: str) -> None:
    path = tmp_path / "m.onnx"
    model_of(
        path,
        [node("Gemm", "x w b", "z"), *nodes],
        [weight("w", 4, 3), weight("b", 3), numpy_helper.from_array(np.array(2, np.float32), "two")],
        outputs=[(name, ("batch", 3))],
    )
    bundle, said = noted(path, tmp_path / "out", **options)
    more = "" if "loss" in options else "; --loss states another"
    assert said == f"loss: cross-entropy of {name!r} over 3 classes ({why}{more})"
    logits = run(path, {"x": X})[name].astype(np.float64)
    assert check_same(bundle, path, CLASSES) == pytest.approx(cross_entropy(logits, CLASSES), rel=1e-5)


# ---- one column ------------------------------------------------------------------------------------------------------

YES_NO = np.array([0, 1, 1, 0, 1])


@pytest.mark.parametrize("shape", [("batch", 1), ("batch",)])
def test_one_column_is_not_guessed_and_learns_by_a_stated_loss(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    nodes = [] if len(shape) == 2 else [node("Squeeze", "z one", "y")]
    name = "y" if nodes else "z"
    path = made(tmp_path / "m.onnx", 1, nodes, shape, name)
    text = ", ".join(map(str, shape))
    with pytest.raises(
        BundleError,
        match=rf"m\.onnx: the output '{name}' \(float32 \[{text}\]\) has one column, which is no choice between "
        "classes: state the loss, --loss mse for a number, bce for yes or no, or none",
    ):
        prepare(path, tmp_path / "out")
    with pytest.raises(BundleError, match=r"no cross-entropy loss can be added .*: it needs two or more columns"):
        prepare(path, tmp_path / "out", loss="cross-entropy")
    z = scores_of(path)[:, 0]

    numbers = np.linspace(-1, 1, BATCH, dtype=np.float32)
    mse, said = noted(path, tmp_path / "mse", loss="mse")
    assert said == f"loss: mse of {name!r} (as stated)"
    assert next(value for value in mse.inputs if value.name == "labels").shape == ("batch",)
    assert check_same(mse, path, numbers) == pytest.approx(np.mean((z - numbers) ** 2), rel=1e-5)

    bce, said = noted(path, tmp_path / "bce", loss="bce", labels=["no", "yes"])
    assert said == f"loss: bce of {name!r} (as stated)"
    assert check_same(bce, path, YES_NO) == pytest.approx(binary(z, YES_NO), rel=1e-5)
    assert task_of(bce).predictions(z).tolist() == (z > 0).tolist()
    with pytest.raises(Exception, match=r"[Oo]ut of range|out of bounds"):
        check_same(bce, path, np.array([0, 1, 2, 0, 1]))
    with pytest.raises(BundleError, match=f"3 labels given, but '{name}' has 2 classes"):
        prepare(path, tmp_path / "other", loss="bce", labels=["a", "b", "c"])

    none, said = noted(path, tmp_path / "none", loss="none")
    assert said == "loss: none (as stated)"
    assert (none.loss, none.logits, none.task) == (None, None, None)  # the class of the highest score is always 0


@pytest.mark.parametrize("op", ["Identity", "Sigmoid", "Softmax"])
def test_one_axis_of_fixed_size_may_be_the_classes_of_one_example(tmp_path: Path, op: str) -> None:
    path = made(tmp_path / "m.onnx", 3, [node("Reshape", "z flat", "r"), node(op, "r", "y")], (3,))
    bundle, said = noted(path, tmp_path / "out")
    assert said == "loss: none ('y' has the shape [3], which may be examples or classes; --loss states one)"
    assert (bundle.loss, bundle.logits) == (None, None)
    one = {"x": np.ones((1, 4), np.float32), "labels": np.zeros(3, np.float32)}
    assert prepare(path, tmp_path / "mse", loss="mse", probe=one).loss == "loss"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("cast", [False, True])
def test_bce_of_a_sigmoid_is_computed_from_its_input(tmp_path: Path, n: int, cast: bool) -> None:
    nodes = [node("Sigmoid", "z", "p"), node("Cast", "p", "y", to=TensorProto.DOUBLE if cast else TensorProto.FLOAT)]
    path = made(tmp_path / "m.onnx", n, nodes, ("batch", n))
    if cast:
        model = onnx.load(path)
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        onnx.save(model, path)
    bundle, said = noted(path, tmp_path / "out")
    over = " over 3 labels" if n == 3 else ""
    assert said == f"loss: bce of 'y'{over} (chosen as 'y' ends in Sigmoid; --loss states another)"
    z = scores_of(path)
    labels = (z > -1) if n == 3 else YES_NO
    expected = binary(z, labels) if n == 3 else binary(z[:, 0], labels)
    assert check_same(bundle, path, labels.astype(np.float32 if n == 3 else np.int64)) == pytest.approx(
        expected, rel=1e-5
    )
    task = task_of(bundle)
    assert task.name == ("classification" if n == 1 else "multi-label")
    p = run(path, {"x": X})["y"]
    assert np.array_equal(task.predictions(p), ((p > 0.5)[:, 0] if n == 1 else p > 0.5).astype(int))
    with pytest.raises(BundleError, match=r"it needs two or more columns" if n == 1 else "it ends in Sigmoid"):
        prepare(path, tmp_path / "other", loss="cross-entropy")
    # The squared error is that of the output itself.
    squared = prepare(path, tmp_path / "mse", loss="mse")
    numbers = np.full((BATCH, n), 0.25, np.float32)
    got = check_same(squared, path, numbers[:, 0] if n == 1 else numbers)
    assert got == pytest.approx(np.mean((p - 0.25) ** 2), rel=1e-5)


def test_extreme_scores_have_the_exact_binary_cross_entropy(tmp_path: Path) -> None:
    for n in 1, 2:
        path = model_of(
            tmp_path / f"{n}.onnx",
            [node("MatMul", "x w", "logits")],
            [numpy_helper.from_array(np.full((4, n), 25, np.float32), "w")],
            outputs=[("logits", ("batch", n))],
        )
        bundle = prepare(path, tmp_path / f"out-{n}", loss="bce")
        x = np.stack([np.ones(4), -np.ones(4)]).astype(np.float32)  # scores 100 and -100
        for labels, expected in ([1, 0], 0.0), ([0, 1], 100.0), ([1, 1], 50.0):
            given = np.array(labels) if n == 1 else np.array([labels, labels], np.float32).T
            assert run(bundle.model_path, {"x": x, "labels": given})["loss"] == pytest.approx(expected, abs=1e-30)


def test_several_columns_by_a_stated_loss(tmp_path: Path) -> None:
    path = made(tmp_path / "m.onnx", 3, [], ("batch", 3), "z")
    z = scores_of(path)
    numbers = np.random.default_rng(1).normal(size=(BATCH, 3)).astype(np.float32)
    mse, said = noted(path, tmp_path / "mse", loss="mse")
    assert said == "loss: mse of 'z' over 3 values (as stated)"
    assert check_same(mse, path, numbers) == pytest.approx(np.mean((z - numbers) ** 2), rel=1e-5)
    bce, said = noted(path, tmp_path / "bce", loss="bce", labels=["a", "b", "c"])
    assert said == "loss: bce of 'z' over 3 labels (as stated)"
    sets = (numbers > 0).astype(np.float32)
    assert check_same(bce, path, sets) == pytest.approx(binary(z, sets), rel=1e-5)
    with pytest.raises(
        BundleError, match="labels given, but 'z', the input 'labels' and the loss do not fit to classes"
    ):
        prepare(path, tmp_path / "other", loss="mse", labels=["a", "b", "c"])
    with pytest.raises(BundleError, match="2 labels given, but 'z' has 3 classes"):
        prepare(path, tmp_path / "other", loss="bce", labels=["a", "b"])
    none, _ = noted(path, tmp_path / "none", loss="none", labels=["a", "b", "c"])
    assert (none.loss, none.logits, none.labels) == (None, "z", ("a", "b", "c"))


def test_a_stated_loss_of_another_form_is_refused(tmp_path: Path) -> None:
    softmax = made(tmp_path / "s.onnx", 3, [node("Softmax", "z", "y")], ("batch", 3))
    with pytest.raises(BundleError, match=r"no bce loss .* 'y' \(float32 \[batch, 3\]\): it ends in Softmax; try"):
        prepare(softmax, tmp_path / "out", loss="bce")
    other_axis = made(tmp_path / "a.onnx", 3, [node("Softmax", "z", "y", axis=0)], ("batch", 3))
    with pytest.raises(BundleError, match="not known to be along the last axis"):
        prepare(other_axis, tmp_path / "out", loss="cross-entropy")
    by_token = made(tmp_path / "t.onnx", 3, [node("Unsqueeze", "z one", "logits")], ("b", "s", 3), "logits")
    for loss in "bce", "mse":
        with pytest.raises(
            BundleError, match=rf"no {loss} loss .* \[b, s, 3\]\): it needs shape \[batch\] or \[batch, "
        ):
            prepare(by_token, tmp_path / "out", loss=loss)
    with pytest.raises(ValueError, match="loss must be 'cross-entropy', 'bce', 'mse', 'none' or None, got 'hinge'"):
        prepare(softmax, tmp_path / "out", loss="hinge")  # type: ignore[arg-type]


def test_tokens_by_softmax(tmp_path: Path) -> None:
    nodes = [node("Unsqueeze", "z one", "u"), node("Softmax", "u", "y", axis=2)]
    path = made(tmp_path / "m.onnx", 3, nodes, ("batch", "sequence", 3))
    bundle, said = noted(path, tmp_path / "out")
    assert "cross-entropy of 'y' over 3 classes (chosen as 'y' ends in Softmax" in said
    assert task_of(bundle).name == "token-classification"
    z, labels = scores_of(path), CLASSES.copy()
    expected = cross_entropy(z[:3], labels[:3])
    labels[3:] = -100
    assert check_same(bundle, path, labels[:, None]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("opset", [13, 18, 21, 23])
def test_every_operator_set_has_every_loss(tmp_path: Path, opset: int) -> None:
    def check(n: int, nodes: list[Any], labels: Array, expected: float, **options: Any) -> None:
        path = made(tmp_path / "m.onnx", n, nodes, ("batch", n), opset=opset)
        assert check_same(prepare(path, tmp_path / "out", overwrite=True, **options), path, labels) == pytest.approx(
            expected, rel=1e-5
        )

    rng = np.random.default_rng(2)
    z = scores_of(made(tmp_path / "m.onnx", 3, [node("Identity", "z", "y")], ("batch", 3)))
    numbers = rng.normal(size=(BATCH, 3)).astype(np.float32)
    sets = (numbers > 0).astype(np.float32)
    check(3, [node("Softmax", "z", "y")], CLASSES, cross_entropy(z, CLASSES))
    check(3, [node("Sigmoid", "z", "y")], sets, binary(z, sets))
    check(3, [node("Identity", "z", "y")], numbers, float(np.mean((z - numbers) ** 2)), loss="mse")
    z = scores_of(made(tmp_path / "m.onnx", 1, [node("Identity", "z", "y")], ("batch", 1)))
    check(1, [node("Sigmoid", "z", "y")], YES_NO, binary(z[:, 0], YES_NO))


@pytest.mark.parametrize("op", ["Identity", "Softmax", "Sigmoid"])
@pytest.mark.parametrize("qdq", [False, True])
def test_quantised_graphs_end_as_others_do(tmp_path: Path, op: str, qdq: bool) -> None:
    path = made(tmp_path / "m.onnx", 3, [node("MatMul", "z v", "u"), node(op, "u", "y")], ("batch", 3))
    model = onnx.load(path)
    model.graph.initializer.append(weight("v", 3, 3))
    if qdq:
        scale = numpy_helper.from_array(np.array(0.05, np.float32), "s")
        zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
        model.graph.initializer.extend([scale, zero])
        model.graph.node[-1].output[0] = "float"
        model.graph.node.extend(
            [node("QuantizeLinear", "float s zero", "q"), node("DequantizeLinear", "q s zero", "y", "dequantize")]
        )
    onnx.save(model, path)
    source = path
    if not qdq:
        source = tmp_path / "int8.onnx"
        quantize_dynamic(path, source, op_types_to_quantize=["MatMul"])
        assert "MatMulInteger" in {entry.op_type for entry in onnx.load(source).graph.node}
    _, said = noted(source, tmp_path / "out")
    expected = {
        "Identity": "cross-entropy of 'y' over 3 classes (chosen as it is the only float output",
        "Softmax": "cross-entropy of 'y' over 3 classes (chosen as 'y' ends in Softmax",
        "Sigmoid": "bce of 'y' over 3 labels (chosen as 'y' ends in Sigmoid",
    }
    assert said.startswith(f"loss: {expected[op]}")


# ---- a loss of the graph's own ---------------------------------------------------------------------------------------


def test_a_loss_of_the_graphs_own_is_used_and_said(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", "x w b", "logits"),
        node("Sub", "logits labels", "error"),
        node("ReduceMean", "error", "loss", keepdims=0),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("w", 4, 1), weight("b", 1)],
        inputs=[("x", TensorProto.FLOAT, ("batch", 4)), ("labels", TensorProto.FLOAT, ("batch", 1))],
        outputs=[("loss", ()), ("logits", ("batch", 1))],
    )
    bundle, said = noted(path, tmp_path / "out")
    assert said == "loss: the graph's own output 'loss' (used as it is)"
    assert (bundle.loss, bundle.logits, bundle.task) == ("loss", "logits", None)
    assert task_of(bundle).metrics == ("loss", "perplexity")  # no accuracy of one column
    with pytest.raises(
        BundleError, match="the graph has a loss of its own, the output 'loss': prepare it without --lo"
    ):
        prepare(path, tmp_path / "other", loss="mse")
    none, said = noted(path, tmp_path / "none", loss="none")
    assert said == "loss: none (as stated)"
    assert none.loss is None


# ---- float16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid"])
def test_a_loss_in_float16(tmp_path: Path, op: str) -> None:
    path = made(tmp_path / "m.onnx", 3, [node(op, "z", "y")], ("batch", 3))
    bundle, said = noted(path, tmp_path / "out", dtype="float16")
    assert f"chosen as 'y' ends in {op}" in said
    z = scores_of(path)
    labels = CLASSES if op == "Softmax" else (z > -1).astype(np.float32)
    result = run(bundle.model_path, {"x": X, "labels": labels})
    expected = cross_entropy(z, labels) if op == "Softmax" else binary(z, labels)
    assert result["loss"].dtype == np.float32
    assert result["loss"] == pytest.approx(expected, rel=5e-3)


def test_scores_in_another_float_type(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    made(path, 3, [node("Cast", "z", "logits", to=TensorProto.FLOAT16)], ("batch", 3), "logits")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    bundle, _ = noted(path, tmp_path / "out")
    assert check_same(bundle, path, CLASSES) == pytest.approx(cross_entropy(scores_of(path), CLASSES), rel=5e-3)


def test_facts_have_the_name_of_the_loss(tmp_path: Path) -> None:
    bundle = prepare(made(tmp_path / "m.onnx", 3, [], ("batch", 3), "z"), tmp_path / "out")
    assert bundle_facts(bundle)["loss"] == "loss"
    assert loss_text(bundle) == "cross-entropy of 'z' over 3 classes"
