from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import model_of, node, weight
from onnx import helper

import pocketzo as pz
from pocketzo.formats.safetensors import file_sha256

MODELS = Path(__file__).parent / "models"
BATCH: dict[str, np.ndarray[Any, Any]] = {
    "input_ids": np.array([[3, 4, 5, 6], [7, 8, 9, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": np.array([0, 2]),
}


def test_weights_are_those_of_the_file(model: pz.Model, tiny_bundle: Path) -> None:
    from safetensors.numpy import load_file

    stored = {
        name: array for name, array in load_file(tiny_bundle / "weights.safetensors").items() if name in model.weights
    }
    assert set(stored) == {tensor.name for tensor in model.bundle.tensors}
    for name, array in stored.items():
        np.testing.assert_array_equal(model.weights[name], array)


def test_outputs_are_those_of_plain_onnxruntime(model: pz.Model, tiny_bundle: Path) -> None:
    session = ort.InferenceSession(tiny_bundle / "model.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(["logits", "loss"], BATCH)
    got = model.run(BATCH)
    np.testing.assert_allclose(got["logits"], expected[0], rtol=1e-5, atol=1e-6)
    assert model.loss(BATCH) == pytest.approx(float(expected[1]), rel=1e-5)


def test_every_weight_is_live(model: pz.Model) -> None:
    for name, kept in model.weights.items():
        before = model.run(BATCH)["logits"]
        model.weights[name] = kept + np.random.default_rng(0).standard_normal(kept.shape, np.float32)
        assert not np.array_equal(before, model.run(BATCH)["logits"]), name
        model.weights[name] = kept
        np.testing.assert_array_equal(before, model.run(BATCH)["logits"])


def test_extra_arrays_of_a_batch_are_ignored(model: pz.Model) -> None:
    assert model.loss({**BATCH, "weights of the moon": np.zeros(3)}) == model.loss(BATCH)


def test_a_batch_without_inputs_is_refused_by_name(model: pz.Model) -> None:
    with pytest.raises(ValueError, match=r"the graph's inputs are input_ids, .*; got pixels"):
        model.run({"pixels": np.zeros(3)})


def test_without_labels_there_are_logits_and_no_loss(model: pz.Model) -> None:
    unlabelled = {name: array for name, array in BATCH.items() if name != "labels"}
    got = model.run(unlabelled)
    assert set(got) == {"logits"}
    np.testing.assert_array_equal(got["logits"], model.run(BATCH)["logits"])
    with pytest.raises(ValueError, match="labels"):
        model.loss(unlabelled)


def test_without_labels_the_first_input_may_have_any_shape(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", "state", "a", axes=[0], keepdims=0),
        node("Cast", "rate", "r", to=1),
        node("Mul", "a r", "b"),
        node("MatMul", "b W", "logits"),
    ]
    inputs: list[tuple[str, int, tuple[int | str, ...]]] = [("rate", 7, ()), ("state", 1, (2, "batch", 4))]
    path = model_of(tmp_path / "m.onnx", nodes, [weight("W", 4, 3)], inputs=inputs)
    model = pz.load(pz.prepare(path, tmp_path / "bundle"), threads=1)
    batch = {"rate": np.array(2), "state": np.ones((2, 5, 4), np.float32)}
    assert model.run(batch)["logits"].shape == (5, 3)


def test_saved_bundle_has_the_weights_of_the_moment(model: pz.Model, tmp_path: Path) -> None:
    model.weights["dense.bias"] = model.weights["dense.bias"] + 1
    model.save(tmp_path / "tuned")
    again = pz.load(tmp_path / "tuned", threads=1)
    assert again.loss(BATCH) == model.loss(BATCH)
    assert again.bundle.base_sha256 == model.bundle.base_sha256
    session = ort.InferenceSession(tmp_path / "tuned" / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], BATCH)[0], model.run(BATCH)["logits"], rtol=1e-5, atol=1e-6)


def test_saving_replaces_a_bundle_if_that_is_wanted_and_never_its_base(tiny_bundle: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_bundle, tmp_path / "base"))
    model = pz.load(base, threads=1)
    before = file_sha256(base / "weights.safetensors")
    model.weights["dense.bias"] = 1
    for overwrite in False, True:
        with pytest.raises(pz.BundleError, match="base: is the base of these weights"):
            model.save(base, overwrite=overwrite)
    assert file_sha256(base / "weights.safetensors") == before
    model.save(tmp_path / "tuned")
    model.weights["dense.bias"] = 2
    with pytest.raises(pz.BundleError, match="tuned: already exists; choose another folder, or replace"):
        model.save(tmp_path / "tuned")
    assert pz.load(tmp_path / "tuned", threads=1).weights["dense.bias"].max() == 1
    model.save(tmp_path / "tuned", overwrite=True)
    assert pz.load(tmp_path / "tuned", threads=1).weights["dense.bias"].max() == 2


def with_graph(bundle: Path, out: Path, nodes: list[onnx.NodeProto]) -> Path:
    """A copy of the tiny bundle with another graph behind ``mean``, without what preparing would have done."""
    shutil.copytree(bundle, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    kept = [node for node in model.graph.node if not {"dense_0", "normed"} & set(node.output)]
    at = next(i for i, node in enumerate(kept) if "mean" in node.output) + 1
    del model.graph.node[:]
    model.graph.node.extend(kept[:at] + nodes + kept[at:])
    onnx.save(model, out / "model.onnx")
    description = json.loads((out / "bundle.json").read_text())
    description["graph_sha256"] = file_sha256(out / "model.onnx")
    (out / "bundle.json").write_text(json.dumps(description))
    return out


NORM = helper.make_node("LayerNormalization", ["mean", "norm.weight", "norm.bias"], ["normed"], epsilon=1e-5)


def test_folded_weight_is_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    # Level ALL folds W + W into a constant, after which a write to W is not seen.
    nodes = [
        NORM,
        helper.make_node("Add", ["dense.weight", "dense.weight"], ["double"]),
        helper.make_node("MatMul", ["normed", "double"], ["dense_0"]),
    ]
    bundle = with_graph(tiny_bundle, tmp_path / "bundle", nodes)
    with pytest.raises(pz.DeadWeightError, match=r"does not see what is written to dense\.weight,"):
        pz.load(bundle, threads=1, prepack=False)


def test_partly_folded_weight_is_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    nodes = [
        NORM,
        helper.make_node("Add", ["dense.weight", "dense.weight"], ["double"]),
        helper.make_node("MatMul", ["normed", "double"], ["dense_a"]),
        helper.make_node("MatMul", ["normed", "dense.weight"], ["dense_b"]),
        helper.make_node("Add", ["dense_a", "dense_b"], ["dense_0"]),
    ]
    bundle = with_graph(tiny_bundle, tmp_path / "bundle", nodes)
    with pytest.raises(pz.DeadWeightError, match=r"does not see what is written to dense\.weight,"):
        pz.load(bundle, threads=1)


def test_a_weight_that_nothing_uses_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["mean", "norm.bias"], ["normed"]),
        helper.make_node("MatMul", ["normed", "dense.weight"], ["dense_0"]),
    ]
    bundle = with_graph(tiny_bundle, tmp_path / "bundle", nodes)
    with pytest.warns(UserWarning, match=r"nothing that was tried changes with norm\.weight: is it unused"):
        pz.load(bundle, threads=1, prepack=False)
    with pytest.warns(UserWarning, match=r"nothing that was tried changes with norm\.weight: is it unused"):
        assert pz.load(bundle, threads=1, prepack=True).prepacked


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_each_check_refuses_a_folded_weight(tiny_bundle: Path, tmp_path: Path, verify: Literal["fast", "full"]) -> None:
    nodes = [
        NORM,
        helper.make_node("Neg", ["dense.weight"], ["negative"]),
        helper.make_node("MatMul", ["normed", "negative"], ["dense_0"]),
    ]
    bundle = with_graph(tiny_bundle, tmp_path / "bundle", nodes)
    with pytest.raises(pz.DeadWeightError, match=r"does not see what is written to dense\.weight,"):
        pz.load(bundle, threads=1, prepack=False, verify=verify)


