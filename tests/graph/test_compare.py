"""``prepare`` runs source and bundle on a batch, and refuses a difference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Array, linear, model_of, node, run, weight
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo.errors import BundleError
from pocketzo.graph import extract
from pocketzo.graph.compare import _COARSE, _FLOAT32, _difference
from pocketzo.graph.weight import Weight
from pocketzo.prepare import prepare

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], None]:
    """Has the extraction of weights multiply one by a factor."""
    whole = extract.extract_weights

    def change(name: str, factor: float) -> None:
        def faulty(*args: Any) -> list[Weight]:
            weights = whole(*args)
            (changed,) = (weight for weight in weights if weight.name == name)
            changed.array = changed.array * np.float32(factor)
            return weights

        monkeypatch.setattr(extract, "extract_weights", faulty)

    return change


def branches(path: Path) -> Path:
    """A graph that multiplies by another weight where the mean of x is not above 0; tensors have the same names."""

    def branch(name: str, table: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, FLOAT, None)
        inner = numpy_helper.from_array(numpy_helper.to_array(weight(table, 4, 3)), "W")
        return helper.make_graph([node("MatMul", "x W", name)], name, [], [output], [inner])

    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch("a", "A"), else_branch=branch("b", "B"))
    return model_of(
        path,
        [
            node("ReduceMean", "x", "m", keepdims=0),
            node("Greater", "m zero", "c"),
            choice,
            node("Add", "y bias", "logits"),
        ],
        [numpy_helper.from_array(np.array(0, np.float32), "zero"), weight("bias", 3)],
    )


# ---- a difference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_difference_is_refused_with_its_output_and_size(
    tmp_path: Path, fault: Callable[[str, float], None], dtype: Literal["float32", "float16"]
) -> None:
    fault("fc.weight", 1.5)
    with pytest.raises(BundleError, match=r"m\.onnx: .* the output 'logits' is off by \d\.\d+ where it reaches \d"):
        prepare(linear(tmp_path / "m.onnx"), tmp_path / "out", dtype=dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_thousandth_is_a_difference_and_a_rounding_is_none(
    tmp_path: Path, fault: Callable[[str, float], None]
) -> None:
    fault("fc.weight", 1 + 2**-22)
    prepare(linear(tmp_path / "m.onnx"), tmp_path / "rounded")
    fault("fc.weight", 1.001)
    with pytest.raises(BundleError, match="another function"):
        prepare(linear(tmp_path / "m.onnx"), tmp_path / "out")


def test_both_branches_are_compared(tmp_path: Path) -> None:
    path = branches(tmp_path / "m.onnx")
    bundle = prepare(path, tmp_path / "out")
    for sign in (1, -1):
        x = sign * np.abs(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32))
        got = run(bundle.model_path, {"x": x, "labels": np.zeros(2, np.int64)})
        np.testing.assert_allclose(got["logits"], run(path, {"x": x})["logits"], rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_a_difference_in_either_branch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    whole = extract.extract_weights

    def faulty(*args: Any) -> list[Weight]:
        weights = whole(*args)
        changed = [weight for weight in weights if weight.array.ndim == 2][index]
        changed.array = -changed.array
        return weights

    monkeypatch.setattr(extract, "extract_weights", faulty)
    with pytest.raises(BundleError, match="another function"):
        prepare(branches(tmp_path / "m.onnx"), tmp_path / "out")


def as_float32(values: Any) -> Array:
    array = np.array(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


@pytest.mark.parametrize(
    ("got", "expected", "fault"),
    [
        ([[1.0, 2.0]], [[1.0], [2.0]], "has shape [1, 2], expected [2, 1]"),
        ([1.0, 2.0], [1.0, 2.00005], None),
        ([1.0, 2.0], [1.0, 2.0005], "is off by 0.0005 where it reaches 2"),
        ([1e-6], [0.0], None),  # what cancels
        ([np.nan], [1.0], "is off by nan where it reaches 1"),
        ([1.0, -np.inf, np.nan], [1.0, -np.inf, np.nan], None),
        ([1.0, -np.inf], [1.0, np.inf], "is not infinite or NaN in the same places"),
        ([1.0, 5.0], [1.0, -np.inf], "is not infinite or NaN in the same places"),
        ([1.0, -3.4e38], [1.5, -3.4e38], "is off by 0.5 where it reaches 1.5"),  # beside a mask
        ([1, 2, 3], [1, 2, 4], "differs in 1 of 3 elements"),
        ([True], [True], None),
        (["a"], ["b"], "differs in 1 of 1 elements"),
        (np.empty((0, 3)), np.empty((0, 3)), None),
    ],
)
def test_differences_of_float32(got: Any, expected: Any, fault: str | None) -> None:
    assert _difference(as_float32(got), as_float32(expected), _FLOAT32) == fault


def test_coarse_roundings_allow_more() -> None:
    assert _difference(as_float32([1.0, 2.05]), as_float32([1.0, 2.0]), _COARSE) is None
    assert _difference(as_float32([1.0, 2.2]), as_float32([1.0, 2.0]), _COARSE) == "is off by 0.2 where it reaches 2"
    assert _difference(np.array([3]), np.array([2]), _COARSE) is None  # the second best became the best


# ---- what is not a fault of the bundle -------------------------------------------------------------------------------


def test_random_outputs_are_not_compared_and_said(tmp_path: Path, fault: Callable[[str, float], None]) -> None:
    def made(path: Path) -> Path:
        return model_of(
            path,
            [
                node("MatMul", "x fc.weight", "logits"),
                node("RandomNormalLike", "logits", "z"),
                node("Add", "logits z", "noisy"),
            ],
            [weight("fc.weight", 4, 3)],
            outputs=[("logits", ("batch", 3)), ("noisy", ("batch", 3))],
        )

    path = made(tmp_path / "m.onnx")
    with pytest.warns(UserWarning, match="not compared with the source, as it differs from run to run: noisy$"):
        prepare(path, tmp_path / "out")
    fault("fc.weight", 1.5)
    with pytest.raises(BundleError, match="the output 'logits' is off"), pytest.warns(UserWarning, match="noisy"):
        prepare(path, tmp_path / "faulty")


def test_dropout_that_drops_is_random(tmp_path: Path) -> None:
    constants = [
        numpy_helper.from_array(np.array(0.5, np.float32), "ratio"),
        numpy_helper.from_array(np.array(True), "training"),
    ]
    path = model_of(
        tmp_path / "m.onnx",
        [node("Dropout", "x ratio training", "d"), node("MatMul", "d W", "logits")],
        [weight("W", 4, 3), *constants],
    )
    with pytest.warns(UserWarning, match="differs from run to run: logits$"):
        prepare(path, tmp_path / "out")


def test_a_quantised_graph_is_compared_by_its_rounding(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x W", "h"),
        helper.make_node("DynamicQuantizeLinear", ["h"], ["q", "scale", "zero"]),
        node("MatMulInteger", "q Q zero", "i"),
        node("Cast", "i", "f", to=FLOAT),
        node("Mul", "f scale", "logits"),
    ]
    integers = numpy_helper.from_array(np.random.default_rng(0).integers(-100, 100, (8, 3)).astype(np.int8), "Q")
    path = model_of(tmp_path / "m.onnx", nodes, [weight("W", 4, 8), integers])
    bundle = prepare(path, tmp_path / "out")
    assert [tensor.name for tensor in bundle.tensors if tensor.trainable] == ["W"]


@pytest.mark.parametrize("opset", [12, 17])  # the older one is converted, which is not at fault
def test_a_loss_that_does_not_run_is_told_from_a_graph_that_does_not(tmp_path: Path, opset: int) -> None:
    shape = numpy_helper.from_array(np.array([1, -1, 4]), "shape")
    path = model_of(
        tmp_path / "m.onnx",
        [node("Reshape", "x shape", "y"), node("MatMul", "y W", "logits")],
        [shape, weight("W", 4, 3)],
        opset=opset,
    )
    with pytest.raises(BundleError, match=r"'logits' is declared as \[batch, 3\] and is \[1, 2, 3\].*--loss none"):
        prepare(path, tmp_path / "out")


def test_a_source_that_gives_no_number_is_still_compared(tmp_path: Path) -> None:
    nodes = [node("Sub", "x x", "zero"), node("Div", "zero zero", "nan"), node("MatMul", "nan W", "logits")]
    prepare(model_of(tmp_path / "m.onnx", nodes, [weight("W", 4, 3)]), tmp_path / "out")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("model_too", [True, False])
def test_external_data_may_be_behind_links(
    tmp_path: Path, dtype: Literal["float32", "float16"], model_too: bool
) -> None:
    """As in the Hugging Face cache: snapshots/<revision>/model.onnx -> ../../blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = onnx.load(linear(tmp_path / "m.onnx"))
    onnx.save(model, snapshot / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    for name in ("model.onnx", "model.onnx_data") if model_too else ("model.onnx_data",):
        (snapshot / name).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-of-{name}")
    bundle = prepare(snapshot / "model.onnx", tmp_path / "out", dtype=dtype)
    assert len(bundle.tensors) == 1


# ---- old operator sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("opset", [9, 11, 12])
def test_old_operator_sets_are_converted(
    tmp_path: Path, opset: int, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = onnx.version_converter.convert_version

    def forgetful(*args: Any) -> onnx.ModelProto:
        """As onnx 1.17."""
        model = whole(*args)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.ClearField("data_location")
                tensor.ClearField("external_data")
        return model

    monkeypatch.setattr(onnx.version_converter, "convert_version", forgetful)
    nodes = [
        node("MatMul", "x W", "a"),
        node("Unsqueeze", "a", "b", axes=[0]),
        node("ReduceSum", "b", "c", axes=[0], keepdims=0),
        node("Softmax", "c", "d", axis=1),
        node("MatMul", "d V", "logits"),
    ]
    made = model_of(tmp_path / "made.onnx", nodes, [weight("W", 4, 64), weight("V", 64, 3)], opset=opset, ir_version=4)
    path = tmp_path / "m.onnx"
    if external:
        onnx.save(onnx.load(made), path, save_as_external_data=True, location="m.data", size_threshold=0)
    else:
        made.rename(path)
    bundle = prepare(path, tmp_path / "out")
    assert {tensor.name for tensor in bundle.tensors} == {"W", "V"}
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    got = run(bundle.model_path, {"x": x, "labels": np.zeros(3, np.int64)})
    np.testing.assert_allclose(got["logits"], run(path, {"x": x})["logits"], rtol=1e-5)


def test_a_conversion_that_changes_the_function_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = onnx.version_converter.convert_version

    def wrong(*args: Any) -> onnx.ModelProto:
        model = whole(*args)
        model.graph.node[0].op_type = "Sub"
        return model

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    path = model_of(
        tmp_path / "m.onnx",
        [node("Add", "x b", "a"), node("MatMul", "a W", "logits")],
        [weight("W", 4, 3), weight("b", 4)],
        opset=12,
    )
    said = "operator set 12, and converted, its output 'logits' is off by"
    with pytest.raises(BundleError, match=re.escape(said)):
        prepare(path, tmp_path / "out")


# ---- a batch that is given -------------------------------------------------------------------------------------------

X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_given_batch_is_kept_and_goes_along(tmp_path: Path, as_file: bool, labelled: bool) -> None:
    batch = {"x": X} | ({"labels": np.array([2, 0, 1])} if labelled else {})
    np.savez(tmp_path / "batch.npz", **batch)
    path = linear(tmp_path / "m.onnx")
    bundle = prepare(path, tmp_path / "out", probe=tmp_path / "batch.npz" if as_file else batch)
    for read in (bundle, pz.Bundle.read(tmp_path / "out")):
        assert read.probe is not None
        np.testing.assert_array_equal(read.probe["x"], X)
        np.testing.assert_array_equal(read.probe["labels"], [2, 0, 1] if labelled else [0, 0, 0])
    pz.load(bundle, threads=1).save(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "probe.npz").read_bytes() == (tmp_path / "out" / "probe.npz").read_bytes()
    pz.load(tmp_path / "tuned", threads=1)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({}, "the input 'x' (float32 of shape ['batch', 4]) is missing"),
        ({"x": X, "y": X}, "'y' is no input of the model, which takes x, labels"),
        ({"x": X.astype(np.float64)}, "'x' is float64 of shape [3, 4], the model takes float32 of shape ['batch', 4]"),
        ({"x": X[0]}, "'x' is float32 of shape [4], the model takes float32 of shape ['batch', 4]"),
        ({"x": X[:, :3]}, "'x' is float32 of shape [3, 3], the model takes"),
        ({"x": X, "labels": np.array([1.0])}, "'labels' is float64"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path, batch: dict[str, Any], said: str) -> None:
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=re.escape(f"probe: {said}")):
        prepare(path, tmp_path / "out", probe=batch)
    np.savez(tmp_path / "batch.npz", **batch)
    with pytest.raises(BundleError, match=re.escape(f"{tmp_path / 'batch.npz'}: {said}")):
        prepare(path, tmp_path / "out", probe=tmp_path / "batch.npz")
    assert not (tmp_path / "out").exists()


def test_what_is_no_batch_is_refused(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(TypeError, match=r"probe must be a file or a mapping of names to arrays, got \{'x'"):
        prepare(path, tmp_path / "out", probe={"x": [1.0]})  # type: ignore[dict-item]
    np.save(tmp_path / "single.npy", X)
    (tmp_path / "text.npz").write_text("x")
    np.savez(tmp_path / "objects.npz", x=np.array([None]))
    for file, said in {
        "none.npz": "cannot be read: No such file",
        "single.npy": "a single array",
        "text.npz": "not an .npz of plain arrays",
        "objects.npz": "not an .npz of plain arrays",
    }.items():
        with pytest.raises(BundleError, match=re.escape(f"{tmp_path / file}: {said}")):
            prepare(path, tmp_path / "out", probe=tmp_path / file)


def test_a_given_batch_on_which_the_model_does_not_run(tmp_path: Path) -> None:
    path = model_of(
        tmp_path / "m.onnx",
        [node("Gather", "W ids", "y"), node("ReduceMean", "y", "logits", axes=[1], keepdims=0)],
        [weight("W", 4, 3)],
        inputs=[("ids", INT64, ("batch", "sequence"))],
    )
    with pytest.raises(BundleError, match=r"m\.onnx: the model does not run on the given batch: .*indices element"):
        prepare(path, tmp_path / "out", probe={"ids": np.array([[4]])})


def test_a_bundle_without_a_batch_is_checked_by_that_of_load(tmp_path: Path) -> None:
    bundle = prepare(linear(tmp_path / "m.onnx"), tmp_path / "out")
    description = tmp_path / "out" / "bundle.json"
    description.write_text(description.read_text().replace('"probe": "probe.npz"', '"probe": null'))
    (tmp_path / "out" / "probe.npz").unlink()
    bundle = pz.Bundle.read(tmp_path / "out")
    assert bundle.probe is None
    with pytest.raises(BundleError, match="no probing batch in it; prepare the model again, or give a batch"):
        pz.load(bundle, threads=1)
    with pytest.raises(ValueError, match=r"batch: the input 'labels' .* is missing"):
        pz.load(bundle, threads=1, batch={"x": X})
    pz.load(bundle, threads=1, batch={"x": X, "labels": np.array([0, 1, 2]), "other": X}).save(tmp_path / "tuned")
    assert sorted(file.name for file in (tmp_path / "tuned").iterdir()) == [
        "bundle.json",
        "model.onnx",
        "weights.safetensors",
    ]


def test_inputs_of_any_name_are_kept(tmp_path: Path) -> None:
    nodes = [node("Add", "file past/x.0", "y"), node("MatMul", "y W", "logits")]
    inputs = [(name, FLOAT, ("batch", 4)) for name in ("file", "past/x.0")]
    bundle = prepare(model_of(tmp_path / "m.onnx", nodes, [weight("W", 4, 3)], inputs=inputs), tmp_path / "out")
    assert list(bundle.probe or {}) == ["file", "past/x.0", "labels"]
    assert ort.InferenceSession(bundle.model_path).run(["loss"], bundle.probe)
