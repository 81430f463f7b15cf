from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from sizes import full_or_small

from pocketzo import BundleError, DeadWeightError
from pocketzo.formats.bundle import Bundle
from pocketzo.prepare import prepare

Array = npt.NDArray[Any]

MODELS = Path(__file__).parent / "models"
BERTS = ["bert-old", "bert-new", "bert-new-external", "bert-old-unfolded", "fresh-old", "fresh-new"]
TIED = ["mlm-old", "mlm-new", "gpt2-old", "gpt2-new", "opt-old"]
# The exporter drops the biases of Gemm nodes that are zeros, so that there is nothing to train.
DROPPED = {"fresh-new": {"bert.pooler.dense.bias", "classifier.bias"}}
# Tied parameters: torch names them once, by the first of their names, the exporters by any.
SAME = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "model.lm_head.weight": "model.transformer.wte.weight",
}


def inputs_of(name: str) -> dict[str, Array]:
    with np.load(MODELS / f"{name}.npz") as file:
        return {key.removeprefix("input."): np.array(file[key]) for key in file.files if key.startswith("input.")}


def labels_for(logits: Array) -> Array:
    shape = logits.shape[:-1]
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape) * 7 % np.int64(logits.shape[-1])


def run(path: Path, feed: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


class Live:
    """A session at full optimisation whose weights are arrays of this process."""

    def __init__(self, bundle: Bundle) -> None:
        loaded = safetensors.numpy.load_file(bundle.weights_path)
        self.weights = {tensor.name: np.array(loaded[tensor.name]) for tensor in bundle.tensors}
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.weights.items()}
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        for name, value in self.values.items():
            options.add_initializer(name, value)
        self.session = ort.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])

    def outputs(self, feed: dict[str, Array]) -> list[Array]:
        return list(self.session.run(None, feed))

    def moved(self, before: list[Array], feed: dict[str, Array]) -> bool:
        return not all(np.array_equal(a, b) for a, b in zip(before, self.outputs(feed), strict=True))

    def dead(self, bundle: Bundle, feed: dict[str, Array]) -> list[str]:
        """Return the trainable tensors whose changes no output shows."""
        rng = np.random.default_rng(0)
        for array in self.weights.values():  # a fresh head is all zeros, behind which nothing shows
            array += rng.normal(0, 0.05, array.shape).astype(np.float32)
        before = self.outputs(feed)
        dead = []
        for tensor in bundle.tensors:
            if not tensor.trainable:
                continue
            array = self.weights[tensor.name]
            kept = array.copy()
            array += rng.normal(0, 0.5, array.shape).astype(np.float32)
            seen = self.moved(before, feed)
            if not seen:  # softmax takes no notice of a bias of the keys, which moves all scores of a row alike
                array[...] = np.nan
                seen = self.moved(before, feed)
            array[...] = kept
            if not seen:
                dead.append(tensor.name)
        for a, b in zip(before, self.outputs(feed), strict=True):
            np.testing.assert_array_equal(a, b)
        return dead


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    folder = tmp_path_factory.mktemp("bundles")

    def get(name: str) -> Bundle:
        if not (folder / name).exists():
            prepare(MODELS / f"{name}.onnx", folder / name)
        return Bundle.read(folder / name)

    return get


def weight(name: str, *shape: int, dtype: npt.DTypeLike = np.float32, seed: int = 0) -> TensorProto:
    values = np.random.default_rng([seed, *name.encode()]).normal(size=shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def model_of(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Iterable[TensorProto],
    *,
    outputs: Sequence[tuple[str, Sequence[int | str]]] = (("logits", ("batch", 3)),),
    inputs: Sequence[tuple[str, int, Sequence[int | str]]] = (("x", TensorProto.FLOAT, ("batch", 4)),),
    opset: int = 17,
    ir_version: int = 8,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        list(weights),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version), path)
    return path


def node(op_type: str, inputs: str, output: str, name: str | None = None, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name or f"node_{output}", **attributes)