@pytest.mark.parametrize("prepack", [True, False])
def test_the_check_leaves_the_weights_as_they_are(tiny_bundle: Path, prepack: bool) -> None:
    model = pz.load(tiny_bundle, threads=1, prepack=prepack)
    assert b"".join(model.weights._bytes()) == (tiny_bundle / "weights.safetensors").read_bytes()


def test_all_layers_of_a_zero_head_are_checked(tiny_bundle: Path, tmp_path: Path) -> None:
    # With a zero head no other weight moves the output; the check must not depend on the stored values.
    model = pz.load(tiny_bundle, threads=1)
    model.weights["classifier.weight"] = 0
    model.save(tmp_path / "zero")
    pz.load(tmp_path / "zero", threads=1, verify="full")


@pytest.mark.parametrize("graph", sorted(MODELS.glob("*.onnx")), ids=lambda path: path.stem)
def test_exported_models_load_with_the_full_check(graph: Path, tmp_path: Path) -> None:
    # Their biases of attention keys move no output but by roundings; to expect movement is not enough.
    bundle = pz.prepare(graph, tmp_path / "bundle")
    assert any(tensor.trainable for tensor in bundle.tensors)
    pz.load(bundle, threads=1, verify="full")


def test_graph_that_does_not_run_is_a_bundle_error(tiny_bundle: Path, tmp_path: Path) -> None:
    nodes = [NORM, helper.make_node("MatMul", ["dense.weight", "normed"], ["dense_0"])]
    bundle = with_graph(tiny_bundle, tmp_path / "bundle", nodes)
    with pytest.raises(pz.BundleError, match=r"model\.onnx"):
        pz.load(bundle, threads=1)


def test_truncated_weights_are_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(pz.BundleError, match=r"weights\.safetensors"):
        pz.load(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, ValueError, r"threads must be in 1 \.\. 256, got 0"),
        ({"threads": 257}, ValueError, r"threads must be in 1 \.\. 256, got 257"),
        ({"threads": True}, TypeError, "threads must be an int, got True"),
        ({"threads": "2"}, TypeError, "threads must be an int, got '2'"),
        ({"max_memory": float("nan")}, TypeError, "max_memory must be an int, got nan"),
        ({"max_memory": -5}, ValueError, r"max_memory must be in 1 \.\. \d+, got -5"),
        ({"batch": [1]}, TypeError, r"batch must be a mapping of names to arrays, got \[1\]"),
        ({"batch": {"input_ids": [1]}}, TypeError, "batch must be a mapping of names to arrays, got {'input_ids'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_of_the_wrong_kind_are_refused(
    tiny_bundle: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pz.load(tiny_bundle, **options)
