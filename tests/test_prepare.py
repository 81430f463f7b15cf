from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import (
    MODELS,
    linear,
    model_of,
    node,
    run,
    trainable_names,
    weight,
)
from onnx import TensorProto, helper
from sizes import full_or_small

from pocketzo import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.prepare import prepare

# Options.


def test_trainable_restricts(tmp_path: Path) -> None:
    path = MODELS / "bert-old.onnx"
    by_pattern = prepare(path, tmp_path / "a", train=r"layer\.1\..*dense|classifier")
    joined = prepare(path, tmp_path / "b", train=r"layer\.1\..*dense+classifier")
    assert joined.trainable.keys() == {r"layer\.1\..*dense", "classifier"}
    assert joined.trainable["classifier"] == ("classifier.weight", "classifier.bias")
    assert trainable_names(by_pattern) == trainable_names(joined)
    assert trainable_names(joined) == {name for names in joined.trainable.values() for name in names}
    assert len(by_pattern.tensors) == len(joined.tensors) == 41
    with pytest.raises(BundleError, match="none of the 41 weights"):
        prepare(path, tmp_path / "c", train="nothing like it")


@pytest.mark.parametrize(
    ("options", "error", "fault"),
    [
        ({"train": "("}, ValueError, r"train must be a regular expression, got '\(': missing \)"),
        ({"train": 5}, TypeError, "train must be a str, got 5"),
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
        (
            lambda path: model_of(
                path, [node("Old", "x", "y"), node("MatMul", "y w", "logits")], [weight("w", 4, 3)], opset=12
            ),
            "operator set 12, and onnx does not convert it; export",
        ),
        (with_nodes([node("Tanh", "x", "logits")], []), "no float32 or float16 weights"),
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


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_weights_of_other_float_types_are_refused(tmp_path: Path, kind: int) -> None:
    tensor = helper.make_tensor("fc.weight", kind, [4, 3], np.linspace(-1, 1, 12))
    path = model_of(tmp_path / "m.onnx", [node("MatMul", "x fc.weight", "logits")], [tensor])
    name = helper.tensor_dtype_to_np_dtype(kind).name
    with pytest.raises(BundleError, match=f"'fc.weight'.*{name}.*export the model in float32"):
        prepare(path, tmp_path / "out")
    with pytest.raises(BundleError, match=f"'fc.weight'.*{name}.*float32 or float16"):
        prepare(path, tmp_path / "out", train="fc")


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_weights_of_other_float_types_behind_a_cast_are_stored_as_they_are_used(tmp_path: Path, kind: int) -> None:
    tensor = helper.make_tensor("fc.weight", kind, [4, 3], np.linspace(-1, 1, 12))
    nodes = [node("Cast", "fc.weight", "w", to=TensorProto.FLOAT), node("MatMul", "x w", "logits")]
    path = model_of(tmp_path / "m.onnx", nodes, [tensor])
    bundle = prepare(path, tmp_path / "out")
    assert [(spec.name, spec.dtype, spec.trainable) for spec in bundle.tensors] == [("fc.weight", "float32", True)]
    feed = {"x": np.eye(4, dtype=np.float32)}
    result = run(bundle.model_path, feed | {"labels": np.zeros(4, np.int64)})
    np.testing.assert_array_equal(result["logits"], run(path, feed)["logits"])


def test_what_is_not_a_bundle_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a thesis")
    with pytest.raises(BundleError, match="already exists and is not a bundle"):
        prepare(linear(tmp_path / "m.onnx"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a thesis"


def test_a_bundle_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    prepare(path, tmp_path / "out", labels=["a", "b", "c"])
    with pytest.raises(BundleError, match=r"nothing\.onnx: no such file"):
        prepare(tmp_path / "nothing.onnx", tmp_path / "out", overwrite=True)
    assert Bundle.read(tmp_path / "out").labels == ("a", "b", "c")
    with pytest.raises(BundleError, match=r"out: already exists; .* replace the bundle with overwrite=True"):
        prepare(path, tmp_path / "out")
    assert Bundle.read(tmp_path / "out").labels == ("a", "b", "c")
    assert prepare(path, tmp_path / "out", overwrite=True).labels is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "out"]


def test_weights_are_not_held_in_memory(tmp_path: Path) -> None:
    """A model of many matrices of 16 MB each, in external data, takes the memory of fewer than three."""
    count = full_or_small(24, 6)
    script = """
import sys
import numpy as np, onnx
from onnx import TensorProto, helper
from pocketzo.prepare import prepare
def write(name, n, count):
    with open(f"{name}.data", "wb") as file:
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
        for key, value in ("location", f"{name}.data"), ("offset", i * n * n * 4), ("length", n * n * 4):
            tensor.external_data.add(key=key, value=str(value))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, f"{name}.onnx")
write("small", 8, 1)
prepare("small.onnx", "small")  # imports libraries, and lets onnx register its operators: 30 to 50 MB
write("model", 2048, int(sys.argv[1]))
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


@pytest.mark.parametrize("package", ["onnx", "onnx_ir"])
def test_the_module_says_which_extra_is_missing(package: str) -> None:
    script = """
import sys
sys.modules[sys.argv[1]] = None
from pocketzo.prepare import prepare
try:
    prepare("m.onnx", "out")
except ImportError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", script, package], capture_output=True, text=True, check=True)
    name = package.replace("_", "-")
    assert re.match(rf"MissingExtraError .*'{name}'.*pip install 'pocketzo\[prepare\]'", result.stdout)