def linear(path: Path, **options: Any) -> Path:
    return model_of(path, [node("MatMul", "x fc.weight", "logits")], [weight("fc.weight", 4, 3)], **options)


def trainable_names(bundle: Bundle) -> set[str]:
    return {tensor.name for tensor in bundle.tensors if tensor.trainable}


def initializer(bundle: Bundle, name: str) -> Array:
    return safetensors.numpy.load_file(bundle.weights_path)[name]


# Models as the exporters write them.


@pytest.mark.parametrize("name", BERTS + TIED)
def test_outputs_are_those_of_torch_and_of_the_original(bundles: Callable[[str], Bundle], name: str) -> None:
    feed = inputs_of(name)
    with np.load(MODELS / f"{name}.npz") as file:
        expected = file["logits"]
    labels = labels_for(expected)
    original = run(MODELS / f"{name}.onnx", feed)
    prepared = run(bundles(name).model_path, feed | {"labels": labels})
    np.testing.assert_allclose(prepared["logits"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prepared["logits"], original["logits"], rtol=1e-5, atol=1e-6)
    logits = expected.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, labels[..., None], -1).mean()
    assert prepared["loss"].shape == ()
    assert prepared["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", BERTS + TIED)
def test_every_trainable_tensor_is_live(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    feed = inputs_of(name)
    with np.load(MODELS / f"{name}.npz") as file:
        feed["labels"] = labels_for(file["logits"])
    assert Live(bundle).dead(bundle, feed) == []


@pytest.mark.parametrize("name", BERTS + TIED)
def test_every_parameter_of_the_torch_module_is_there(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    loaded = safetensors.numpy.load_file(bundle.weights_path)
    with np.load(MODELS / f"{name}.npz") as file:
        parameters = {
            SAME.get(key, key): (shape, total, square)
            for key, shape, total, square in zip(
                file["names"], file["shapes"], file["sums"], file["squares"], strict=True
            )
            if key not in DROPPED.get(name, ())
        }
    assert {SAME.get(tensor.name, tensor.name) for tensor in bundle.tensors} == set(parameters)
    for tensor in bundle.tensors:
        array = loaded[tensor.name].astype(np.float64)
        shape, total, square = parameters[SAME.get(tensor.name, tensor.name)]
        assert tensor.trainable
        assert "x".join(map(str, sorted(tensor.shape))) == shape
        assert array.sum() == pytest.approx(total, rel=1e-6, abs=1e-6)
        assert np.square(array).sum() == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("name", BERTS + TIED)
def test_the_graph_points_to_aligned_weights_and_keeps_none(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    model = onnx.load(bundle.model_path, load_external_data=False)
    onnx.checker.check_model(os.fspath(bundle.model_path))
    loaded = safetensors.numpy.load_file(bundle.weights_path)
    content = bundle.weights_path.read_bytes()
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert [tensor.name for tensor in external] == [tensor.name for tensor in bundle.tensors]
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        offset = int(fields["offset"])
        assert fields["location"] == "weights.safetensors"
        assert offset % 64 == 0
        assert content[offset : offset + int(fields["length"])] == loaded[tensor.name].tobytes()
    inline = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor not in external]
    assert not [array for array in inline if array.dtype.kind == "f" and array.size > 1]
    assert bundle.model_path.stat().st_size < (MODELS / f"{name}.onnx").stat().st_size


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_one_tensor(bundles: Callable[[str], Bundle], name: str) -> None:
    bundle = bundles(name)
    shapes = Counter(tuple(sorted(tensor.shape)) for tensor in bundle.tensors)
    assert shapes[16, 64] == (3 if "gpt2" in name else 1)  # GPT-2 has two layers of that size besides
    model = onnx.load(bundle.model_path, load_external_data=False)
    table = next(
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in {tensor.name for tensor in bundle.tensors if tensor.shape == (64, 16)}
    )
    readers = [node for node in model.graph.node if table in node.input]
    assert sorted(node.op_type for node in readers) == ["Gather", "Gemm"]


@pytest.mark.parametrize("name", ["fresh-old", "fresh-new"])
def test_merged_weights_are_separate_again(bundles: Callable[[str], Bundle], name: str) -> None:
    """Writing one of two parameters that were merged must not be the same as writing the other."""
    bundle = bundles(name)
    live = Live(bundle)
    feed = inputs_of(name) | {"labels": np.array([0, 1])}
    rng = np.random.default_rng(0)
    for array in live.weights.values():
        array += rng.normal(0, 0.2, array.shape).astype(np.float32)
    results = [live.outputs(feed)[0].tobytes()]
    for name in "query.bias", "value.bias":
        for layer in range(2):
            array = live.weights[f"bert.encoder.layer.{layer}.attention.self.{name}"]
            kept = array.copy()
            array += np.arange(16, dtype=np.float32)
            results.append(live.outputs(feed)[0].tobytes())
            array[...] = kept
    assert len(set(results)) == len(results) == 5


def test_both_exporters_give_the_same_names_and_ids(bundles: Callable[[str], Bundle]) -> None:
    old, new, unfolded = (
        {tensor.name: (tensor.id, tensor.shape) for tensor in bundles(name).tensors}
        for name in ("bert-old", "bert-new", "bert-old-unfolded")
    )
    assert old == new == unfolded


def test_preparing_twice_changes_nothing(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    first = bundles("mlm-old")
    second = prepare(first.model_path, tmp_path / "second")
    assert second.tensors == first.tensors
    assert second.base_sha256 == first.base_sha256
    assert (second.inputs, second.outputs, second.loss) == (first.inputs, first.outputs, first.loss)


def test_the_same_model_makes_the_same_bytes(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    again = prepare(MODELS / "bert-new.onnx", tmp_path / "again")
    first = bundles("bert-new")
    assert (again.graph_sha256, again.base_sha256) == (first.graph_sha256, first.base_sha256)


def test_weights_in_external_data_are_found(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert prepare(tmp_path / "model.onnx", tmp_path / "out").base_sha256 == bundles("bert-old").base_sha256


def test_a_file_of_external_data_for_each_tensor(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    model = onnx.load(MODELS / "bert-old.onnx")
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert prepare(tmp_path / "model.onnx", tmp_path / "out").base_sha256 == bundles("bert-old").base_sha256


# What is in a graph.


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


# Which tensors are one, and what they are called.


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


def test_a_gemm_that_is_tied_flips_its_flag(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "embedding.weight ids", "x"),
        node("Transpose", "embedding.weight", "t"),
        node("Gemm", "x t", "logits"),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("embedding.weight", 9, 4)],
        inputs=[("ids", TensorProto.INT64, ["n"])],
        outputs=[("logits", ["n", 9])],
    )
    bundle = prepare(path, tmp_path / "out")
    gemm = next(n for n in onnx.load(bundle.model_path).graph.node if n.op_type == "Gemm")
    assert helper.get_node_attr_value(gemm, "transB") == 1
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
        node("MatMul", "x y", "logits"),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        nodes,
        [weight("embedding.weight", 3, 4)],
        inputs=[("ids", TensorProto.INT64, ["n"])],
    )
    with pytest.raises(DeadWeightError, match=r"'embedding.weight'.*'second'"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Dead weights.

SCALED = [node("Mul", "fc.weight fc.scale", "scaled", "scaling"), node("MatMul", "x scaled", "logits")]
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
        (SCALED, [weight("fc.weight", 4, 3), weight("fc.scale", 4, 1)], ("scaling", "fc.weight")),
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
def test_what_the_runtime_would_fold_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto], names: tuple[str, str]
) -> None:
    path = model_of(tmp_path / "m.onnx", nodes, weights)
    with pytest.raises(DeadWeightError, match=f"{names[0]!r}.*{names[1]!r}"):
        prepare(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


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
    bundle = prepare(path, tmp_path / "out", trainable="^fc")
    assert trainable_names(bundle) == {"fc.weight"}
    x = np.ones((1, 4), np.float32)
    labels = np.array([0])
    np.testing.assert_allclose(
        run(bundle.model_path, {"x": x, "labels": labels})["logits"], run(path, {"x": x})["logits"], rtol=1e-6
    )


# The loss.


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


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"outputs": [("logits", ("a", "b", "c", 3))]}, "'logits'.*shape"),
        ({"inputs": [("x", 1, ("n", 4)), ("labels", 7, ("n",))]}, "input 'labels' but no output 'loss'"),
        ({"outputs": [("logits", ("n", 3)), ("loss", ("n", 3))]}, "'loss' is not a scalar"),
    ],
)
def test_a_loss_that_cannot_be_made_is_refused(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    nodes = [node("MatMul", "x fc.weight", "logits"), node("Abs", "logits", "loss")]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("fc.weight", 4, 3)], **options)
    with pytest.raises(BundleError, match=fault):
        prepare(path, tmp_path / "out")


# Options.


def test_trainable_restricts(tmp_path: Path) -> None:
    path = MODELS / "bert-old.onnx"
    by_pattern = prepare(path, tmp_path / "a", trainable=r"layer\.1\..*dense|classifier")
    by_function = prepare(path, tmp_path / "b", trainable=lambda name: "layer.1." in name and "dense" in name)
    assert trainable_names(by_pattern) - trainable_names(by_function) == {"classifier.weight", "classifier.bias"}
    assert len(by_pattern.tensors) == len(by_function.tensors) == 41
    with pytest.raises(BundleError, match="none of the 41 weights"):
        prepare(path, tmp_path / "c", trainable="nothing like it")


@pytest.mark.parametrize(
    ("options", "error", "fault"),
    [
        ({"trainable": "("}, ValueError, "regular expression"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"max_length": True}, ValueError, "max_length"),
        ({"labels": "abc"}, TypeError, "labels"),
        ({"labels": [1, 2, 3]}, TypeError, "labels"),
        ({"labels": ["a", "a", "b"]}, ValueError, "labels"),
        ({"labels": ["a", "", "b"]}, ValueError, "labels"),
        ({"labels": ["no", "yes"]}, BundleError, "2 labels given, but 'logits' has 3"),
        ({"tokenizer": "nothing.json"}, BundleError, r"nothing\.json: no such file"),
        ({"tokenizer": __file__}, BundleError, r"not a tokenizer\.json"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], error: type[Exception], fault: str) -> None:
    with pytest.raises(error, match=fault):
        prepare(linear(tmp_path / "m.onnx"), tmp_path / "out", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    (tmp_path / "tok.json").write_text('{"model": "é"}', encoding="utf-8")
    bundle = prepare(linear(tmp_path / "m.onnx"), tmp_path / "out", tokenizer=tmp_path / "tok.json")
    assert bundle.tokenizer_path is not None
    assert bundle.tokenizer_path.read_bytes() == (tmp_path / "tok.json").read_bytes()


# Bad input.


def without_data(path: Path) -> None:
    shutil.copy(MODELS / "bert-new-external.onnx", path)


def with_half_of_the_data(path: Path) -> None:
    without_data(path)
    data = (MODELS / "bert-new-external.onnx.data").read_bytes()
    path.with_name("bert-new-external.onnx.data").write_bytes(data[: len(data) // 2])


def with_data_elsewhere(path: Path) -> None:
    model = onnx.load(MODELS / "bert-new-external.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../secret"
    path.write_bytes(model.SerializeToString())


def with_short_raw_data(path: Path) -> None:
    tensor = weight("fc.weight", 4, 3)
    tensor.raw_data = tensor.raw_data[:-4]
    model_of(path, [node("MatMul", "x fc.weight", "logits")], [tensor])


def with_nodes(nodes: list[onnx.NodeProto], weights: list[TensorProto]) -> Callable[[Path], object]:
    return lambda path: model_of(path, nodes, weights)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_bytes(b""), "not an ONNX file"),
        (lambda path: path.write_text("<html>404</html>" * 50), "not an ONNX file"),
        (lambda path: path.write_bytes((MODELS / "bert-old.onnx").read_bytes()[:-100]), "not an ONNX file, or cut off"),
        (without_data, "bert-new-external.onnx.data' is missing"),
        (with_half_of_the_data, "cut off"),
        (with_data_elsewhere, "not a file beside the model"),
        (with_short_raw_data, "'fc.weight'.*cut off"),
        (lambda path: linear(path, opset=12), "operator set 12"),
        (with_nodes([node("Tanh", "x", "logits")], []), "no float32 weights"),
        (
            with_nodes([node("NotAnOperator", "x", "y"), node("MatMul", "y w", "logits")], [weight("w", 4, 3)]),
            "onnxruntime cannot run it",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, make: Callable[[Path], object], fault: str) -> None:
    path = tmp_path / "model.onnx"
    make(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match=fault) as caught:
        prepare(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
@pytest.mark.parametrize("cast", [False, True])
def test_weights_of_other_float_types_are_refused(tmp_path: Path, kind: int, cast: bool) -> None:
    tensor = helper.make_tensor("fc.weight", kind, [4, 3], np.linspace(-1, 1, 12))
    nodes = [node("Cast", "fc.weight", "w", to=TensorProto.FLOAT), node("MatMul", "x w", "logits")]
    path = model_of(tmp_path / "m.onnx", nodes if cast else [node("MatMul", "x fc.weight", "logits")], [tensor])
    name = helper.tensor_dtype_to_np_dtype(kind).name
    with pytest.raises(BundleError, match=f"'fc.weight'.*{name}.*float32"):
        prepare(path, tmp_path / "out")


def test_what_is_not_a_bundle_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a thesis")
    with pytest.raises(BundleError, match="already exists and is not a bundle"):
        prepare(linear(tmp_path / "m.onnx"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a thesis"


def test_a_bundle_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    prepare(path, tmp_path / "out", labels=["a", "b", "c"])
    with pytest.raises(BundleError):
        prepare(tmp_path / "nothing.onnx", tmp_path / "out")
    assert Bundle.read(tmp_path / "out").labels == ("a", "b", "c")
    assert prepare(path, tmp_path / "out").labels is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "out"]


def test_weights_are_not_held_in_memory(tmp_path: Path) -> None:
    """A model of many matrices of 16 MB each, in external data, takes the memory of fewer than three."""
    count = full_or_small(24, 6)
    script = """
import sys
import numpy as np, onnx
from onnx import TensorProto, helper
from pocketzo.prepare import prepare
n, count = 2048, int(sys.argv[1])
with open("model.data", "wb") as file:
    for i in range(count):
        file.write(np.random.default_rng(i).random(n * n, np.float32))
graph = helper.make_graph(
    [node for i in range(count) for node in (
        helper.make_node("Transpose", [f"layer.{i}.weight"], [f"t{i}"]),
        helper.make_node("MatMul", [f"x{i}", f"t{i}"], [f"x{i + 1}"]))],
    "graph",
    [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", n])],
    [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, ["n", n])],
)
for i in range(count):
    tensor = graph.initializer.add(name=f"layer.{i}.weight", dims=[n, n], data_type=1, data_location=1)
    for key, value in ("location", "model.data"), ("offset", i * n * n * 4), ("length", n * n * 4):
        tensor.external_data.add(key=key, value=str(value))
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "model.onnx")
def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0])
peak = 0
contiguous = np.ascontiguousarray
def watched(*args, **options):
    global peak
    result = contiguous(*args, **options)
    peak = max(peak, anonymous())
    return result
before = anonymous()
np.ascontiguousarray = watched
bundle = prepare("model.onnx", "out")
print(len(bundle.tensors), peak - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(count)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    prepared, kilobytes = map(int, result.stdout.split())
    assert prepared == count
    assert kilobytes < 2048 * 2048 * 4 / 1024 * 3


def test_the_module_says_which_extra_is_missing() -> None:
    script = """
import sys
sys.modules["onnx"] = None
from pocketzo.prepare import prepare
try:
    prepare("m.onnx", "out")
except ImportError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.match(r"MissingExtraError .*pip install 'pocketzo\[prepare\]'", result.stdout)
